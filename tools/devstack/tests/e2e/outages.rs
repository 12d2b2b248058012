//! The broker fails in every possible way. Logins are still answered. Their messages reach the broker later,
//! in order, each in the trace of its login.

use anyhow::{Context, Result};
use harness::{
    PATIENCE,
    client::Answer,
    poll,
    proxy::{BASIC_ACK, Side},
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack, TestBroker},
    trace::Span,
};
use lapin::{
    options::{BasicGetOptions, BasicNackOptions, QueueDeleteOptions},
    types::AMQPValue,
};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::time::timeout;

async fn login(stack: &Stack) -> Result<Answer> {
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_eq!(answer.status, 200, "{:?}\n{}", answer.json(), stack.api.output());
    Ok(answer)
}

/// Waits until the login's trace is complete. Returns its producer span.
async fn delivered(stack: &Stack, login: &Answer) -> Span {
    let spans = stack.receiver.expect_tree(&login.trace_id(), LOGIN_TREE).await;
    spans.into_iter().find(|span| span.kind == "PRODUCER").expect("a producer span")
}

/// Returns the producer span of a login, whether or not the login has been delivered.
async fn producer(stack: &Stack, login: &Answer) -> Span {
    let trace = login.trace_id();
    stack.receiver.expect_span(|span| span.trace_id == trace && span.kind == "PRODUCER").await
}

/// Returns why the login of this producer span was spooled. The span's status must not be an error.
fn why_spooled(producer: &Span) -> &str {
    assert_eq!(producer.attributes["throughline.publish.outcome"], "spooled", "{producer:#?}");
    assert_eq!(producer.status, "UNSET");
    // api contacted no broker.
    assert!(!producer.attributes.contains_key("network.peer.address"), "{producer:#?}");
    let spooled = producer.events.iter().find(|(name, _)| name == "spooled");
    &spooled.expect("an event").1["throughline.spool.reason"]
}

fn assert_confirmed(producer: &Span) {
    assert_eq!(producer.attributes["throughline.publish.outcome"], "confirmed", "{producer:#?}");
    assert_eq!(producer.events, []);
}

async fn ready(stack: &Stack) -> Result<(u16, Value)> {
    let answer = stack.client.get(&format!("http://{}/readyz", stack.api.address)).await?;
    let mut body = answer.json();
    // The size and the age of the spool's content vary.
    for varying in ["spooledBytes", "oldestSeconds"] {
        body.as_object_mut().context("an object")?.remove(varying).context(varying)?;
    }
    Ok((answer.status.as_u16(), body))
}

/// Waits until `/readyz` says that api is ready, with these values of `broker` and `spooled`. A single try
/// may fail, because usercenter has only one second to answer api.
async fn ready_with(stack: &Stack, broker: bool, spooled: u64) -> Result<()> {
    let expected = json!({"usercenter": true, "broker": broker, "topology": true, "spool": true, "spooled": spooled, "stopping": false});
    let told = poll(PATIENCE, async || (ready(stack).await.ok()? == (200, expected.clone())).then_some(()));
    told.await.with_context(|| format!("/readyz does not answer {expected}:\n{}", stack.api.output()))
}

/// Waits until the spool is empty and the broker confirms the next login.
async fn normal_again(stack: &Stack) -> Result<()> {
    ready_with(stack, true, 0).await?;
    assert_confirmed(&delivered(stack, &login(stack).await?).await);
    Ok(())
}

/// Returns the trace ids of the messages in the queue, in order and without duplicates. The messages stay in
/// the queue.
async fn trace_ids(broker: &TestBroker) -> Result<Vec<String>> {
    let (queue, options) = (broker.topology.queue.as_str(), BasicGetOptions::default());
    let (mut trace_ids, mut messages) = (Vec::new(), Vec::new());
    while let Some(message) = broker.channel.basic_get(queue.into(), options).await? {
        let headers = message.properties.headers().clone().unwrap_or_default();
        let Some(AMQPValue::LongString(traceparent)) = headers.inner().get("traceparent") else {
            anyhow::bail!("{headers:?}");
        };
        let trace_id = traceparent.to_string().split('-').nth(1).context("a trace id")?.to_owned();
        if !trace_ids.contains(&trace_id) {
            trace_ids.push(trace_id);
        }
        messages.push(message);
    }
    for message in messages {
        message.nack(BasicNackOptions { requeue: true, multiple: false }).await?;
    }
    Ok(trace_ids)
}

/// Returns the warnings and errors in api's log.
fn complaints(stack: &Stack) -> Vec<String> {
    let output = stack.api.output();
    output.lines().filter(|line| line.contains("WARN") || line.contains("ERROR")).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn logins_of_an_outage_are_delivered_in_order_each_in_its_own_trace() -> Result<()> {
    let (mut stack, proxy) = Stack::start_with_proxy(&[]).await?;
    // The messages stay in the queue until another mq is started.
    stack.mq.stop().await?;
    let mut logins = vec![login(&stack).await?];
    proxy.refuse();
    for _ in 0..40 {
        logins.push(login(&stack).await?);
    }
    ready_with(&stack, false, 40).await?;
    assert!(complaints(&stack).len() < 10, "{:#?}", complaints(&stack));

    proxy.restore();
    for _ in 0..40 {
        logins.push(login(&stack).await?);
    }
    ready_with(&stack, true, 0).await?;
    let answered: Vec<String> = logins.iter().map(Answer::trace_id).collect();
    assert_eq!(trace_ids(&stack.broker).await?, answered);

    let _mq = stack.another("mq", &[]).await?;
    normal_again(&stack).await?;
    for (number, login) in logins.iter().enumerate() {
        let producer = delivered(&stack, login).await;
        match number {
            0 => assert_confirmed(&producer),
            1..=40 => assert!(["connection_broken", "not_connected"].contains(&why_spooled(&producer))),
            _ => {}
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_broker_at_the_start_logins_are_taken_and_delivered_when_it_comes() -> Result<()> {
    let mut stack = Stack::start(&[]).await?;
    let (proxy, url) = stack.broker.proxy()?;
    proxy.refuse();
    stack.api = stack.another("api", &[("AMQP_URL", &url)]).await?;
    stack.api.said("can't connect to the broker").await?;
    ready_with(&stack, false, 0).await?;
    let login = login(&stack).await?;
    assert_eq!(why_spooled(&producer(&stack, &login).await), "not_connected");
    proxy.restore();
    normal_again(&stack).await?;
    delivered(&stack, &login).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_cut_under_load_costs_nothing() -> Result<()> {
    let (stack, proxy) = Stack::start_with_proxy(&[]).await?;
    let mut logins = Vec::new();
    for round in 0..5 {
        let cut = async {
            if round > 0 {
                proxy.cut();
            }
            Ok(())
        };
        let load = async {
            let logins = (0..20).map(|_| login(&stack));
            futures_util::future::try_join_all(logins).await
        };
        let (load, ()) = tokio::try_join!(load, cut)?;
        logins.extend(load);
    }
    normal_again(&stack).await?;
    for login in &logins {
        let trace = login.trace_id();
        // A login whose confirm was cut off is delivered twice, so its trace may have two consumer spans.
        stack.receiver.expect_span(|span| span.trace_id == trace && span.kind == "CONSUMER").await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_network_delays_one_round_of_logins_and_no_more() -> Result<()> {
    let (stack, proxy) = Stack::start_with_proxy(&[("api", "PUBLISH_TIMEOUT", "3s")]).await?;
    login(&stack).await?;
    proxy.freeze();
    let start = Instant::now();
    let first = login(&stack).await?;
    assert!(start.elapsed() > Duration::from_millis(2900), "{:?}", start.elapsed());
    assert_eq!(why_spooled(&producer(&stack, &first).await), "timeout");

    let mut later = Vec::new();
    for _ in 0..10 {
        later.push(login(&stack).await?);
    }
    assert_eq!(ready(&stack).await?.1["broker"], false);

    proxy.restore();
    normal_again(&stack).await?;
    // None of these logins waited for a confirm.
    for login in &later {
        assert_eq!(why_spooled(&delivered(&stack, login).await), "not_connected");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_does_not_wait_for_a_round_of_the_spool_that_another_one_will_follow() -> Result<()> {
    let mut stack = Stack::start(&[]).await?;
    let (proxy, url) = stack.broker.amqp_proxy()?;
    stack.api = stack.another("api", &[("AMQP_URL", &url)]).await?;
    stack.api.said("connected to the broker").await?;
    proxy.refuse();
    for _ in 0..2 {
        login(&stack).await?;
    }
    let confirm = proxy.withhold(Side::Server, BASIC_ACK);
    // This call lets all bytes pass again. `restore` would also make the proxy forget which method to
    // withhold.
    proxy.slow_down(Duration::ZERO);
    timeout(PATIENCE, confirm).await.context("no round")??;
    // The first round publishes only one login, so api doesn't know yet whether the spool has more logins.
    let behind = login(&stack).await?;
    assert_eq!(why_spooled(&producer(&stack, &behind).await), "behind_spool");
    proxy.cut();
    normal_again(&stack).await
}

/// This test runs only on the embedded broker, because an alarm of RabbitMQ would affect all its clients.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_short_of_memory_gets_logins_when_it_takes_them_again() -> Result<()> {
    let stack = Stack::start_on(TestBroker::embedded().await?, &[]).await?;
    login(&stack).await?;
    stack.broker.set_alarm(true);
    let mut logins = Vec::new();
    for _ in 0..5 {
        logins.push(login(&stack).await?);
    }
    stack.api.said("the broker is not taking messages at the moment").await?;
    assert_eq!(ready(&stack).await?.1["broker"], false);

    stack.broker.set_alarm(false);
    normal_again(&stack).await?;
    // None of these logins waited for the time-out.
    for login in &logins {
        let login = producer(&stack, login).await;
        assert_eq!(why_spooled(&login), "blocked");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_deleted_on_the_broker_is_declared_again_by_the_publisher() -> Result<()> {
    let mut stack = Stack::start(&[("api", "RUST_LOG", "info,lapin=info")]).await?;
    // mq is stopped because it would also declare the queue.
    stack.mq.stop().await?;
    let topology = &stack.broker.topology;
    // The publisher needs the main queue, and the main queue sends dropped messages to the dead-letter queue.
    for queue in [&topology.queue, &topology.dead_letter_queue] {
        let options = QueueDeleteOptions::default();
        stack.broker.channel.queue_delete(queue.as_str().into(), options).await?;
    }
    let login = login(&stack).await?;
    assert_eq!(why_spooled(&producer(&stack, &login).await), "unroutable");
    ready_with(&stack, true, 0).await?;
    assert_eq!(trace_ids(&stack.broker).await?, [login.trace_id()]);
    let dead = stack.broker.topology.dead_letter_queue.as_str();
    stack.broker.channel.basic_get(dead.into(), BasicGetOptions::default()).await?;
    // lapin itself would log a returned message with its body, but the log filter always drops such a line.
    assert!(!stack.api.output().contains("BasicReturnMessage"), "{}", stack.api.output());
    Ok(())
}

/// This test runs only on the embedded broker, because policies of RabbitMQ need its command line.
#[tokio::test(flavor = "multi_thread")]
async fn logins_that_a_full_queue_refuses_are_kept_and_offered_again_without_a_word_each_time() -> Result<()>
{
    let mut stack = Stack::start_on(TestBroker::embedded().await?, &[]).await?;
    stack.mq.stop().await?;
    stack.broker.set_longest_queue(Some(1));
    login(&stack).await?;
    let refused = login(&stack).await?;
    assert_eq!(why_spooled(&producer(&stack, &refused).await), "nacked");
    // Each time api connects again, the broker refuses the login again. api stays connected only for a
    // moment, so this test checks only `spooled`, and not `broker`.
    stack.api.said("the broker refused the message").await?;
    assert_eq!(ready(&stack).await?.1["spooled"], 1);
    assert!(complaints(&stack).len() < 5, "{:#?}", complaints(&stack));
    // The first connection published a login, and the second published none. api logs the loss of these two
    // connections. It does not log the loss of later connections, because they publish nothing either.
    let losses = || stack.api.output().matches("lost the connection to the broker").count();
    poll(PATIENCE, async || (losses() == 2).then_some(())).await.context("the second loss is not logged")?;

    stack.broker.set_longest_queue(None);
    let _mq = stack.another("mq", &[]).await?;
    delivered(&stack, &refused).await;
    normal_again(&stack).await?;
    assert_eq!(losses(), 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_whose_time_is_over_while_the_broker_is_silent_says_so_in_every_span() -> Result<()> {
    let (stack, proxy) = Stack::start_with_proxy(&[("api", "API_DEADLINE", "5s")]).await?;
    // This login opens the connection to usercenter.
    login(&stack).await?;
    proxy.freeze();
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_eq!(answer.status, 504);
    let tree = "
        api POST /usercenter/v1/user/login SERVER ERROR error.type=deadline_exceeded
          api usercenter.v1.Usercenter/GetUserByMobile CLIENT
            usercenter usercenter.v1.Usercenter/GetUserByMobile SERVER
          api local INTERNAL
          api send_msg_mq PRODUCER ERROR error.type=cancelled
    ";
    stack.receiver.expect_tree(&answer.trace_id(), tree).await;
    proxy.restore();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn logins_share_one_connection_to_the_broker() -> Result<()> {
    let (stack, proxy) = Stack::start_with_proxy(&[]).await?;
    // From now on, every new connection through the proxy fails.
    proxy.lead_to("127.0.0.1:1".parse()?);
    for _ in 0..20 {
        let answer = stack.login(KNOWN_MOBILE, &[]).await?;
        let spans = stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
        let producer = spans.iter().find(|span| span.kind == "PRODUCER").expect("a producer's span");
        assert_eq!(producer.attributes["throughline.publish.outcome"], "confirmed");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_round_is_overdue_other_logins_go_to_the_spool_and_hold_no_place() -> Result<()> {
    let mut stack = Stack::start(&[]).await?;
    let (proxy, url) = stack.broker.amqp_proxy()?;
    // During the test, neither the confirm's time-out nor a heartbeat ends the silence.
    let url = format!("{url}?heartbeat=600");
    let variables = [("AMQP_URL", url.as_str()), ("PUBLISH_TIMEOUT", "10s"), ("API_MAX_IN_FLIGHT", "3")];
    stack.api = stack.another("api", &variables).await?;
    stack.api.said("connected to the broker").await?;
    let unconfirmed = proxy.withhold(Side::Server, BASIC_ACK);
    let first = stack.login(KNOWN_MOBILE, &[]);
    tokio::pin!(first);
    let others = async {
        unconfirmed.await?;
        for _ in 0..5 {
            let (one, other) =
                tokio::try_join!(stack.login(KNOWN_MOBILE, &[]), stack.login(KNOWN_MOBILE, &[]))?;
            for login in [one, other] {
                assert_eq!(login.status, 200, "{:?}", login.json());
            }
        }
        anyhow::Ok(())
    };
    tokio::select! {
        biased;
        answer = &mut first => panic!("the others waited for the end of the round: {:?}", answer?.json()),
        done = others => done?,
    }
    assert_eq!(first.await?.status, 200);
    Ok(())
}
