//! A login makes one trace in every mixture of these services and the same services in Go. The services in Go
//! use the framework go-zero, and publish the same message as the original, a login example for go-zero.

use anyhow::{Context, Result, ensure};
use harness::{
    PATIENCE, go_zero, poll,
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack, TestBroker},
    stand_in::{Reply, StandIn},
    trace::Span,
};
use lapin::{BasicProperties, options::BasicGetOptions};
use std::time::Duration;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const UNSAMPLED_TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "00f067aa0ba902b7";

#[tokio::test(flavor = "multi_thread")]
async fn every_mixture_of_the_two_systems_makes_one_trace() -> Result<()> {
    if !go_zero::is_available() {
        return Ok(());
    }
    for in_go in [
        &[][..],
        &["api"],
        &["rpc"],
        &["mq"],
        &["api", "rpc"],
        &["api", "mq"],
        &["rpc", "mq"],
        &["api", "rpc", "mq"],
    ] {
        mixture_makes_one_trace(in_go).await.with_context(|| format!("{in_go:?} in Go"))?;
    }
    Ok(())
}

async fn mixture_makes_one_trace(in_go: &[&str]) -> Result<()> {
    // In two of the four mixtures with api in Go, api publishes the message without confirms, as the original
    // does. In the other two mixtures, api publishes the message with confirms.
    let confirms = if in_go.contains(&"rpc") { "true" } else { "false" };
    let variables = [("*", "BAGGAGE_SPAN_ATTRIBUTES", "tenant"), ("api", "CONFIRMS", confirms)];
    let stack = Stack::start_mixed(TestBroker::connect().await?, in_go, &variables).await?;

    let unknown = stack.login("13900139000", &[]).await?;
    assert_eq!(unknown.status, 401, "{in_go:?}");
    let unsampled = format!("00-{UNSAMPLED_TRACE}-{PARENT}-00");
    assert_eq!(stack.login(KNOWN_MOBILE, &[("traceparent", &unsampled)]).await?.status, 200, "{in_go:?}");
    let sampled = format!("00-{TRACE}-{PARENT}-01");
    let headers = [("traceparent", &*sampled), ("tracestate", "vendor=a"), ("baggage", "tenant=blue")];
    let answer = stack.login(KNOWN_MOBILE, &headers).await?;
    assert_eq!((answer.status.as_u16(), answer.trace_id().as_str()), (200, TRACE), "{in_go:?}");

    // go-zero names the span of an HTTP request after the route only, without the method.
    let api_is_in_go = in_go.contains(&"api");
    let tree = if api_is_in_go { LOGIN_TREE.replace("POST /", "/") } else { LOGIN_TREE.to_owned() };
    let spans = stack.receiver.expect_tree_below(PARENT, TRACE, &tree).await;
    for span in &spans {
        let is_in_go = span.scope == "go-zero";
        let binary = if span.service == "usercenter" { "rpc" } else { &span.service };
        assert_eq!(is_in_go, in_go.contains(&binary), "{in_go:?}: {span:#?}");
        assert_eq!(span.trace_state, "vendor=a", "{in_go:?}: {span:#?}");
        if !is_in_go {
            assert_eq!(span.attributes["tenant"], "blue", "{in_go:?}: {span:#?}");
        }
    }
    // The services in Go log the baggage that reached them.
    for (name, service) in [("rpc", &stack.rpc), ("mq", &stack.mq)] {
        if in_go.contains(&name) {
            service.said(r#""baggage":"tenant=blue""#).await?;
        }
    }
    if in_go.contains(&"rpc") {
        let line = stack.rpc.said("deadline_ms").await?;
        let left = line.split_once(r#""deadline_ms":"#).and_then(|(_, rest)| rest.split([',', '}']).next());
        let left: i64 = left.context("deadline_ms")?.parse()?;
        // usercenter in Go applies the caller's deadline of 30 seconds. Its own deadline would be 40 seconds.
        assert!((1..=30_000).contains(&left), "{in_go:?}: {line}");
    }
    // Both messages are applied. The unsampled message came first, so its spans would have been exported
    // before the spans that the receiver has.
    let applied = poll(PATIENCE, async || {
        let logins = stack.broker.database.logins(KNOWN_MOBILE).await.ok()?;
        (logins == (2, 2)).then_some(())
    });
    ensure!(applied.await.is_some(), "the logins are not in the history:\n{}", stack.mq.output());
    assert!(stack.receiver.trace(UNSAMPLED_TRACE).is_empty(), "{in_go:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deadline_of_a_caller_in_go_arrives_as_grpc_timeout() -> Result<()> {
    if !go_zero::is_available() {
        return Ok(());
    }
    let usercenter = StandIn::start(|_| Reply::User).await?;
    let variables = [("api", "USERCENTER_URL", usercenter.url.as_str())];
    let stack = Stack::start_mixed(TestBroker::connect().await?, &["api"], &variables).await?;
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);
    // The stand-in answers with an error if there is no deadline.
    let [timeout] = usercenter.calls()[..] else { panic!("{:?}", usercenter.calls()) };
    assert!(timeout > Duration::ZERO && timeout <= Duration::from_secs(30), "{timeout:?}");
    Ok(())
}

/// Waits until the receiver has the consumer spans of `count` messages. Returns the outcome of each message
/// and the source of its trace context.
async fn consumed(stack: &Stack, count: usize) -> Result<Vec<(String, String)>> {
    let attribute = |span: &Span, key: &str| span.attributes.get(key).cloned().unwrap_or_default();
    let all = poll(PATIENCE, async || {
        let spans = stack.receiver.spans();
        let spans = spans.iter().filter(|span| span.name == "mq_consumer_msg").map(|span| {
            let outcome = attribute(span, "throughline.message.outcome");
            (outcome, attribute(span, "throughline.trace_context.source"))
        });
        Some(spans.collect::<Vec<_>>()).filter(|all| all.len() == count)
    });
    all.await.with_context(|| format!("there are not {count} consumer spans:\n{}", stack.mq.output()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_from_go_without_a_carrier_is_applied() -> Result<()> {
    if !go_zero::is_available() {
        return Ok(());
    }
    let variables = [("api", "TRACING_DISABLED", "true"), ("api", "CONFIRMS", "false")];
    let stack = Stack::start_mixed(TestBroker::connect().await?, &["api"], &variables).await?;
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);
    assert_eq!(consumed(&stack, 1).await?, [("applied".to_owned(), "none".to_owned())]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_from_go_that_comes_twice_is_a_duplicate() -> Result<()> {
    if !go_zero::is_available() {
        return Ok(());
    }
    let variables = [("api", "CONFIRMS", "false")];
    let mut stack = Stack::start_mixed(TestBroker::connect().await?, &["api"], &variables).await?;
    stack.mq.stop().await?;
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);
    let queue = stack.broker.topology.queue.as_str();
    let get = async || {
        let options = BasicGetOptions { no_ack: true };
        stack.broker.channel.basic_get(queue.into(), options).await.ok().flatten()
    };
    let message = poll(PATIENCE, get).await.context("no message")?.delivery;
    assert_eq!(*message.properties.message_id(), None);
    for _ in 0..2 {
        stack.publish(BasicProperties::default(), &message.data).await?;
    }
    let _mq = stack.another("mq", &[]).await?;
    let outcome = |outcome: &str| (outcome.to_owned(), "body".to_owned());
    assert_eq!(consumed(&stack, 2).await?, [outcome("applied"), outcome("duplicate")]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_in_go_is_refused_by_a_queue_of_another_history() -> Result<()> {
    if !go_zero::is_available() {
        return Ok(());
    }
    let stack = Stack::start(&[]).await?;
    let broker = &stack.broker;
    let database = format!("sqlite://{}", broker.database.file().with_file_name("other.db").display());
    let variables =
        [("AMQP_URL", &*broker.url), ("AMQP_PREFIX", &broker.prefix), ("MQ_DATABASE_URL", &database)];
    let started = go_zero::start("mq", &variables).await;
    let refusal = format!("{:#}", started.err().context("the consumer in Go is not refused")?);
    assert!(refusal.contains("PRECONDITION_FAILED"), "{refusal}");
    Ok(())
}
