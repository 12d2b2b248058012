use super::{broker::destination_name, *};
use lapin::types::FieldArray;
use opentelemetry::propagation::TextMapPropagator;
use propagation::{BaggagePropagator, TraceContextPropagator};
use proptest::{collection::vec, prelude::*};

#[test]
fn destination_names_leave_out_empty_and_repeated_parts() {
    for (parts, name) in [
        (&["e", "k"][..], "e:k"),
        (&["", "q"], "q"),
        (&["e", ""], "e"),
        (&["", ""], "amq.default"),
        (&["e", "k", "q"], "e:k:q"),
        (&["", "q", "q"], "q"),
        (&["e", "q", "q"], "e:q"),
    ] {
        assert_eq!(destination_name(parts), name);
    }
}

#[test]
fn header_values_of_other_clients_are_read() {
    let mut headers = FieldTable::default();
    headers.insert("TraceParent".into(), AMQPValue::ShortString("short".into()));
    headers.insert("number".into(), AMQPValue::LongInt(7));
    headers.insert("bytes".into(), AMQPValue::LongString(b"\xff"[..].into()));
    headers.insert("array-of-bytes".into(), AMQPValue::ByteArray(b"text".to_vec().into()));
    headers.insert("array-of-no-text".into(), AMQPValue::ByteArray(b"\xff".to_vec().into()));
    headers.insert("void".into(), AMQPValue::Void);
    let mut array = FieldArray::default();
    array.push(AMQPValue::LongString("a".into()));
    array.push(AMQPValue::LongString("b".into()));
    headers.insert("array".into(), AMQPValue::FieldArray(array));

    let headers = Headers(&headers);
    assert_eq!(headers.get("traceparent"), Some("short"));
    assert_eq!(headers.get("number"), Some("\u{fffd}"));
    assert_eq!(headers.get("bytes"), Some("\u{fffd}"));
    assert_eq!(headers.get("array-of-bytes"), Some("text"));
    assert_eq!(headers.get("array-of-no-text"), Some("\u{fffd}"));
    assert_eq!(headers.get("void"), None);
    assert_eq!(headers.get_all("array"), Some(vec!["a", "b"]));
}

fn any_value() -> impl Strategy<Value = AMQPValue> {
    let text = || vec(any::<u8>(), 0..20).prop_map(|bytes| AMQPValue::LongString(bytes.into()));
    let traceparent = "00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]";
    let leaf = prop_oneof![
        traceparent.prop_map(|text| AMQPValue::LongString(text.into())),
        text(),
        any::<i64>().prop_map(AMQPValue::LongLongInt),
        Just(AMQPValue::Void),
    ];
    leaf.prop_recursive(4, 20, 5, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..5).prop_map(|values| AMQPValue::FieldArray(values.into())),
            vec(("[a-zA-Z]{1,5}", inner), 0..5).prop_map(|members| {
                let mut table = FieldTable::default();
                for (name, value) in members {
                    table.insert(name.into(), value);
                }
                AMQPValue::FieldTable(table)
            }),
        ]
    })
}

proptest! {
    #[test]
    fn whatever_the_headers_hold_a_trace_is_continued_only_if_one_valid_traceparent_is_there(
        values in vec(any_value(), 0..3), names in vec("traceparent|TraceParent|tracestate|baggage", 3)
    ) {
        let mut headers = FieldTable::default();
        for (name, value) in names.iter().zip(&values) {
            headers.insert(name.as_str().into(), value.clone());
        }
        let headers = Headers(&headers);
        let cx = TraceContextPropagator.extract_with_context(&Context::new(), &headers);
        BaggagePropagator.extract_with_context(&Context::new(), &headers);
        let found = headers.get_all("traceparent").unwrap_or_default();
        prop_assert!(!cx.span().span_context().is_valid() || found.len() == 1, "{:?}", found);
    }
}

#[test]
fn relations_have_names() {
    assert_eq!("both".parse::<Relation>().unwrap(), Relation::Both);
    assert!("child".parse::<Relation>().is_err());
}
