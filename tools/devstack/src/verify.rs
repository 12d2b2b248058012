//! `cargo dev verify`: logs in to a running system, wherever it runs, and compares the spans in Jaeger with
//! the contract: names, kinds, parents, services, attributes and error paths.

use crate::jaeger;
use anyhow::{Context, Result, ensure};
use clap::Args;
use harness::{
    client::{Answer, Client},
    poll,
    stack::{KNOWN_MOBILE, LOGIN_TREE},
    trace::{self, Span},
};
use http::Method;
use serde_json::json;
use std::{
    fmt::Write as _,
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

/// The system to check.
#[derive(Args)]
pub struct Options {
    /// The URL of api.
    #[arg(long, default_value = "http://localhost:8888", value_parser = base_url)]
    api: String,
    /// The URL of Jaeger's page, or of the page of `cargo dev`.
    #[arg(long, default_value = "http://localhost:16686", value_parser = base_url)]
    jaeger: String,
    /// How many seconds a trace may take to arrive.
    #[arg(long, default_value_t = 20)]
    patience: u64,
}

fn base_url(url: &str) -> Result<String, &'static str> {
    match url.parse::<http::Uri>() {
        Ok(uri) if uri.scheme_str() == Some("http") && uri.host().is_some() => {
            Ok(url.trim_end_matches('/').to_owned())
        }
        _ => Err("expected http://host:port"),
    }
}

/// A request to api, and the response and the spans that it must produce.
struct Case {
    name: &'static str,
    body: String,
    status: u16,
    /// The expected tree, as [`trace::tree`] draws it. The indentation of the source code is ignored.
    tree: &'static str,
    /// For each expected attribute: the name of the span, the name of the attribute, and its value. An empty
    /// value stands for any value.
    attributes: &'static [(&'static str, &'static str, &'static str)],
}

const LOGIN: &str = "POST /usercenter/v1/user/login";
const CALL: &str = "usercenter.v1.Usercenter/GetUserByMobile";

fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "a login",
            body: json!({ "mobile": KNOWN_MOBILE }).to_string(),
            status: 200,
            tree: LOGIN_TREE,
            attributes: &[
                (LOGIN, "http.request.method", "POST"),
                (LOGIN, "http.route", "/usercenter/v1/user/login"),
                (LOGIN, "http.response.status_code", "200"),
                (LOGIN, "url.scheme", ""),
                (CALL, "rpc.system.name", "grpc"),
                (CALL, "rpc.method", CALL),
                (CALL, "rpc.status_code", "OK"),
                ("send_msg_mq", "messaging.system", "rabbitmq"),
                ("send_msg_mq", "messaging.operation.type", "send"),
                ("send_msg_mq", "messaging.message.id", ""),
                ("mq_consumer_msg", "messaging.operation.type", "process"),
                ("mq_consumer_msg", "messaging.rabbitmq.message.delivery_tag", ""),
                ("mq_consumer_msg", "throughline.trace_context.source", "headers"),
            ],
        },
        Case {
            name: "an unknown user",
            body: json!({ "mobile": "13900139000" }).to_string(),
            status: 401,
            tree: "
                api POST /usercenter/v1/user/login SERVER
                  api usercenter.v1.Usercenter/GetUserByMobile CLIENT ERROR error.type=NOT_FOUND
                    usercenter usercenter.v1.Usercenter/GetUserByMobile SERVER
            ",
            attributes: &[
                (LOGIN, "http.response.status_code", "401"),
                (CALL, "rpc.status_code", "NOT_FOUND"),
            ],
        },
        Case {
            name: "a body that is not JSON",
            body: "{".to_owned(),
            status: 400,
            tree: "api POST /usercenter/v1/user/login SERVER",
            attributes: &[(LOGIN, "http.response.status_code", "400")],
        },
        Case {
            name: "a mobile number of another type",
            body: json!({ "mobile": 13_800_138_000_u64 }).to_string(),
            status: 422,
            tree: "api POST /usercenter/v1/user/login SERVER",
            attributes: &[(LOGIN, "http.response.status_code", "422")],
        },
    ]
}

/// Checks every case; returns success if all responses and traces are as expected.
///
/// # Errors
/// If api or Jaeger doesn't respond.
pub async fn run(options: Options) -> Result<ExitCode> {
    let client = Client::new();
    let mut out = io::stdout();
    let mut failures = 0;
    for case in cases() {
        let (answer, spans) = attempt(&client, &options, &case).await?;
        let differences = differences(&case, &answer, &spans);
        let url = format!("{}/trace/{}", options.jaeger, answer.trace_id());
        let verdict = if differences.is_empty() { "ok" } else { "NOT AS IT SHOULD BE" };
        writeln!(
            out,
            "{}: {} {verdict}\n{url}\n{}",
            case.name,
            answer.status.as_u16(),
            trace::tree(&spans, "")
        )?;
        if !differences.is_empty() {
            writeln!(out, "{differences}")?;
            failures += 1;
        }
    }
    writeln!(
        out,
        "{}",
        if failures == 0 { "all as it should be".to_owned() } else { format!("{failures} failed") }
    )?;
    Ok(if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Sends the request, then waits until its trace is as expected, for at most `options.patience` seconds.
async fn attempt(client: &Client, options: &Options, case: &Case) -> Result<(Answer, Vec<Span>)> {
    let url = format!("{}/usercenter/v1/user/login", options.api);
    let headers = [("content-type", "application/json"), ("user-agent", "throughline-verify")];
    let answer = client.send(Method::POST, &url, &headers, case.body.clone()).await;
    let answer = answer.context("logging in; `cargo dev` starts the system")?;
    let trace_id = answer.trace_id();
    ensure!(!trace_id.is_empty(), "{url} answered {} without a traceparent: is that api?", answer.status);

    // This first query fails at once if there is no Jaeger.
    let mut spans = jaeger::trace(client, &options.jaeger, &trace_id)
        .await
        .context("asking for the trace; `cargo dev backend` starts a viewer")?;
    let complete = poll(Duration::from_secs(options.patience), async || {
        spans = jaeger::trace(client, &options.jaeger, &trace_id).await.unwrap_or_default();
        (trace::tree(&spans, "") == trace::dedent(case.tree)).then_some(())
    });
    // If the trace doesn't become as expected, the caller reports the differences.
    let _ = complete.await;
    Ok((answer, spans))
}

/// Returns how the response and the spans differ from the case, with a line for each difference.
fn differences(case: &Case, answer: &Answer, spans: &[Span]) -> String {
    let mut out = String::new();
    if answer.status != case.status {
        let _ = writeln!(out, "status: expected {}, found {}", case.status, answer.status.as_u16());
    }
    let json = answer.json();
    let (member, expected) = match case.status {
        200 => ("accessToken", None),
        _ => ("traceId", Some(answer.trace_id())),
    };
    match (json[member].as_str(), expected) {
        (None, _) => drop(writeln!(out, "answer: no member {member}")),
        (Some(found), Some(expected)) if found != expected => {
            let _ = writeln!(out, "answer: {member} is {found}, but the header has {expected}");
        }
        _ => {}
    }
    let (expected, found) = (trace::dedent(case.tree), trace::tree(spans, ""));
    if expected != found {
        out.push_str("trace (- expected, + found):\n");
        let mark = |mark: char, lines: &str, others: &str, out: &mut String| {
            for line in lines.lines().filter(|line| !others.lines().any(|other| other == *line)) {
                let _ = writeln!(out, "{mark} {line}");
            }
        };
        mark('-', &expected, &found, &mut out);
        mark('+', &found, &expected, &mut out);
        let is_complete = |tree: &str| tree.contains("mq_consumer_msg");
        if is_complete(&expected) && !is_complete(&found) {
            out.push_str(
                "mq_consumer_msg must be below send_msg_mq, as it is with MQ_RELATION=parent or both. With \
                 MQ_RELATION=link, mq_consumer_msg is in a trace of its own, which is not checked.\n",
            );
        }
    }
    for (name, key, value) in case.attributes {
        for span in spans.iter().filter(|span| span.name == *name) {
            match span.attributes.get(*key) {
                None => drop(writeln!(out, "{} {name}: no attribute {key}", span.service)),
                Some(found) if !value.is_empty() && found != value => {
                    let _ = writeln!(out, "{} {name}: {key} is {found:?}, not {value:?}", span.service);
                }
                Some(_) => {}
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http::{HeaderMap, HeaderValue, StatusCode};

    const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    fn answer(status: StatusCode, body: &'static str) -> Answer {
        let mut headers = HeaderMap::new();
        let traceparent = HeaderValue::from_static("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        headers.insert("traceparent", traceparent);
        Answer { status, headers, body: Bytes::from_static(body.as_bytes()) }
    }

    fn server_span(kind: &'static str) -> Span {
        Span {
            trace_id: TRACE_ID.to_owned(),
            span_id: "1".to_owned(),
            service: "api".to_owned(),
            name: LOGIN.to_owned(),
            kind,
            attributes: [("http.response.status_code".to_owned(), "400".to_owned())].into(),
            ..Span::default()
        }
    }

    #[test]
    fn what_is_as_it_should_be_has_no_differences() {
        let case = &cases()[2];
        let answer = answer(StatusCode::BAD_REQUEST, r#"{"traceId":"4bf92f3577b34da6a3ce929d0e0e4736"}"#);
        assert_eq!(differences(case, &answer, &[server_span("SERVER")]), "");
    }

    #[test]
    fn a_consumer_span_that_is_elsewhere_is_told_with_what_is_expected() {
        let answer = answer(StatusCode::OK, r#"{"accessToken":"x"}"#);
        let found = differences(&cases()[0], &answer, &[server_span("SERVER")]);
        assert!(found.contains("as it is with MQ_RELATION=parent or both"), "{found}");
    }

    #[test]
    fn every_difference_is_told() {
        let case = &cases()[2];
        let mut span = server_span("CLIENT");
        span.attributes.clear();
        let expected = "status: expected 400, found 500\n\
            answer: traceId is x, but the header has 4bf92f3577b34da6a3ce929d0e0e4736\n\
            trace (- expected, + found):\n\
            - api POST /usercenter/v1/user/login SERVER\n\
            + api POST /usercenter/v1/user/login CLIENT\n\
            api POST /usercenter/v1/user/login: no attribute http.response.status_code\n";
        let found =
            differences(case, &answer(StatusCode::INTERNAL_SERVER_ERROR, r#"{"traceId":"x"}"#), &[span]);
        assert_eq!(found, expected);
    }
}
