//! Messages are delivered at least once and applied exactly once, even if they are delivered twice, if mq dies
//! in between, or if the database makes them wait.

use anyhow::{Context, Result};
use harness::{
    PATIENCE,
    database::Database,
    poll,
    process::Process,
    proxy::{BASIC_ACK, Side},
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack},
};
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable},
};
use std::time::Duration;
use tokio::time::{sleep, timeout};

const BODY: &[u8] = br#"{"Msg":"13800138000"}"#;

async fn stack() -> Result<(Stack, Database)> {
    let database = Database::new()?;
    let stack = Stack::start(&[("mq", "MQ_DATABASE_URL", &database.url)]).await?;
    stack.mq.said("the database is available").await?;
    Ok((stack, database))
}

/// Waits for at least `count` consumer spans. Returns their outcomes in the order of their start.
async fn outcomes(stack: &Stack, count: usize) -> Vec<String> {
    let seen = poll(PATIENCE, async || {
        let mut spans = stack.receiver.spans();
        spans.retain(|span| span.kind == "CONSUMER");
        spans.sort_by_key(|span| span.start);
        (spans.len() >= count).then_some(spans)
    });
    let spans = seen.await.expect("spans");
    spans
        .into_iter()
        .map(|mut span| span.attributes.remove("throughline.message.outcome").unwrap_or_default())
        .collect()
}

async fn is_healthy(mq: &Process) -> Result<bool> {
    let address = mq.address.to_string();
    Ok(Process::command("mq", &[])?.args(["health", "--listen", &address]).output().await?.status.success())
}

async fn becomes(mq: &Process, healthy: bool) -> Result<()> {
    let as_expected = poll(PATIENCE, async || (is_healthy(mq).await.ok()? == healthy).then_some(())).await;
    as_expected.with_context(|| format!("health does not become {healthy}:\n{}", mq.output()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_comes_twice_is_applied_once() -> Result<()> {
    let (stack, database) = stack().await?;
    for _ in 0..3 {
        stack.publish(BasicProperties::default().with_message_id("same".into()), BODY).await?;
    }
    assert_eq!(outcomes(&stack, 3).await, ["applied", "duplicate", "duplicate"]);
    assert_eq!(database.logins(KNOWN_MOBILE).await?, (1, 1));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_id_the_producer_span_tells_messages_apart() -> Result<()> {
    let (stack, database) = stack().await?;
    for span in ["00f067aa0ba902b7", "00f067aa0ba902b7", "1111111111111111"] {
        let mut headers = FieldTable::default();
        let traceparent = format!("00-4bf92f3577b34da6a3ce929d0e0e4736-{span}-01");
        headers.insert("traceparent".into(), AMQPValue::LongString(traceparent.into()));
        stack.publish(BasicProperties::default().with_headers(headers), BODY).await?;
    }
    assert_eq!(outcomes(&stack, 3).await, ["applied", "duplicate", "applied"]);
    // Messages without any id can't be recognized as duplicates. An empty id is no id.
    for _ in 0..2 {
        stack.publish(BasicProperties::default(), BODY).await?;
        stack.publish(BasicProperties::default().with_message_id("".into()), BODY).await?;
    }
    assert_eq!(outcomes(&stack, 7).await[3..], ["applied"; 4]);
    assert_eq!(database.logins(KNOWN_MOBILE).await?, (6, 6));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_history_leads_to_the_trace() -> Result<()> {
    let (stack, database) = stack().await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    let spans = stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    let producer = spans.iter().find(|span| span.kind == "PRODUCER").expect("producer span");
    let row = "SELECT message_id, trace_id, mobile FROM login_history";
    let (id, trace, mobile): (String, String, String) =
        sqlx::query_as(row).fetch_one(&mut database.connect().await?).await?;
    assert_eq!(Some(&id), producer.attributes.get("messaging.message.id"));
    assert_eq!((trace, mobile.as_str()), (answer.trace_id(), KNOWN_MOBILE));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_again_and_again_under_load_it_applies_each_login_once() -> Result<()> {
    const MESSAGES: i64 = 3000;
    const KILLS: usize = 6;

    let (mut stack, database) = stack().await?;
    stack.mq.kill().await?;
    for i in 0..MESSAGES {
        stack.publish(BasicProperties::default().with_message_id(format!("{i}").into()), BODY).await?;
    }
    let variables = [("MQ_DATABASE_URL", database.url.as_str()), ("RUST_LOG", "info,mq::processing=warn")];
    // Over a slow network, mq gets few messages at a time. So some messages are left for the last kill, however
    // late the kills come.
    let (slow, slow_url) = stack.broker.proxy()?;
    slow.slow_down(Duration::from_millis(50));
    let slowly = [&variables[..], &[("AMQP_URL", slow_url.as_str()), ("MQ_PREFETCH", "16")]].concat();
    let mut killed_at = Vec::new();
    for i in 0..KILLS {
        let mut mq = stack.another("mq", &slowly).await?;
        // Each kill interrupts mq at its work, a little later each time.
        let before = database.logins(KNOWN_MOBILE).await?.0;
        let begun =
            poll(PATIENCE, async || (database.logins(KNOWN_MOBILE).await.ok()?.0 > before).then_some(()));
        assert!(begun.await.is_some(), "{}", mq.output());
        sleep(Duration::from_millis(23 * i as u64)).await;
        mq.kill().await?;
        killed_at.push(database.logins(KNOWN_MOBILE).await?.0);
    }
    // The last kill comes between the commit and the acknowledgement.
    let (proxy, url) = stack.broker.amqp_proxy()?;
    let acknowledging = proxy.withhold(Side::Client, BASIC_ACK);
    let through_proxy = [&variables[..], &[("AMQP_URL", url.as_str())]].concat();
    let mut mq = stack.another("mq", &through_proxy).await?;
    timeout(PATIENCE, acknowledging).await.context("no acknowledgement")??;
    mq.kill().await?;
    killed_at.push(database.logins(KNOWN_MOBILE).await?.0);
    proxy.cut();
    assert!(killed_at.iter().all(|done| *done < MESSAGES), "{killed_at:?}");
    let mq = stack.another("mq", &variables).await?;
    let done =
        poll(PATIENCE, async || (database.logins(KNOWN_MOBILE).await.ok()?.0 >= MESSAGES).then_some(()));
    assert!(done.await.is_some(), "{:?} {}", database.logins(KNOWN_MOBILE).await, mq.output());
    // Messages that were applied but not acknowledged were delivered twice.
    let is_duplicate = |outcome: &String| outcome == "duplicate";
    let twice = poll(PATIENCE, async || outcomes(&stack, 1).await.iter().any(is_duplicate).then_some(()));
    twice.await.expect("a duplicate");
    assert_eq!(database.logins(KNOWN_MOBILE).await?, (MESSAGES, MESSAGES));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_database_is_locked_messages_wait_and_health_says_so() -> Result<()> {
    let (stack, database) = stack().await?;
    becomes(&stack.mq, true).await?;
    let lock = database.lock().await?;
    let mut answers = Vec::new();
    for _ in 0..5 {
        answers.push(stack.login(KNOWN_MOBILE, &[]).await?);
    }
    becomes(&stack.mq, false).await?;
    // This pause is long enough for several attempts to open the database.
    sleep(Duration::from_secs(4)).await;
    assert!(stack.receiver.spans().iter().all(|span| span.kind != "CONSUMER"));

    drop(lock);
    for answer in answers {
        let spans = stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
        let span = spans.iter().find(|span| span.kind == "CONSUMER").expect("consumer span");
        assert_eq!(span.attributes["throughline.message.attempt"], "1");
    }
    assert_eq!(database.logins(KNOWN_MOBILE).await?, (5, 5));
    becomes(&stack.mq, true).await?;
    // mq logs this warning once, not for each attempt.
    let output = stack.mq.output();
    assert_eq!(output.matches("the database is unavailable").count(), 1, "{output}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_cannot_be_opened_is_waited_for() -> Result<()> {
    let (stack, _) = stack().await?;
    let directory = tempfile::TempDir::new()?;
    // There is a file where the folder should be.
    let folder = directory.path().join("data");
    std::fs::write(&folder, "")?;
    let url = format!("sqlite://{}/mq.db", folder.display());
    let mq = stack.another("mq", &[("MQ_DATABASE_URL", &url)]).await?;
    mq.said("the database is unavailable").await?;
    assert!(!is_healthy(&mq).await?);
    std::fs::remove_file(&folder)?;
    mq.said("the database is available").await?;
    becomes(&mq, true).await
}
