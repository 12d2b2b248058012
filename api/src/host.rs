//! Checks the header `Host`, which an HTTP/1.1 request has exactly once (RFC 9112, section 3.2). If a request
//! had several, a proxy on the way might obey a different `Host` than this service does.

use crate::problem::Problem;
use axum::{
    extract::Request,
    http::{HeaderValue, Version, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};

/// Refuses an HTTP/1.1 request without `Host`, and any request with several `Host` headers or an invalid
/// `Host`.
pub async fn named_once(request: Request, next: Next) -> Response {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let is_legal = match (hosts.next(), hosts.next()) {
        // HTTP/1.0 does not have this header, and HTTP/2 has a pseudo-header in its place.
        (None, _) => request.version() != Version::HTTP_11,
        (Some(host), None) => is_host(host),
        (Some(_), Some(_)) => false,
    };
    if is_legal { next.run(request).await } else { Problem::BadHost.into_response() }
}

/// Whether the value is `host`, `host:port`, or empty.
fn is_host(value: &HeaderValue) -> bool {
    let is_authority = |host: &str| !host.contains('@') && host.parse::<Authority>().is_ok();
    value.to_str().is_ok_and(|host| host.is_empty() || is_authority(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_no_more_than_a_name_and_a_port() {
        for host in ["", "x", "127.0.0.1:8888", "[::1]:8888", "a-b.example"] {
            assert!(is_host(&HeaderValue::from_static(host)), "{host}");
        }
        for other in ["user@x", "a b", "a/b", "http://a", "a:b:c", "a]"] {
            assert!(!is_host(&HeaderValue::from_static(other)), "{other}");
        }
        assert!(!is_host(&HeaderValue::from_bytes(b"\xff").unwrap()));
    }
}
