//! Queries that no sane client sends. Each query must get a response, and must not harm other clients.

use crate::{Fixture, attribute, span, text};
use opentelemetry_proto::tonic::{common::v1::any_value::Value, trace::v1::Span};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use tokio::runtime::Runtime;

fn parameter() -> impl Strategy<Value = (&'static str, String)> {
    let names = prop::sample::select(vec![
        "service",
        "operation",
        "tag",
        "tags",
        "start",
        "end",
        "lookback",
        "limit",
        "minDuration",
        "maxDuration",
        "traceID",
        "endTs",
        "spanKind",
    ]);
    let values = prop_oneof![
        any::<String>(),
        any::<u128>().prop_map(|number| number.to_string()),
        any::<i64>().prop_map(|number| number.to_string()),
        any::<u128>().prop_map(|number| format!("{number:x}")),
        (any::<f64>(), "(ns|us|ms|s|m|h|d|x)").prop_map(|(number, unit)| format!("{number}{unit}")),
        "[0-9]{0,5}[.]?[0-9]{0,3}(ns|us|µs|ms|s|m|h)",
        "shop|step|user:ann|n:1",
        (any::<String>(), any::<String>())
            .prop_map(|(key, value)| serde_json::json!({ key: value }).to_string()),
        "[{}\\[\\]\":,0-9a-z]{0,20}",
    ];
    (names, values)
}

#[test]
fn every_query_is_answered_or_refused() {
    let runtime = Runtime::new().unwrap();
    let fixture = runtime.block_on(async {
        let fixture = Fixture::start().await.unwrap();
        let attributes = vec![text("user", "ann"), attribute("n", Value::IntValue(1))];
        let spans =
            (1..20).map(|id| Span { attributes: attributes.clone(), ..span(id.into(), id, 0, "step") });
        fixture.export("shop", spans).await.unwrap();
        fixture
    });
    let paths =
        prop::sample::select(vec!["/api/traces", "/api/recent", "/api/operations", "/api/dependencies"]);
    let queries = (paths, any::<bool>(), prop::collection::vec(parameter(), 0..5));
    let mut runner = TestRunner::new(Config { cases: 1000, ..Config::default() });
    let outcome = runner.run(&queries, |(path, with_service, parameters)| {
        let mut query = form_urlencoded::Serializer::new(String::new());
        if with_service {
            // With this parameter, the query passes the check for a missing service.
            query.append_pair("service", "shop");
        }
        let query = query.extend_pairs(parameters).finish();
        let answer = runtime.block_on(fixture.get(&format!("{path}?{query}"))).unwrap();
        prop_assert!([200, 400, 404].contains(&answer.status.as_u16()), "{path}?{query}: {}", answer.status);
        prop_assert_eq!(answer.header("content-type"), "application/json");
        prop_assert!(answer.json().is_object());
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn every_id_in_a_path_is_answered_or_refused() {
    let runtime = Runtime::new().unwrap();
    let fixture = runtime.block_on(Fixture::start()).unwrap();
    let ids = prop_oneof![any::<String>(), "[0-9a-fA-F]{1,40}", "[%./0-9a-f+-]{1,40}"];
    let mut runner = TestRunner::new(Config { cases: 500, ..Config::default() });
    let outcome = runner.run(&ids, |id| {
        let id: String = form_urlencoded::byte_serialize(id.as_bytes()).collect();
        let path = format!("/api/traces/{id}");
        let status = runtime.block_on(fixture.get(&path)).unwrap().status.as_u16();
        prop_assert!([200, 400, 404].contains(&status), "{path}: {status}");
        let path = format!("/api/services/{id}/operations");
        let status = runtime.block_on(fixture.get(&path)).unwrap().status.as_u16();
        prop_assert!([200, 404].contains(&status), "{path}: {status}");
        Ok(())
    });
    outcome.unwrap();
}
