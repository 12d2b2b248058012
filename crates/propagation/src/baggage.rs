//! W3C Baggage: <https://www.w3.org/TR/baggage/>.
//!
//! The propagator of the Rust SDK reads only the first `baggage` header line. It also logs the whole
//! header when a member is malformed, although baggage may hold personal data.

use opentelemetry::{
    Context,
    baggage::{Baggage, BaggageExt},
    propagation::{Extractor, Injector, TextMapPropagator, text_map_propagator::FieldIter},
};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use std::sync::LazyLock;

const BAGGAGE: &str = "baggage";

/// The longest `baggage`, in bytes, that is read and therefore forwarded. A platform must be able to
/// propagate this many bytes and 64 members (section 3.3.2). This propagator accepts no more than that.
pub const MAX_BAGGAGE: usize = 8192;
const MAX_MEMBERS: usize = 64;

/// In a value, all characters except letters, digits and `-._~` are percent-encoded.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Reads and writes `baggage`. Malformed members are skipped, and the others are kept.
#[derive(Debug, Clone, Copy)]
pub struct BaggagePropagator;

impl TextMapPropagator for BaggagePropagator {
    fn inject_context(&self, cx: &Context, injector: &mut dyn Injector) {
        let mut header = String::new();
        for (key, (value, metadata)) in cx.baggage() {
            let encoded = utf8_percent_encode(value.as_str(), ENCODED);
            let properties = if metadata.as_str().is_empty() { "" } else { ";" };
            let member = format!("{key}={encoded}{properties}{}", metadata.as_str());
            if header.len() + member.len() < MAX_BAGGAGE {
                if !header.is_empty() {
                    header.push(',');
                }
                header.push_str(&member);
            }
        }
        if !header.is_empty() {
            injector.set(BAGGAGE, header);
        }
    }

    fn extract_with_context(&self, cx: &Context, extractor: &dyn Extractor) -> Context {
        let lines = extractor.get_all(BAGGAGE).unwrap_or_default();
        let mut length = 0;
        // A list that is too long is cut before the first member that doesn't fit.
        let members = lines.iter().flat_map(|line| line.split(',')).take_while(|member| {
            length += member.len() + ",".len();
            length <= MAX_BAGGAGE + ",".len()
        });
        let mut baggage = Baggage::new();
        for (key, value, properties) in members.filter_map(parse_member).take(MAX_MEMBERS) {
            baggage.insert_with_metadata(key.to_owned(), value, properties);
        }
        if baggage.is_empty() { cx.clone() } else { cx.with_baggage(baggage) }
    }

    fn fields(&self) -> FieldIter<'_> {
        static FIELDS: LazyLock<[String; 1]> = LazyLock::new(|| [BAGGAGE.into()]);
        FieldIter::new(FIELDS.as_slice())
    }
}

/// Parses `key=value;property;property`. The key must be a token, the value is percent-decoded, and the
/// properties are kept as they are. Like the value, the properties may have no `"` and no `\`, because JSON
/// would escape these characters.
fn parse_member(member: &str) -> Option<(&str, String, String)> {
    let (pair, properties) = member.split_once(';').unwrap_or((member, ""));
    let (key, value) = pair.split_once('=')?;
    let (key, value, properties) = (key.trim(), value.trim(), properties.trim());

    let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    let is_octet = |b: u8| matches!(b, 0x21..=0x7e) && !b"\",;\\".contains(&b);
    let is_of_properties = |b: u8| is_octet(b) || b" ;".contains(&b);
    let is_legal = !key.is_empty()
        && key.bytes().all(is_token)
        && value.bytes().all(is_octet)
        && properties.bytes().all(is_of_properties);

    // Octets that are not UTF-8 become U+FFFD (section 3.3.1.3).
    let value = percent_decode_str(value).decode_utf8_lossy().into_owned();
    is_legal.then(|| (key, value, properties.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Lines;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, HashMap};

    fn extract(lines: &[&str]) -> Context {
        let headers: Vec<_> = lines.iter().map(|line| ("baggage", *line)).collect();
        BaggagePropagator.extract_with_context(&Context::new(), &Lines(&headers))
    }

    fn members(cx: &Context) -> BTreeMap<String, String> {
        cx.baggage().iter().map(|(k, (v, _))| (k.to_string(), v.to_string())).collect()
    }

    fn injected(cx: &Context) -> String {
        let mut headers = HashMap::new();
        BaggagePropagator.inject_context(cx, &mut headers);
        headers.remove("baggage").unwrap_or_default()
    }

    #[test]
    fn members_of_all_lines_are_read() {
        let cx = extract(&["tenant=blue , user = a%20b", "region=eu;ttl=5; p"]);
        let expected = [("region", "eu"), ("tenant", "blue"), ("user", "a b")];
        assert_eq!(members(&cx), expected.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
        let (_, metadata) = cx.baggage().get_with_metadata("region").unwrap();
        assert_eq!(metadata.as_str(), "ttl=5; p");
    }

    #[test]
    fn malformed_members_are_skipped() {
        for malformed in [
            "",
            "x",
            "=v",
            "a b=v",
            "k=v v",
            "k=\"v\"",
            "k=a\\b",
            "k=é",
            "k(=v",
            "k=v;p\r\nx: y",
            "k=v;p=\"",
            "k=v;\\",
        ] {
            let cx = extract(&[malformed, "ok=1"]);
            assert_eq!(members(&cx), [("ok".to_owned(), "1".to_owned())].into(), "{malformed:?}");
        }
    }

    #[test]
    fn octets_that_are_not_utf8_are_replaced() {
        assert_eq!(members(&extract(&["k=%ff"]))["k"], "\u{fffd}");
        assert_eq!(members(&extract(&["k=%4"]))["k"], "%4");
    }

    #[test]
    fn decoded_line_breaks_are_encoded_again_when_sent_on() {
        assert_eq!(injected(&extract(&["k=a%0d%0ab"])), "k=a%0D%0Ab");
    }

    #[test]
    fn limits_hold_in_both_directions() {
        let too_long = format!("k={}", "v".repeat(MAX_BAGGAGE));
        assert!(members(&extract(&[&too_long])).is_empty());
        let member = |key: &str, length: usize| format!("{key}={}", "v".repeat(length - key.len() - 1));
        let exact = [member("a", 4000), member("b", MAX_BAGGAGE - 4001)];
        assert_eq!(members(&extract(&[&exact.join(",")])).len(), 2);
        for beyond in [[&exact[0], &format!("{}v", exact[1])], [&exact[0], &format!("{} ", exact[1])]] {
            let cut = extract(&[beyond[0], beyond[1], "c=1"]);
            assert_eq!(members(&cut).into_keys().collect::<Vec<_>>(), ["a"]);
        }
        let too_many = (0..100).map(|i| format!("k{i}=v")).collect::<Vec<_>>().join(",");
        assert_eq!(members(&extract(&[&too_many])).len(), MAX_MEMBERS);
        // When the values are encoded again, they are three times as long. Members that don't fit are left
        // out.
        let grows = |key: &str, encoded: usize| format!("{key}=vv{}", "!".repeat((encoded - 4) / 3));
        for (first, second, sent) in [(4096, 4093, 8190), (4096, 4096, 4096), (8194, 4, 4)] {
            let cx = extract(&[&grows("a", first), &grows("b", second)]);
            assert_eq!((members(&cx).len(), injected(&cx).len()), (2, sent));
        }
    }

    #[test]
    fn no_baggage_writes_no_header() {
        assert_eq!(injected(&Context::new()), "");
    }

    proptest! {
        #[test]
        fn hostile_lines_never_panic_and_are_sent_on_printable(lines in proptest::collection::vec(".{0,200}", 0..4)) {
            let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
            let header = injected(&extract(&lines));
            prop_assert!(header.bytes().all(|b| matches!(b, 0x20..=0x7e)), "{header:?}");
        }

        #[test]
        fn every_value_survives_the_wire(value in ".{0,50}") {
            let mut baggage = Baggage::new();
            baggage.insert("key", value.clone());
            let cx = extract(&[&injected(&Context::new().with_baggage(baggage))]);
            prop_assert_eq!(cx.baggage().get("key").map(|v| v.as_str()), Some(value.as_str()));
        }
    }
}
