//! If the broker is away, cut off, frozen or short of memory, mq stays up, reports the outage, and resumes
//! afterwards.

use anyhow::{Context, Result};
use harness::{
    PATIENCE,
    database::Database,
    poll,
    proxy::Proxy,
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack, TestBroker},
};
use lapin::{BasicProperties, options::QueueDeclareOptions, types::FieldTable};
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// Starts all services, with a proxy between mq and the broker. The test uses the proxy to disturb mq's
/// connections.
async fn with_proxy(database: &Database) -> Result<(Stack, Proxy)> {
    let broker = TestBroker::connect().await?;
    let (proxy, url) = broker.proxy()?;
    // mq notices a frozen network after two heartbeat intervals, so the test sets the shortest interval.
    let url = format!("{url}?heartbeat=1");
    let variables = [("mq", "AMQP_URL", url.as_str()), ("mq", "MQ_DATABASE_URL", &database.url)];
    Ok((Stack::start_on(broker, &variables).await?, proxy))
}

#[tokio::test(flavor = "multi_thread")]
async fn after_cuts_a_frozen_network_and_an_absence_it_resumes_and_nothing_is_lost_or_applied_twice()
-> Result<()> {
    let database = Database::new()?;
    let (stack, proxy) = with_proxy(&database).await?;
    let mut logins = Vec::new();
    let mut login = async || -> Result<()> {
        let answer = stack.login(KNOWN_MOBILE, &[]).await?;
        assert_eq!(answer.status, 200);
        logins.push(answer.trace_id());
        Ok(())
    };
    for _ in 0..3 {
        login().await?;
        proxy.cut();
        login().await?;
        stack.mq.becomes(true).await?;
    }

    proxy.freeze();
    login().await?;
    stack.mq.becomes(false).await?;
    proxy.restore();
    stack.mq.becomes(true).await?;

    // However often mq tries to connect, it logs only once that it can't connect.
    let complaints = || stack.mq.output().matches("can't connect to the broker").count();
    let earlier = complaints();
    proxy.refuse();
    stack.mq.becomes(false).await?;
    for _ in 0..5 {
        login().await?;
    }
    sleep(Duration::from_secs(3)).await;
    assert!(complaints() - earlier <= 1, "{}", stack.mq.output());
    proxy.restore();
    stack.mq.becomes(true).await?;

    let count = logins.len() as i64;
    let all =
        poll(PATIENCE, async || (database.logins(KNOWN_MOBILE).await.ok()? == (count, count)).then_some(()));
    assert!(
        all.await.is_some(),
        "{:?} of {count}:\n{}",
        database.logins(KNOWN_MOBILE).await,
        stack.mq.output()
    );
    for trace_id in &logins {
        let is_it = |span: &harness::trace::Span| {
            span.trace_id == *trace_id
                && span.attributes.get("throughline.message.outcome").is_some_and(|o| o == "applied")
        };
        stack.receiver.expect_span(is_it).await;
    }
    // mq logs one or two lines for each outage, not for each attempt to connect.
    let output = stack.mq.output();
    let complaints = output.lines().filter(|line| line.contains("WARN") || line.contains("ERROR"));
    assert!(complaints.count() <= 12, "{output}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_broker_takes_no_messages_those_that_do_not_fail_are_applied_and_acknowledged() -> Result<()>
{
    const BAD: &str = "13800138001";

    let database = Database::new()?;
    let variables = [("mq", "MQ_DATABASE_URL", &*database.url), ("mq", "MQ_RETRY_DELAYS", "none")];
    // An alarm affects every client of a broker, so the test raises the alarm on a broker of its own.
    let mut stack = Stack::start_on(TestBroker::embedded().await?, &variables).await?;
    stack.mq.said("the database is available").await?;
    database.poison(BAD).await?;
    stack.mq.stop().await?;
    for i in 0..200 {
        let mobile = if i == 3 { BAD } else { KNOWN_MOBILE };
        let properties = BasicProperties::default().with_message_id(format!("{i}").into());
        stack.publish(properties, format!(r#"{{"Msg":"{mobile}"}}"#).as_bytes()).await?;
    }
    // The broker answers this declaration, on the same channel, only after it has received all messages.
    let (queue, passive) =
        (&stack.broker.topology.queue, QueueDeclareOptions { passive: true, ..Default::default() });
    let queue =
        stack.broker.channel.queue_declare(queue.as_str().into(), passive, FieldTable::default()).await?;
    assert_eq!(queue.message_count(), 200);

    stack.broker.set_alarm(true);
    let variables = [("MQ_DATABASE_URL", database.url.as_str()), ("MQ_RETRY_DELAYS", "none")];
    let mq = stack.another("mq", &variables).await?;
    // More messages are applied than may be unacknowledged at a time, so mq must have acknowledged some of
    // them.
    let applied =
        poll(PATIENCE, async || (database.logins(KNOWN_MOBILE).await.ok()? == (199, 199)).then_some(()));
    assert!(applied.await.is_some(), "{:?}\n{}", database.logins(KNOWN_MOBILE).await, mq.output());
    mq.becomes(true).await?;
    let is_bad = |span: &&harness::trace::Span| span.attributes["messaging.message.id"] == "3";
    assert_eq!(stack.receiver.spans().iter().find(is_bad), None);

    // Without an alarm, mq would not wait this long for a confirm.
    sleep(Duration::from_secs(6)).await;
    stack.broker.set_alarm(false);
    let letter = stack.dead_letter().await?;
    assert_eq!(letter.properties.message_id().as_ref().map(|id| id.as_str()), Some("3"));
    // The dead letter was published only once, although mq had to wait until the alarm was over.
    stack.receiver.expect_span(|span| is_bad(&span)).await;
    let queue = stack.broker.topology.dead_letter_queue.as_str();
    let another = stack.broker.channel.basic_get(queue.into(), Default::default()).await?;
    assert_eq!(another, None);

    // If the alarm is over before the next message fails, the dead letter of this message is not published
    // twice either.
    stack.broker.set_alarm(true);
    let told = poll(PATIENCE, async || stack.broker.is_blocked().then_some(())).await;
    assert!(told.is_some());
    stack.broker.set_alarm(false);
    let properties = BasicProperties::default().with_message_id("later".into());
    stack.publish(properties, format!(r#"{{"Msg":"{BAD}"}}"#).as_bytes()).await?;
    stack.dead_letter().await?;
    stack.receiver.expect_span(|span| span.attributes["messaging.message.id"] == "later").await;
    let another = stack.broker.channel.basic_get(queue.into(), Default::default()).await?;
    assert_eq!(another, None);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn while_it_waits_for_its_database_mq_notices_that_its_connection_is_gone() -> Result<()> {
    let database = Database::new()?;
    let (stack, proxy) = with_proxy(&database).await?;
    let lock = database.lock().await?;
    stack.login(KNOWN_MOBILE, &[]).await?;
    // mq has received the message, and is waiting for the database.
    stack.mq.said("the database is unavailable").await?;
    proxy.cut();
    stack.mq.said("lost the connection to the broker").await?;
    let again = poll(PATIENCE, async || (stack.mq.output().matches(" consuming").count() == 2).then_some(()));
    again.await.with_context(|| stack.mq.output())?;

    drop(lock);
    let applied =
        poll(PATIENCE, async || (database.logins(KNOWN_MOBILE).await.ok()? == (1, 1)).then_some(()));
    applied.await.with_context(|| stack.mq.output())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_comes_later_is_consumed_from() -> Result<()> {
    let database = Database::new()?;
    let (mut stack, proxy) = with_proxy(&database).await?;
    stack.mq.kill().await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    proxy.refuse();
    let url = stack.broker.url_by(proxy.address)?;
    let mq = stack.another("mq", &[("AMQP_URL", &url), ("MQ_DATABASE_URL", &database.url)]).await?;
    mq.said("can't connect to the broker").await?;
    assert!(!mq.is_healthy().await?);
    proxy.restore();
    stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    mq.becomes(true).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pauses_grow_while_each_connection_is_lost_at_once() -> Result<()> {
    let database = Database::new()?;
    let (stack, proxy) = with_proxy(&database).await?;
    let start = Instant::now();
    for lost in 1..=5 {
        proxy.cut();
        let again = poll(PATIENCE, async || {
            let consuming = stack.mq.output().lines().filter(|line| line.contains("consuming")).count();
            (consuming > lost).then_some(())
        });
        again
            .await
            .with_context(|| format!("mq does not consume again after cut {lost}:\n{}", stack.mq.output()))?;
    }
    // Each pause lasts at least half of its nominal time. The pauses become short again only after a
    // connection that lasted longer than two seconds.
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(50 + 100 + 200 + 400 + 800), "{took:?}");
    Ok(())
}
