//! Reads a trace from Jaeger's query API. A real Jaeger has this API, and the backend of `cargo dev` also has
//! it.

use anyhow::{Result, ensure};
use harness::{client::Client, trace::Span};
use serde_json::Value;
use std::collections::BTreeMap;

/// Returns the spans of a trace that Jaeger has received so far. `jaeger` is Jaeger's URL. If Jaeger doesn't
/// know the trace, returns no spans.
///
/// # Errors
/// If there is no response, if its status is neither 200 nor 404, or if it has no list `data`.
pub async fn trace(client: &Client, jaeger: &str, trace_id: &str) -> Result<Vec<Span>> {
    let answer = client.get(&format!("{jaeger}/api/traces/{trace_id}")).await?;
    if answer.status == 404 {
        return Ok(Vec::new());
    }
    ensure!(answer.status == 200, "{jaeger} answered {}", answer.status);
    let json = answer.json();
    let data = json["data"].as_array();
    ensure!(data.is_some(), "{jaeger} did not answer as Jaeger does");
    Ok(data.into_iter().flatten().flat_map(spans).collect())
}

fn spans(trace: &Value) -> Vec<Span> {
    let spans = trace["spans"].as_array();
    spans.into_iter().flatten().map(|span| to_span(span, &trace["processes"])).collect()
}

/// Converts a span from Jaeger's JSON. Jaeger stores the kind and the status as tags. This function makes
/// them fields again, as in OTLP.
fn to_span(span: &Value, processes: &Value) -> Span {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let process = &processes[span["processID"].as_str().unwrap_or_default()];
    let references: Vec<_> = span["references"].as_array().into_iter().flatten().collect();
    // Links are also references, of the type FOLLOWS_FROM. If a link leads to the parent
    // (`MQ_RELATION=both`), Jaeger returns no other reference to the parent.
    let is_link = |reference: &&&Value| reference["refType"] == "FOLLOWS_FROM";
    let in_trace = || references.iter().filter(|reference| reference["traceID"] == span["traceID"]);
    let parent = in_trace().find(|reference| !is_link(reference)).or_else(|| in_trace().next());
    let links = references.iter().filter(is_link);
    let mut attributes = tags(&span["tags"]);
    let mut take = |key: &str| attributes.remove(key).unwrap_or_default();
    let start = span["startTime"].as_u64().unwrap_or_default().saturating_mul(1000);
    Span {
        trace_id: text(&span["traceID"]),
        span_id: text(&span["spanID"]),
        parent_span_id: parent.map(|parent| text(&parent["spanID"])).unwrap_or_default(),
        service: text(&process["serviceName"]),
        name: text(&span["operationName"]),
        kind: match take("span.kind").as_str() {
            "server" => "SERVER",
            "client" => "CLIENT",
            "producer" => "PRODUCER",
            "consumer" => "CONSUMER",
            "internal" => "INTERNAL",
            _ => "UNSPECIFIED",
        },
        status: match take("otel.status_code").as_str() {
            "OK" => "OK",
            "ERROR" => "ERROR",
            _ => "UNSET",
        },
        status_message: take("otel.status_description"),
        start,
        end: start.saturating_add(span["duration"].as_u64().unwrap_or_default().saturating_mul(1000)),
        trace_state: take("w3c.tracestate"),
        scope: take("otel.scope.name"),
        attributes,
        resource: tags(&process["tags"]),
        events: span["logs"].as_array().into_iter().flatten().map(event).collect(),
        links: links.map(|link| (text(&link["traceID"]), text(&link["spanID"]))).collect(),
        // Jaeger's JSON has no flags.
        flags: 0,
    }
}

fn event(log: &Value) -> (String, BTreeMap<String, String>) {
    let mut fields = tags(&log["fields"]);
    (fields.remove("event").unwrap_or_default(), fields)
}

fn tags(tags: &Value) -> BTreeMap<String, String> {
    let tag = |tag: &Value| {
        let value = match &tag["value"] {
            Value::String(value) => value.clone(),
            other => other.to_string(),
        };
        Some((tag["key"].as_str()?.to_owned(), value))
    };
    tags.as_array().into_iter().flatten().filter_map(tag).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_span_of_jaeger_becomes_what_it_was() {
        let trace = json!({
            "traceID": "0af7651916cd43dd8448eb211c80319c",
            "spans": [{
                "traceID": "0af7651916cd43dd8448eb211c80319c",
                "spanID": "b7ad6b7169203331",
                "operationName": "mq_consumer_msg",
                "references": [
                    {"refType": "CHILD_OF", "traceID": "0af7651916cd43dd8448eb211c80319c", "spanID": "00f067aa0ba902b7"},
                    {"refType": "FOLLOWS_FROM", "traceID": "4bf92f3577b34da6a3ce929d0e0e4736", "spanID": "1111111111111111"}
                ],
                "startTime": 1_000_000, "duration": 250,
                "tags": [
                    {"key": "span.kind", "type": "string", "value": "consumer"},
                    {"key": "otel.status_code", "type": "string", "value": "ERROR"},
                    {"key": "error", "type": "bool", "value": true},
                    {"key": "server.port", "type": "int64", "value": 5672}
                ],
                "logs": [{"timestamp": 1, "fields": [{"key": "event", "type": "string", "value": "retry"}]}],
                "processID": "p1"
            }],
            "processes": {"p1": {"serviceName": "mq", "tags": [{"key": "host.name", "value": "h"}]}}
        });
        let [span] = &spans(&trace)[..] else { panic!("one span") };
        assert_eq!(
            (span.service.as_str(), span.name.as_str(), span.kind),
            ("mq", "mq_consumer_msg", "CONSUMER")
        );
        assert_eq!((span.status, span.parent_span_id.as_str()), ("ERROR", "00f067aa0ba902b7"));
        assert_eq!((span.start, span.end), (1_000_000_000, 1_000_250_000));
        assert_eq!(span.attributes["server.port"], "5672");
        assert_eq!(
            span.links,
            [("4bf92f3577b34da6a3ce929d0e0e4736".to_owned(), "1111111111111111".to_owned())]
        );
        assert_eq!(span.events[0].0, "retry");
        assert_eq!(span.resource["host.name"], "h");
    }

    #[test]
    fn a_link_to_the_parent_is_both() {
        let link = json!({"refType": "FOLLOWS_FROM", "traceID": "a", "spanID": "2"});
        let other = json!({"refType": "FOLLOWS_FROM", "traceID": "b", "spanID": "3"});
        let trace = json!({"spans": [{"traceID": "a", "spanID": "1", "references": [other, link]}]});
        let [span] = &spans(&trace)[..] else { panic!("one span") };
        assert_eq!(span.parent_span_id, "2");
        assert_eq!(span.links, [("b".to_owned(), "3".to_owned()), ("a".to_owned(), "2".to_owned())]);
    }

    #[test]
    fn what_is_missing_or_of_another_type_is_empty() {
        for trace in
            [json!(null), json!([]), json!({"spans": 1}), json!({"spans": [{"tags": [1], "references": {}}]})]
        {
            for span in spans(&trace) {
                assert_eq!((span.name.as_str(), span.kind), ("", "UNSPECIFIED"));
            }
        }
    }
}
