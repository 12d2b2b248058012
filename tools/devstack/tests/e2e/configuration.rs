//! Configuration alone turns tracing on, and decides how spans are sampled and exported.
//! `docs/configuration.md` names the test for each setting.

use anyhow::Result;
use harness::{
    client::Answer,
    process::Process,
    receiver::Receiver,
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack},
};
use std::net::TcpListener;

const REMOTE_PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_honoured_ends_every_service_with_2_before_anything_opens() -> Result<()> {
    // This port is taken, so a service that tried to listen on it would exit with 1.
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let listen = taken.local_addr()?.to_string();
    // A duration of 500,000,000,000 years can be parsed, but it can't be added to a time.
    let (eternity, eternal_millis) = ("500000000000y", "9000000000000000000");
    let prefixes = ["p".repeat(236), "p".repeat(300), "é".repeat(118)];
    let long_virtual_host = format!("amqp://user:s3cr3t@host/{}", "v".repeat(300));
    let cases = [
        ("API_DEADLINE", eternity),
        ("USERCENTER_TIMEOUT", eternity),
        ("USERCENTER_CIRCUIT_PAUSE", eternity),
        ("PUBLISH_TIMEOUT", eternity),
        ("ACCESS_EXPIRE", eternity),
        ("USERCENTER_DEADLINE", eternity),
        ("USERCENTER_MAX_CONNECTION_AGE", eternity),
        ("SHUTDOWN_TIMEOUT", eternity),
        ("SHUTDOWN_DELAY", eternity),
        ("MQ_RETRY_DELAYS", eternity),
        ("OTEL_BSP_SCHEDULE_DELAY", eternal_millis),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", eternal_millis),
        ("OTEL_METRIC_EXPORT_INTERVAL", eternal_millis),
        ("AMQP_PREFIX", &prefixes[0]),
        ("AMQP_PREFIX", &prefixes[1]),
        ("AMQP_PREFIX", &prefixes[2]),
        ("AMQP_URL", &long_virtual_host),
        ("AMQP_URL", "amqp://user:s3cr3t@h1/c,amqp://user:s3cr3t@h2/c"),
        ("OTEL_TRACES_EXPORTER", "jaeger"),
        ("OTEL_TRACES_EXPORTER", "otlp,none"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_PROPAGATORS", "xray"),
        ("OTEL_SDK_DISABLED", "maybe"),
        ("OTEL_INSTRUMENTATION_HTTP_KNOWN_METHODS", "GET,,POST"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4317"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:431700"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "br"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "s3cr3t"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=s3cr3t,content-length=5"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "Transfer-Encoding=chunked"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "grpc-timeout=1n"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "99999999"),
        ("OTEL_RESOURCE_ATTRIBUTES", "novalue"),
        ("LOG_FORMAT", "xml"),
        ("RUST_LOG", "api=loud"),
        ("SHUTDOWN_TIMEOUT", "soon"),
        // The default of SHUTDOWN_TIMEOUT is also 8s, but the delay must be shorter than the time-out.
        ("SHUTDOWN_DELAY", "8s"),
        ("API_MAX_CONNECTIONS", "0"),
        ("API_SPOOL_MAX_ENTRIES", "0"),
        ("API_SPOOL_MAX_BYTES", "-1"),
        ("USERCENTER_MAX_CONNECTION_AGE", "old"),
        ("AMQP_URL", "http://user:s3cr3t@host"),
        ("MQ_PREFETCH", "0"),
        ("MQ_COMMIT_INTERVAL", "1001ms"),
        ("MQ_RELATION", "cousin"),
        ("MQ_RETRY_DELAYS", "5s,1s"),
        ("MQ_DATABASE_URL", "postgres://user:s3cr3t@host/db"),
        ("MQ_DATABASE_URL", "sqlite://:memory:"),
        ("USERCENTER_URL", "nowhere"),
        ("USERCENTER_URL", "http://localhost:500510"),
        ("USERCENTER_URL", "http://localhost:50051/path"),
        ("USERCENTER_URL", "http://localhost:50051?query"),
        ("USERCENTER_URL", "http://s3cr3t@localhost:50051"),
        ("ACCESS_EXPIRE", "999ms"),
        ("PUBLISH_TIMEOUT", "0s"),
        ("ACCESS_SECRET", "s3cr3t"),
        ("API_LISTEN", "s3cr3t.example"),
    ];
    for (variable, value) in cases {
        let of_one = |prefix: &str| variable.starts_with(prefix);
        let services: &[&str] = match variable {
            "AMQP_URL" | "AMQP_PREFIX" => &["api", "mq"],
            "USERCENTER_DEADLINE" | "USERCENTER_MAX_CONNECTION_AGE" => &["rpc"],
            "ACCESS_SECRET" | "ACCESS_EXPIRE" | "PUBLISH_TIMEOUT" => &["api"],
            _ if of_one("API_") || of_one("USERCENTER_") => &["api"],
            _ if of_one("MQ_") => &["mq"],
            _ => &["api", "rpc", "mq"],
        };
        for service in services {
            let mut variables =
                vec![("API_LISTEN", listen.as_str()), ("USERCENTER_LISTEN", &listen), ("MQ_LISTEN", &listen)];
            variables.push((variable, value));
            let output = Process::command(service, &variables)?.output().await?;
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{service} with {variable}={value}: {said}");
            // A message from clap names the flag instead. The flag is the variable's name, or the end of that
            // name.
            let kebab = variable.to_ascii_lowercase().replace('_', "-");
            let names_flag = said.split("--").skip(1).any(|rest| {
                let flag =
                    rest.split(|c: char| c != '-' && !c.is_ascii_lowercase()).next().unwrap_or_default();
                !flag.is_empty() && kebab.ends_with(flag)
            });
            assert!(said.contains(variable) || names_flag, "{service} with {variable}={value}: {said}");
            assert!(variable == "API_LISTEN" || !said.contains("s3cr3t"), "{said}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_longest_durations_a_login_is_served_and_the_services_end() -> Result<()> {
    let durations = [
        "API_DEADLINE",
        "USERCENTER_TIMEOUT",
        "USERCENTER_CIRCUIT_PAUSE",
        "PUBLISH_TIMEOUT",
        "ACCESS_EXPIRE",
        "USERCENTER_DEADLINE",
        "USERCENTER_MAX_CONNECTION_AGE",
        "SHUTDOWN_TIMEOUT",
    ];
    let millis = [
        "OTEL_BSP_SCHEDULE_DELAY",
        "OTEL_BSP_EXPORT_TIMEOUT",
        "OTEL_EXPORTER_OTLP_TIMEOUT",
        "OTEL_METRIC_EXPORT_INTERVAL",
        "OTEL_METRIC_EXPORT_TIMEOUT",
    ];
    let mut variables = durations.map(|variable| ("*", variable, "1year")).to_vec();
    variables.extend(millis.map(|variable| ("*", variable, "31557600000")));
    variables.extend([("*", "OTEL_METRICS_EXPORTER", "otlp"), ("mq", "MQ_RETRY_DELAYS", "49days")]);
    let mut stack = Stack::start(&variables).await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_eq!(answer.status, 200, "{:?}", answer.json());
    stack.mq.said("login recorded").await?;
    stack.stop().await?;
    stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_value_counts_as_unset() -> Result<()> {
    let empty = ["API_DEADLINE", "USERCENTER_DEADLINE", "MQ_RELATION", "MQ_PREFETCH", "OTEL_TRACES_SAMPLER"];
    let stack = Stack::start(&empty.map(|variable| ("*", variable, ""))).await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn help_shows_no_secret() -> Result<()> {
    for service in ["api", "mq"] {
        let variables = [("AMQP_URL", "amqp://user:s3cr3t@host"), ("ACCESS_SECRET", "s3cr3t")];
        let output = Process::command(service, &variables)?.arg("--help").output().await?;
        assert!(output.status.success());
        let help = String::from_utf8_lossy(&output.stdout);
        assert!(help.contains("AMQP_URL") && !help.contains("s3cr3t"), "{help}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_sdk_makes_no_spans_and_passes_the_context_on() -> Result<()> {
    let mut stack = Stack::start(&[("*", "OTEL_SDK_DISABLED", "true")]).await?;
    let answer = stack.login(KNOWN_MOBILE, &[("traceparent", REMOTE_PARENT)]).await?;
    assert_eq!(answer.status, 200);
    // The answer has the id of the caller's span, because no service opened a span.
    assert_eq!(answer.header("traceparent"), REMOTE_PARENT);
    stack.mq.said("trace_id=4bf92f3577b34da6a3ce929d0e0e4736").await?;
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.header("traceparent"), "");
    stack.stop().await?;
    assert_eq!(stack.receiver.spans(), []);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_has_the_name_that_it_is_given() -> Result<()> {
    let stack = Stack::start(&[("api", "OTEL_SERVICE_NAME", "front")]).await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    stack.receiver.expect_tree(&answer.trace_id(), &LOGIN_TREE.replace("api ", "front ")).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn samplers_decide_at_the_root_or_follow_the_parent() -> Result<()> {
    let on = REMOTE_PARENT;
    let off = REMOTE_PARENT.replace("-01", "-00");
    // Each case has a sampler, its argument, and whether the sampler samples without a parent, with a sampled
    // parent, and with an unsampled parent.
    for (sampler, arg, expected) in [
        ("always_on", "", [true, true, true]),
        ("always_off", "", [false, false, false]),
        ("traceidratio", "1", [true, true, true]),
        ("traceidratio", "0", [false, false, false]),
        ("parentbased_always_on", "", [true, true, false]),
        ("parentbased_always_off", "", [false, true, false]),
        ("parentbased_traceidratio", "0", [false, true, false]),
        ("parentbased_traceidratio", "1", [true, true, false]),
    ] {
        let variables = [("*", "OTEL_TRACES_SAMPLER", sampler), ("*", "OTEL_TRACES_SAMPLER_ARG", arg)];
        let mut stack = Stack::start(&variables).await?;
        let without = stack.login(KNOWN_MOBILE, &[]).await?;
        let with_on = stack.login(KNOWN_MOBILE, &[("traceparent", on)]).await?;
        let other = off.replace("4bf9", "aaaa");
        let with_off = stack.login(KNOWN_MOBILE, &[("traceparent", &other)]).await?;
        stack.stop().await?;
        for (answer, expected) in [without, with_on, with_off].iter().zip(expected) {
            let count = stack.receiver.trace(&answer.trace_id()).len();
            // The flag in the answer to the caller must agree with the number of spans.
            let flag = is_sampled(answer);
            assert_eq!((count, flag), (if expected { 6 } else { 0 }, expected), "{sampler} {arg}");
        }
    }
    Ok(())
}

/// Returns whether the flags in the header `traceparent` say that the trace is sampled. (The second bit of
/// the flags says that the trace id is random.)
fn is_sampled(answer: &Answer) -> bool {
    answer.header("traceparent").ends_with(['1', '3'])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ratio_samples_about_so_many_traces_and_each_of_them_whole() -> Result<()> {
    let variables =
        [("*", "OTEL_TRACES_SAMPLER", "parentbased_traceidratio"), ("*", "OTEL_TRACES_SAMPLER_ARG", "0.5")];
    let mut stack = Stack::start(&variables).await?;
    let mut sampled = 0;
    for _ in 0..100 {
        sampled += usize::from(is_sampled(&stack.login(KNOWN_MOBILE, &[]).await?));
    }
    stack.stop().await?;
    // The probability that the number is outside this range is one in ten million.
    assert!((24..=76).contains(&sampled), "{sampled}");
    assert_eq!(stack.receiver.spans().len(), 6 * sampled);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn propagators_are_chosen_by_name() -> Result<()> {
    let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let b3 = format!("{trace}-{parent}-1");
    let jaeger = format!("{trace}:{parent}:0:1");
    let multi = [("x-b3-traceid", trace), ("x-b3-spanid", parent), ("x-b3-sampled", "1")];
    for (propagators, headers) in [
        ("b3", vec![("b3", b3.as_str())]),
        ("b3", multi.to_vec()),
        ("b3multi", multi.to_vec()),
        ("jaeger", vec![("uber-trace-id", jaeger.as_str())]),
        ("tracecontext,b3,jaeger", vec![("uber-trace-id", jaeger.as_str())]),
    ] {
        let stack = Stack::start(&[("*", "OTEL_PROPAGATORS", propagators)]).await?;
        let answer = stack.login(KNOWN_MOBILE, &headers).await?;
        assert_eq!(answer.trace_id(), trace, "{propagators}");
        stack.receiver.expect_tree_below(parent, trace, LOGIN_TREE).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_b3_sampling_state_without_ids_decides_about_the_whole_trace() -> Result<()> {
    let (on, off) = ("parentbased_always_on", "parentbased_always_off");
    for (propagators, sampler, headers, is_traced) in [
        ("b3", on, &[("b3", "0")][..], false),
        ("b3", on, &[("x-b3-sampled", "0")], false),
        ("b3multi", on, &[("x-b3-sampled", "0")], false),
        ("tracecontext,b3", on, &[("b3", "0")], false),
        ("b3", off, &[("b3", "1")], true),
        ("b3", off, &[("b3", "d")], true),
        ("b3multi", off, &[("x-b3-flags", "1")], true),
    ] {
        let variables = [("*", "OTEL_PROPAGATORS", propagators), ("*", "OTEL_TRACES_SAMPLER", sampler)];
        let mut stack = Stack::start(&variables).await?;
        let answer = stack.login(KNOWN_MOBILE, headers).await?;
        assert_eq!((answer.status.as_u16(), is_sampled(&answer)), (200, is_traced), "{headers:?}");
        stack.mq.said("login recorded").await?;
        stack.stop().await?;
        if is_traced {
            stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
        } else {
            assert_eq!(stack.receiver.spans(), [], "{propagators} {headers:?}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_methods_that_name_a_span_are_known_or_listed() -> Result<()> {
    for (list, named) in [
        ("", [("GET", true), ("QUERY", true), ("get", false), ("PROPFIND", false)]),
        ("PROPFIND, get", [("GET", false), ("QUERY", false), ("get", true), ("PROPFIND", true)]),
    ] {
        let stack = Stack::start(&[("api", "OTEL_INSTRUMENTATION_HTTP_KNOWN_METHODS", list)]).await?;
        let url = format!("http://{}/nothing", stack.api.address);
        for (method, is_known) in named {
            let answer = stack.client.send(method.parse()?, &url, &[], "").await?;
            let trace = answer.trace_id();
            let span = stack.receiver.expect_span(|span| span.trace_id == trace).await;
            let attribute = |key| span.attributes.get(key).map(String::as_str);
            let (name, known, original) =
                if is_known { (method, method, None) } else { ("HTTP", "_OTHER", Some(method)) };
            assert_eq!(span.name, name, "{list:?}");
            assert_eq!(attribute("http.request.method"), Some(known), "{list:?}");
            assert_eq!(attribute("http.request.method_original"), original, "{list:?}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_propagators_every_process_starts_its_own_trace() -> Result<()> {
    let stack = Stack::start(&[("*", "OTEL_PROPAGATORS", "none")]).await?;
    let answer = stack.login(KNOWN_MOBILE, &[("traceparent", REMOTE_PARENT)]).await?;
    assert_ne!(answer.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
    let tree = "
        api POST /usercenter/v1/user/login SERVER
          api usercenter.v1.Usercenter/GetUserByMobile CLIENT
          api local INTERNAL
          api send_msg_mq PRODUCER
    ";
    stack.receiver.expect_tree(&answer.trace_id(), tree).await;
    for service in ["usercenter", "mq"] {
        let span = stack.receiver.expect_span(|span| span.service == service).await;
        assert_eq!(span.parent_span_id, "");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn several_exporters_send_at_once() -> Result<()> {
    let receiver = Receiver::start().await?;
    let zipkin = format!("http://{}/api/v2/spans", receiver.http);
    let variables = [
        ("*", "OTEL_TRACES_EXPORTER", "otlp,zipkin,console"),
        ("*", "OTEL_EXPORTER_ZIPKIN_ENDPOINT", zipkin.as_str()),
    ];
    let mut stack = Stack::start(&variables).await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    stack.stop().await?;

    let mut received: Vec<_> = receiver
        .zipkin()
        .iter()
        .map(|span| {
            assert_eq!(span["traceId"], answer.trace_id());
            let remote = &span["remoteEndpoint"];
            assert_eq!(remote["port"].is_u64(), !span["kind"].is_null(), "{span}");
            assert_eq!(remote["ipv4"].is_string(), !span["kind"].is_null(), "{span}");
            let service = &span["localEndpoint"]["serviceName"];
            format!("{service} {} {} {}", span["kind"], span["name"], remote["serviceName"])
        })
        .collect();
    received.sort();
    assert_eq!(
        received,
        [
            r#""api" "CLIENT" "usercenter.v1.Usercenter/GetUserByMobile" null"#,
            r#""api" "PRODUCER" "send_msg_mq" "rabbitmq""#,
            r#""api" "SERVER" "POST /usercenter/v1/user/login" null"#,
            r#""api" null "local" null"#,
            r#""mq" "CONSUMER" "mq_consumer_msg" "rabbitmq""#,
            r#""usercenter" "SERVER" "usercenter.v1.Usercenter/GetUserByMobile" null"#,
        ]
    );
    assert!(stack.mq.output().contains("mq_consumer_msg"), "{}", stack.mq.output());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_exporter_there_are_ids_but_no_export() -> Result<()> {
    let mut stack = Stack::start(&[("*", "OTEL_TRACES_EXPORTER", "none")]).await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    stack.mq.said(&format!("trace_id={}", answer.trace_id())).await?;
    stack.stop().await?;
    assert_eq!(stack.receiver.spans(), []);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_hold_on_every_span() -> Result<()> {
    let variables =
        [("*", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "3"), ("*", "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "4")];
    let stack = Stack::start(&variables).await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    let spans = stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    for span in &spans {
        assert!(span.attributes.len() <= 3, "{span:#?}");
        assert!(span.attributes.values().all(|value| value.len() <= 4), "{span:#?}");
    }
    assert_eq!(spans.iter().filter(|span| span.attributes.len() == 3).count(), 5);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_are_of_the_size_and_age_that_is_asked_for() -> Result<()> {
    // No batch is due for an hour. But a batch is full after one span in api, and after two spans in the
    // other services.
    let variables = [
        ("*", "OTEL_BSP_SCHEDULE_DELAY", "3600000"),
        ("*", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2"),
        ("api", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1"),
    ];
    let mut stack = Stack::start(&variables).await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    // Each of api's four spans fills a batch. The single spans of the other services wait.
    let tree = "
        api POST /usercenter/v1/user/login SERVER
          api usercenter.v1.Usercenter/GetUserByMobile CLIENT
          api local INTERNAL
          api send_msg_mq PRODUCER
    ";
    stack.receiver.expect_tree(&answer.trace_id(), tree).await;
    assert_eq!(stack.receiver.requests().len(), 4);
    stack.stop().await?;
    stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    assert_eq!(stack.receiver.requests().len(), 6);
    Ok(())
}
