use super::*;
use proptest::prelude::*;

fn mobile() -> MobileNumber {
    MobileNumber::try_from("13800138000".to_owned()).unwrap()
}

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[test]
fn body_has_the_shape_of_the_go_original() {
    let mut carrier = HeaderCarrier::default();
    carrier.set("traceparent", TRACEPARENT.to_owned());
    let message = LoginMessage { carrier, msg: mobile() };
    assert_eq!(
        String::from_utf8(message.to_json()).unwrap(),
        r#"{"Carrier":{"Traceparent":["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"]},"Msg":"13800138000"}"#
    );
}

#[test]
fn empty_carrier_is_an_object_never_null() {
    let message = LoginMessage { carrier: HeaderCarrier::default(), msg: mobile() };
    assert_eq!(message.to_json(), br#"{"Carrier":{},"Msg":"13800138000"}"#);
}

#[test]
fn header_names_are_written_as_go_writes_them() {
    assert_eq!(canonical_header_name("traceparent"), "Traceparent");
    assert_eq!(canonical_header_name("X-B3-TRACEID"), "X-B3-Traceid");
}

#[test]
fn header_names_that_differ_in_case_are_the_same_header() {
    let body = br#"{"Carrier":{"traceparent":["a"],"Traceparent":["b"]},"Msg":""}"#;
    let (carrier, _) = LoginMessage::from_json(body);
    assert_eq!(carrier.get_all("traceparent").unwrap().len(), 2);
}

#[test]
fn malformed_carrier_does_not_cost_the_message() {
    for carrier in ["7", "null", "[]", "\"x\"", r#"{"Traceparent":7}"#, r#"{"Traceparent":[7,null]}"#] {
        let body = format!(r#"{{"Carrier":{carrier},"Msg":"13800138000"}}"#);
        let (carrier, message) = LoginMessage::from_json(body.as_bytes());
        assert_eq!(carrier.get("traceparent"), None, "{body}");
        assert_eq!(message.unwrap(), mobile(), "{body}");
    }
}

#[test]
fn only_a_mobile_number_is_a_login() {
    for msg in
        ["", "123456", "1234567890123456", "1380013800x", "\\u0000", "13800138000\\u0000", "+13800138000"]
    {
        let (_, message) = LoginMessage::from_json(format!(r#"{{"Msg":"{msg}"}}"#).as_bytes());
        assert_eq!(message.unwrap_err().reason, "not_a_mobile_number", "{msg}");
    }
}

#[test]
fn errors_and_debug_output_hold_nothing_of_the_body() {
    let message = LoginMessage { carrier: HeaderCarrier::default(), msg: mobile() };
    assert!(!format!("{message:?}").contains("138"));
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = LoginMessage::from_json(&body);
    }

    #[test]
    fn what_we_write_we_read(msg in "[0-9]{7,15}", tracestate in ".*") {
        let mut carrier = HeaderCarrier::default();
        carrier.set("traceparent", TRACEPARENT.to_owned());
        carrier.set("tracestate", tracestate);
        let message = LoginMessage { carrier, msg: MobileNumber::try_from(msg).unwrap() };
        let (carrier, mobile) = LoginMessage::from_json(&message.to_json());
        prop_assert_eq!(LoginMessage { carrier, msg: mobile.unwrap() }, message);
    }
}
