//! `mq dead-letters`: how an operator lists, reads and replays dead letters.

use anyhow::{Context, Result};
use harness::{
    PATIENCE,
    database::Database,
    poll,
    process::Process,
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack},
};
use lapin::{
    BasicProperties,
    options::BasicPublishOptions,
    types::{AMQPValue, FieldTable},
};

/// The command's standard output, its standard error and its exit code.
struct Said {
    out: String,
    err: String,
    code: Option<i32>,
}

async fn dead_letters(stack: &Stack, arguments: &[&str]) -> Result<Said> {
    let endpoint = format!("http://{}", stack.receiver.grpc);
    let variables = [
        ("AMQP_URL", stack.broker.url.as_str()),
        ("AMQP_PREFIX", &stack.broker.prefix),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
    ];
    let mut command = Process::command("mq", &variables)?;
    let output = command.arg("dead-letters").args(arguments).output().await?;
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Ok(Said { out: text(&output.stdout), err: text(&output.stderr), code: output.status.code() })
}

/// Logs in, and waits until the login's message becomes a dead letter. Returns the message's trace id and
/// message id.
async fn dead_login(stack: &Stack) -> Result<(String, String)> {
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    let trace_id = answer.trace_id();
    let dead = stack.receiver.expect_span(|span| {
        span.trace_id == trace_id
            && span
                .attributes
                .get("throughline.message.outcome")
                .is_some_and(|outcome| outcome == "dead_letter")
    });
    let message_id = dead.await.attributes["messaging.message.id"].clone();
    Ok((trace_id, message_id))
}

async fn poisoned() -> Result<(Stack, Database)> {
    let database = Database::new()?;
    let variables = [("mq", "MQ_DATABASE_URL", &*database.url), ("mq", "MQ_RETRY_DELAYS", "100ms")];
    let stack = Stack::start(&variables).await?;
    stack.mq.said("the database is available").await?;
    database.poison(KNOWN_MOBILE).await?;
    Ok((stack, database))
}

#[tokio::test(flavor = "multi_thread")]
async fn they_are_listed_and_shown_without_personal_data() -> Result<()> {
    let (stack, _database) = poisoned().await?;
    let (trace_id, message_id) = dead_login(&stack).await?;
    let (other_trace, other_message) = dead_login(&stack).await?;
    // Reading changes nothing, so both lists are the same.
    for _ in 0..2 {
        let list = dead_letters(&stack, &["list"]).await?;
        assert_eq!(list.code, Some(0), "{}", list.err);
        let lines: Vec<Vec<&str>> = list.out.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines.len(), 3, "{}", list.out);
        assert_eq!(lines[1][..3], [message_id.as_str(), "refused_by_database", "2"], "{}", list.out);
        assert!(lines[1][3].starts_with("20") && lines[1][3].ends_with('Z'), "{}", list.out);
        assert_eq!(lines[1][4], trace_id);
        assert_eq!((lines[2][0], lines[2][4]), (other_message.as_str(), other_trace.as_str()));
        assert!(!list.out.contains(KNOWN_MOBILE) && !list.err.contains(KNOWN_MOBILE));
    }
    let show = dead_letters(&stack, &["show", &other_message]).await?;
    assert_eq!(show.code, Some(0), "{}", show.err);
    for part in
        ["x-dead-letter-reason: refused_by_database", "traceparent: 00-", "delivery-mode: 2", &other_trace]
    {
        assert!(show.out.contains(part), "{part}: {}", show.out);
    }
    assert!(!show.out.contains(KNOWN_MOBILE) && !show.out.contains(&message_id), "{}", show.out);
    let show = dead_letters(&stack, &["show", &other_message, "--body"]).await?;
    assert!(show.out.contains(&format!(r#""Msg":"{KNOWN_MOBILE}"}}"#)), "{}", show.out);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_is_a_span_in_the_trace_and_the_login_is_applied() -> Result<()> {
    let (stack, database) = poisoned().await?;
    let (trace_id, message_id) = dead_login(&stack).await?;
    let (other_trace, _) = dead_login(&stack).await?;
    database.cure().await?;

    let replay = dead_letters(&stack, &["replay", &message_id]).await?;
    assert_eq!(replay.code, Some(0), "{}", replay.err);
    let failed = "        mq mq_consumer_msg CONSUMER ERROR error.type=refused_by_database\n";
    let consumed = "        mq mq_consumer_msg CONSUMER\n";
    let replayed = "        mq replay_msg_mq PRODUCER\n          mq mq_consumer_msg CONSUMER\n";
    let tree = LOGIN_TREE.replace(consumed, &[failed, failed, replayed].concat());
    let spans = stack.receiver.expect_tree(&trace_id, &tree).await;
    let last = spans.iter().filter(|span| span.kind == "CONSUMER").max_by_key(|span| span.start);
    let last = last.expect("consumer span");
    assert_eq!(last.attributes["throughline.message.attempt"], "1");
    assert_eq!(last.attributes["throughline.message.outcome"], "applied");
    assert_eq!(database.logins(KNOWN_MOBILE).await?, (1, 1));

    // The other dead letter stays in the queue until all dead letters are replayed.
    let list = dead_letters(&stack, &["list"]).await?;
    assert!(list.out.contains(&other_trace) && !list.out.contains(&trace_id), "{}", list.out);
    assert_eq!(dead_letters(&stack, &["replay", "--all"]).await?.code, Some(0));
    stack.receiver.expect_tree(&other_trace, &tree).await;
    assert_eq!(dead_letters(&stack, &["list"]).await?.out.lines().count(), 1);
    assert_eq!(database.logins(KNOWN_MOBILE).await?, (2, 2));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_again_is_a_dead_letter_again_and_replaying_all_comes_to_an_end() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    for i in 0..3 {
        let properties = BasicProperties::default().with_message_id(format!("bad-{i}").into());
        stack.publish(properties, b"not json").await?;
    }
    let count = async || dead_letters(&stack, &["list"]).await.ok()?.out.lines().count().checked_sub(1);
    let all = async || (count().await? == 3).then_some(());
    assert!(poll(PATIENCE, all).await.is_some());
    let replay = dead_letters(&stack, &["replay", "--all"]).await?;
    assert_eq!((replay.code, replay.out.lines().count()), (Some(0), 3), "{} {}", replay.out, replay.err);
    assert!(poll(PATIENCE, all).await.is_some());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_leaves_order_and_content_of_the_queue_as_they_were() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let queue = stack.broker.topology.dead_letter_queue.as_str();
    let mut published = Vec::new();
    // When a connection ends, its unacknowledged messages go back to a quorum queue in the order of their
    // numbers as text, in which 10 comes before 9. So this test needs more than nine messages.
    for i in 0..12 {
        let mut headers = FieldTable::default();
        headers.insert("x-mine".into(), AMQPValue::LongInt(i));
        // One message has no id, like a message from another producer. Another message has an id that would
        // clear the terminal.
        let id = ["a", "b", "", "\x1b[2J"].get(i as usize).copied().unwrap_or("e");
        // RabbitMQ 4 delivers messages of priority 5 or more before others, so these priorities are lower.
        let properties = BasicProperties::default().with_headers(headers).with_priority(i as u8 % 5);
        let properties = if id.is_empty() { properties } else { properties.with_message_id(id.into()) };
        let body = format!("body {i}").into_bytes();
        let options = BasicPublishOptions::default();
        let channel = &stack.broker.channel;
        channel.confirm_select(Default::default()).await?;
        channel.basic_publish("".into(), queue.into(), options, &body, properties.clone()).await?.await?;
        published.push((properties, body));
    }
    let list = dead_letters(&stack, &["list"]).await?;
    assert_eq!(list.out.lines().count(), 13, "{}", list.out);
    assert!(!list.out.contains('\x1b'), "{}", list.out);
    assert_eq!(dead_letters(&stack, &["show", "b", "--body"]).await?.code, Some(0));
    assert_eq!(dead_letters(&stack, &["replay", "nobody"]).await?.code, Some(1));
    for (properties, body) in published {
        let letter = stack.dead_letter().await?;
        // RabbitMQ's quorum queues add this header, in which they count deliveries.
        let mut headers = letter.properties.headers().clone().context("headers")?.inner().clone();
        headers.remove("x-delivery-count");
        let letter = (letter.properties.clone().with_headers(headers.into()), &letter.data);
        assert_eq!(letter, (properties, &body));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_told_with_an_exit_code() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    for (arguments, code, text) in [
        (&["show", "nobody"][..], 1, "there is no dead letter with this message id"),
        (&["replay", "nobody"], 1, "there is no dead letter with this message id"),
        (&["replay"], 2, "required"),
        (&["replay", "one", "--all"], 2, "cannot be used with"),
        (&["list", "--amqp-prefix", "no.such."], 1, "looking for the dead-letter queue"),
    ] {
        let said = dead_letters(&stack, arguments).await?;
        assert_eq!(said.code, Some(code), "{arguments:?}: {}", said.err);
        assert!(said.err.contains(text), "{arguments:?}: {}", said.err);
    }
    let mut away = Process::command("mq", &[("AMQP_URL", "amqp://user:s3cr3t@127.0.0.1:1")])?;
    let output = away.args(["dead-letters", "list"]).output().await?;
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("connecting to the broker at 127.0.0.1:1") && !err.contains("s3cr3t"), "{err}");
    Ok(())
}
