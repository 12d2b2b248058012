//! Messages are delivered at least once and applied exactly once, even if they are delivered twice, if mq is
//! killed while it processes them, or if they must wait for the database.

use anyhow::{Context, Result};
use harness::{
    PATIENCE,
    database::Database,
    poll,
    proxy::{BASIC_ACK, Side},
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack},
    trace::Span,
};
use lapin::{
    BasicProperties,
    options::{
        BasicGetOptions, BasicNackOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};
use std::{fs::Permissions, os::unix::fs::PermissionsExt, time::Duration};
use tokio::time::{sleep, timeout};

const BODY: &[u8] = br#"{"Msg":"13800138000"}"#;

async fn stack() -> Result<(Stack, Database)> {
    let database = Database::new()?;
    let stack = Stack::start(&[("mq", "MQ_DATABASE_URL", &database.url)]).await?;
    stack.mq.said("the database is available").await?;
    Ok((stack, database))
}

/// Waits for at least `count` consumer spans. Returns their outcomes in the order in which the spans started.
async fn outcomes(stack: &Stack, count: usize) -> Vec<String> {
    let spans = consumers(stack, count).await;
    spans
        .into_iter()
        .map(|mut span| span.attributes.remove("throughline.message.outcome").unwrap_or_default())
        .collect()
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
async fn without_an_id_the_producer_span_and_the_content_tell_messages_apart() -> Result<()> {
    let (stack, database) = stack().await?;
    // Logins of three people are published in one span, and the login of the first person is published twice
    // in this span. One more login of the first person is published in another span.
    let other = "13800138001";
    for (span, mobile) in [
        ("00f067aa0ba902b7", KNOWN_MOBILE),
        ("00f067aa0ba902b7", other),
        ("00f067aa0ba902b7", "13800138002"),
        ("00f067aa0ba902b7", KNOWN_MOBILE),
        ("1111111111111111", KNOWN_MOBILE),
    ] {
        let mut headers = FieldTable::default();
        let traceparent = format!("00-4bf92f3577b34da6a3ce929d0e0e4736-{span}-01");
        headers.insert("traceparent".into(), AMQPValue::LongString(traceparent.into()));
        let body = format!(r#"{{"Msg":"{mobile}"}}"#);
        stack.publish(BasicProperties::default().with_headers(headers), body.as_bytes()).await?;
    }
    let mut seen = outcomes(&stack, 5).await;
    seen.sort();
    assert_eq!(seen, ["applied", "applied", "applied", "applied", "duplicate"]);
    assert_eq!(database.logins(KNOWN_MOBILE).await?, (2, 2));
    assert_eq!(database.logins(other).await?, (1, 1));
    // Messages without any id can't be recognized as duplicates. An empty id counts as no id.
    for _ in 0..2 {
        stack.publish(BasicProperties::default(), BODY).await?;
        stack.publish(BasicProperties::default().with_message_id("".into()), BODY).await?;
    }
    assert_eq!(outcomes(&stack, 9).await[5..], ["applied"; 4]);
    assert_eq!(database.logins(KNOWN_MOBILE).await?, (6, 6));
    Ok(())
}

/// Waits for at least `count` consumer spans. Returns them in the order in which they started.
async fn consumers(stack: &Stack, count: usize) -> Vec<Span> {
    let seen = poll(PATIENCE, async || {
        let mut spans = stack.receiver.spans();
        spans.retain(|span| span.kind == "CONSUMER");
        spans.sort_by_key(|span| span.start);
        (spans.len() >= count).then_some(spans)
    });
    seen.await.expect("spans")
}

#[tokio::test(flavor = "multi_thread")]
async fn logins_that_come_soon_after_a_commit_gather_and_a_lone_one_does_not_wait() -> Result<()> {
    let stack = Stack::start(&[("mq", "MQ_COMMIT_INTERVAL", "1s")]).await?;
    let of = |span: &Span, attribute: &str| -> u64 { span.attributes[attribute].parse().expect("a number") };
    stack.publish(BasicProperties::default().with_message_id("alone".into()), BODY).await?;
    let alone = &consumers(&stack, 1).await[0];
    assert_eq!(of(alone, "throughline.chunk.pause_ms"), 0, "{alone:#?}");
    // The test publishes one message after another, so some messages arrive less than a second after a
    // commit.
    let gathered = poll(PATIENCE, async || {
        stack.publish(BasicProperties::default(), BODY).await.ok()?;
        let spans = consumers(&stack, 1).await;
        let mut gathered = spans.iter().filter(|span| of(span, "throughline.chunk.pause_ms") > 0);
        gathered.any(|span| of(span, "throughline.chunk.size") > 1).then_some(())
    });
    gathered.await.context("no chunk gathered")
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_are_redelivered_once_are_processed_together() -> Result<()> {
    let (mut stack, database) = stack().await?;
    stack.mq.stop().await?;
    for i in 0..64 {
        stack.publish(BasicProperties::default().with_message_id(format!("{i}").into()), BODY).await?;
    }
    // The test takes all messages and returns them to the queue, like a consumer whose connection was cut.
    let queue = stack.broker.topology.queue.as_str();
    let mut last = None;
    while let Some(got) = stack.broker.channel.basic_get(queue.into(), BasicGetOptions::default()).await? {
        last = Some(got);
    }
    last.context("messages")?.nack(BasicNackOptions { requeue: true, multiple: true }).await?;
    let _mq = stack.another("mq", &[("MQ_DATABASE_URL", &database.url)]).await?;
    let spans = consumers(&stack, 64).await;
    let overlapping = spans.windows(2).filter(|pair| pair[1].start < pair[0].end).count();
    assert!(overlapping > 32, "only {overlapping} of 63 spans began before the previous span ended");
    assert_eq!(database.logins(KNOWN_MOBILE).await?, (64, 64));
    let counts = "SELECT COUNT(*) FROM redelivery_count";
    let counts: i64 = sqlx::query_scalar(counts).fetch_one(&mut database.connect().await?).await?;
    assert_eq!(counts, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_without_id_and_context_that_kills_mq_each_time_is_given_up_and_stops_no_other()
-> Result<()> {
    const DEADLY: &str = "13800138001";

    let (mut stack, database) = stack().await?;
    database.hang(DEADLY).await?;
    stack.mq.stop().await?;
    // The deadly message is the first message, so it is in the first chunk each time, however large the chunk
    // is.
    let deadly = format!(r#"{{"Msg":"{DEADLY}"}}"#);
    stack.publish(BasicProperties::default(), deadly.as_bytes()).await?;
    let publish =
        async |id: &str| stack.publish(BasicProperties::default().with_message_id(id.into()), BODY).await;
    for i in 0..9 {
        publish(&i.to_string()).await?;
    }
    let variables = [("MQ_DATABASE_URL", database.url.as_str())];
    let mut connection = database.connect().await?;
    sqlx::query("PRAGMA busy_timeout = 0").execute(&mut connection).await?;
    let highest = "SELECT COALESCE(MAX(redeliveries), 0) FROM redelivery_count";
    // At the first delivery, mq counts nothing. At the second delivery, mq marks all messages of the chunk as
    // redelivered, and processes them together again. From the third delivery on, mq processes these messages
    // one at a time, beginning with the messages that have the fewest redeliveries.
    for expected in 0..=3 {
        if expected == 3 {
            // When mq acknowledges this new message, it must not acknowledge the earlier messages.
            publish("new").await?;
        }
        let mut mq = stack.another("mq", &variables).await?;
        mq.said(" consuming").await?;
        let mut seen = 0;
        let reached = poll(PATIENCE, async || {
            seen = sqlx::query_scalar::<_, i64>(highest).fetch_one(&mut connection).await.ok()?;
            // A write that fails shows that mq is in the middle of a transaction.
            let is_writing = sqlx::query("DELETE FROM redelivery_count WHERE message_id = ''");
            (seen == expected && is_writing.execute(&mut connection).await.is_err()).then_some(())
        });
        reached.await.with_context(|| format!("{seen} instead of {expected}:\n{}", mq.output()))?;
        mq.kill().await?;
    }
    // mq gives up a message that has more than 20 redeliveries. The test sets the count to 20 instead of
    // killing mq so often.
    let update = "UPDATE redelivery_count SET redeliveries = 20 WHERE redeliveries = 3";
    sqlx::query(update).execute(&mut connection).await?;
    let _mq = stack.another("mq", &variables).await?;
    let letter = stack.dead_letter().await?;
    let headers = letter.properties.headers().as_ref().context("headers")?.inner();
    assert_eq!(headers["x-dead-letter-reason"], AMQPValue::LongString("redelivered_too_often".into()));
    let all = async || (database.logins(KNOWN_MOBILE).await.ok()? == (10, 10)).then_some(());
    poll(PATIENCE, all).await.context("not all other messages are applied")?;
    let all = async || {
        let count =
            sqlx::query_scalar("SELECT COUNT(*) FROM redelivery_count").fetch_one(&mut connection).await;
        (count.ok() == Some(0_i64)).then_some(())
    };
    poll(PATIENCE, all).await.context("a count of redeliveries is left")
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
    // Over a slow network, mq gets few messages at a time. So some messages are left for the last kill,
    // however late the kills come.
    let (slow, slow_url) = stack.broker.proxy()?;
    slow.slow_down(Duration::from_millis(50));
    let slowly = [&variables[..], &[("AMQP_URL", slow_url.as_str()), ("MQ_PREFETCH", "16")]].concat();
    let mut killed_at = Vec::new();
    for i in 0..KILLS {
        let mut mq = stack.another("mq", &slowly).await?;
        // Each kill interrupts mq while it is applying messages, a little later than the kill before.
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
    stack.mq.becomes(true).await?;
    let lock = database.lock().await?;
    let mut answers = Vec::new();
    for _ in 0..5 {
        answers.push(stack.login(KNOWN_MOBILE, &[]).await?);
    }
    stack.mq.becomes(false).await?;
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
    stack.mq.becomes(true).await?;
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
    // If the broker outlives a test run, a queue with a fixed prefix would belong to the history of an
    // earlier run.
    let prefix = format!("test.{}.", uuid::Uuid::new_v4().simple());
    let mq = stack.another("mq", &[("MQ_DATABASE_URL", &url), ("AMQP_PREFIX", &prefix)]).await?;
    mq.said("the database is unavailable").await?;
    assert!(!mq.is_healthy().await?);
    std::fs::remove_file(&folder)?;
    mq.said("the database is available").await?;
    mq.becomes(true).await
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_file_of_the_database_is_gone_messages_wait_and_health_says_so() -> Result<()> {
    let (stack, database) = stack().await?;
    stack.login(KNOWN_MOBILE, &[]).await?;
    consumers(&stack, 1).await;
    // The folder is moved away, and mq notices that even while no message arrives.
    let file = database.file();
    let folder = file.parent().context("a folder")?;
    let kept = folder.with_extension("kept");
    std::fs::rename(folder, &kept)?;
    stack.mq.becomes(false).await?;
    stack.mq.said("the database's file was deleted or replaced").await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_eq!(answer.status, 200);
    // mq opens the empty file that now has the database's name, but refuses it, because it holds another history.
    std::fs::create_dir(folder)?;
    std::fs::write(&file, "")?;
    let opened = poll(PATIENCE, async || (std::fs::metadata(&file).ok()?.len() > 0).then_some(()));
    opened.await.context("mq does not open the empty file")?;
    assert!(!stack.mq.is_healthy().await?);
    assert_eq!(consumers(&stack, 1).await.len(), 1);

    std::fs::remove_dir_all(folder)?;
    std::fs::rename(&kept, folder)?;
    stack.mq.becomes(true).await?;
    stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    assert_eq!(database.logins(KNOWN_MOBILE).await?, (2, 2));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_may_read_the_history_wherever_it_is() -> Result<()> {
    let directory = tempfile::TempDir::new()?;
    std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755))?;
    let url = format!("sqlite://{}/mq.db", directory.path().display());
    let _stack = Stack::start(&[("mq", "MQ_DATABASE_URL", &url)]).await?;
    for entry in std::fs::read_dir(directory.path())? {
        let entry = entry?;
        assert_eq!(entry.metadata()?.permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_mq_with_another_history_consumes_nothing_and_says_why_and_one_with_the_same_history_does()
-> Result<()> {
    let (mut stack, database) = stack().await?;
    let another = Database::new()?;
    let refused = stack.another("mq", &[("MQ_DATABASE_URL", &another.url)]).await?;
    let said = refused.said("belongs to another history").await?;
    let claim = format!("{}.history", stack.broker.topology.queue);
    assert!(said.contains("ERROR") && said.contains(&claim), "{said}");
    refused.becomes(false).await?;
    // The refused mq does not consume, even while no other mq is running.
    stack.mq.kill().await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    let mq = stack.another("mq", &[("MQ_DATABASE_URL", &database.url)]).await?;
    stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    let second = stack.another("mq", &[("MQ_DATABASE_URL", &database.url)]).await?;
    mq.becomes(true).await?;
    second.becomes(true).await?;
    assert_eq!((database.logins(KNOWN_MOBILE).await?, another.logins(KNOWN_MOBILE).await?), ((1, 1), (0, 0)));
    assert!(!refused.output().contains(" consuming"), "{}", refused.output());

    // If the history of a queue is lost, an operator deletes the claim, and the queue gets another history.
    let options = ExchangeDeleteOptions::default();
    let channel = &stack.broker.channel;
    channel.exchange_delete(claim.as_str().into(), options).await?;
    refused.becomes(true).await?;
    // Nobody can publish to the claim.
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let (claim, options) = (claim.into(), BasicPublishOptions::default());
    let published = channel.basic_publish(claim, "".into(), options, b"", BasicProperties::default()).await?;
    assert!(published.await.is_err());
    Ok(())
}
