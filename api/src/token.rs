//! Access tokens: JSON Web Tokens (RFC 7519), signed with HMAC-SHA256.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use serde::Serialize;
use sha2::Sha256;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// Issues tokens that are signed with one key.
pub struct TokenIssuer {
    key: Hmac<Sha256>,
    lifetime: Duration,
}

/// The answer to a login: a token and its times, in seconds since 1970.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Token {
    /// The token itself, which is a secret.
    pub access_token: String,
    /// The time when the token expires.
    pub access_expire: u64,
    /// The time when the caller should get a new token.
    pub refresh_after: u64,
}

#[derive(Serialize)]
struct Claims {
    sub: String,
    iat: u64,
    exp: u64,
}

impl TokenIssuer {
    /// Makes an issuer that signs with `secret`, or else with a random key that is lost when this process
    /// ends.
    pub fn new(secret: Option<&[u8]>, lifetime: Duration) -> Self {
        let random = [Uuid::new_v4().into_bytes(), Uuid::new_v4().into_bytes()].concat();
        let key = Hmac::new_from_slice(secret.unwrap_or(&random)).expect("HMAC takes keys of any length");
        Self { key, lifetime }
    }

    /// Issues a token that says who the user is. The token holds no mobile number.
    pub fn issue(&self, user_id: u64) -> Token {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let expires = now.saturating_add(self.lifetime.as_secs());
        let claims = Claims { sub: user_id.to_string(), iat: now, exp: expires };

        let encode = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
        let claims = serde_json::to_vec(&claims).expect("claims are plain strings and numbers");
        let signed = format!("{}.{}", encode(br#"{"alg":"HS256","typ":"JWT"}"#), encode(&claims));
        let signature = self.key.clone().chain_update(&signed).finalize().into_bytes();
        Token {
            access_token: format!("{signed}.{}", encode(&signature)),
            access_expire: expires,
            refresh_after: now.saturating_add(self.lifetime.as_secs() / 2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_signed_by_its_issuer() {
        let issuer = TokenIssuer::new(Some(&[7; 32]), Duration::from_secs(60));
        let token = issuer.issue(42);
        let (signed, signature) = token.access_token.rsplit_once('.').unwrap();
        let signature = BASE64_URL_SAFE_NO_PAD.decode(signature).unwrap();
        assert!(issuer.key.clone().chain_update(signed).verify_slice(&signature).is_ok());

        let other = TokenIssuer::new(None, Duration::from_secs(60));
        assert!(other.key.clone().chain_update(signed).verify_slice(&signature).is_err());
    }

    #[test]
    fn claims_say_who_and_until_when() {
        let token = TokenIssuer::new(None, Duration::from_secs(60)).issue(42);
        let claims = token.access_token.split('.').nth(1).unwrap();
        let claims: serde_json::Value =
            serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
        assert_eq!(claims["sub"], "42");
        assert_eq!(claims["exp"], token.access_expire);
        assert_eq!(claims["exp"].as_u64().unwrap() - claims["iat"].as_u64().unwrap(), 60);
        assert!(token.refresh_after < token.access_expire);
    }
}
