//! HTTP headers (gRPC calls them metadata) as the carrier of a context, and attributes of both HTTP and gRPC.

use crate::{redaction::without_long_numbers, semconv};
use http::{HeaderMap, HeaderName, HeaderValue, uri::Authority};
use opentelemetry::{
    KeyValue, StringValue,
    propagation::{Extractor, Injector},
};
use std::{iter, net::SocketAddr};

/// Returns the attributes of the connection's peer, which counts as the client. Headers like
/// `x-forwarded-for` are ignored, because anybody can send them.
pub(crate) fn peer_attributes(peer: SocketAddr) -> [KeyValue; 4] {
    // A socket for IPv6 and IPv4 sees an IPv4 address as `::ffff:192.0.2.1`.
    let address = StringValue::from(peer.ip().to_canonical().to_string());
    let port = i64::from(peer.port());
    [
        KeyValue::new(semconv::CLIENT_ADDRESS, address.clone()),
        KeyValue::new(semconv::CLIENT_PORT, port),
        KeyValue::new(semconv::NETWORK_PEER_ADDRESS, address),
        KeyValue::new(semconv::NETWORK_PEER_PORT, port),
    ]
}

/// Returns the attributes of the server that a request names. Long numbers are removed from the name, because the
/// caller chooses the name, and could put a phone number into it.
pub(crate) fn server_attributes(authority: &Authority) -> impl Iterator<Item = KeyValue> {
    let address = without_long_numbers(authority.host().trim_matches(['[', ']']));
    let port = authority.port_u16().map(|port| KeyValue::new(semconv::SERVER_PORT, i64::from(port)));
    iter::once(KeyValue::new(semconv::SERVER_ADDRESS, address)).chain(port)
}

pub(crate) static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// HTTP headers (gRPC calls them metadata), as a carrier that a context is read from.
pub struct Headers<'a>(pub &'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(text)
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }

    fn get_all(&self, key: &str) -> Option<Vec<&str>> {
        let lines: Vec<&str> = self.0.get_all(key).iter().map(text).collect();
        (!lines.is_empty()).then_some(lines)
    }
}

/// Returns a header value as text. A value that is not text is malformed in every format, but it must not
/// look absent, so it becomes U+FFFD.
fn text(value: &HeaderValue) -> &str {
    value.to_str().unwrap_or("\u{fffd}")
}

/// HTTP headers, as a carrier that a context is written to.
pub struct HeadersMut<'a>(pub &'a mut HeaderMap);

impl Injector for HeadersMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        let name = match key {
            "traceparent" => Ok(TRACEPARENT.clone()),
            other => HeaderName::try_from(other),
        };
        // A value with a line break is left out, because it can't be a header.
        if let (Ok(name), Ok(mut value)) = (name, HeaderValue::try_from(value)) {
            // Each value is used only once, so HTTP/2 must not keep it in its table of headers, where it
            // would displace useful entries.
            value.set_sensitive(true);
            self.0.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_that_is_not_text_is_present_and_malformed() {
        let mut headers = HeaderMap::new();
        headers.append("traceparent", HeaderValue::from_bytes(b"\xff").unwrap());
        assert_eq!(Headers(&headers).get_all("traceparent"), Some(vec!["\u{fffd}"]));
        assert_eq!(Headers(&headers).get_all("tracestate"), None);
    }

    #[test]
    fn an_ipv4_address_has_one_form_on_every_socket() {
        for peer in ["192.0.2.1:7", "[::ffff:192.0.2.1]:7"] {
            let [client, ..] = peer_attributes(peer.parse().unwrap());
            assert_eq!(client, KeyValue::new(semconv::CLIENT_ADDRESS, "192.0.2.1"));
        }
    }

    #[test]
    fn a_line_break_is_never_written_into_a_header() {
        let mut headers = HeaderMap::new();
        HeadersMut(&mut headers).set("baggage", "k=v\r\nx-evil: 1".to_owned());
        assert!(headers.is_empty());
    }
}
