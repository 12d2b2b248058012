//! The queues on the broker. The tests cover the queues' types and arguments, the messages that the queues
//! must keep, and a broker on which a queue has other arguments than expected.

use anyhow::{Context, Result};
use chaos::broker::{Broker, Kind};
use harness::{
    PATIENCE,
    database::Database,
    poll,
    process::Process,
    proxy::Side,
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack, TestBroker},
};
use lapin::{
    BasicProperties, Channel, Connection,
    options::{
        BasicGetOptions, BasicNackOptions, BasicPublishOptions, ExchangeDeleteOptions, QueueBindOptions,
        QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};
use std::time::Duration;

/// The mobile number of another known user, whose logins fail after `Database::poison`.
const POISONED: &str = "13800138001";

/// How long to wait for a dead letter. If no queue accepts a dead letter, RabbitMQ publishes it again only
/// after three minutes.
const DEAD_LETTER_PATIENCE: Duration = Duration::from_secs(240);

fn table(arguments: &[(&str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        table.insert((*name).into(), value.clone());
    }
    table
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

/// Opens a connection for one declaration, because a refused declaration closes its channel.
async fn connect(stack: &Stack) -> Result<(Connection, Channel)> {
    let server = amqp::connection::parse_url(&stack.broker.url).map_err(anyhow::Error::msg)?;
    let connection = amqp::connection::connect(&server, "test").await?;
    let channel = connection.create_channel().await?;
    Ok((connection, channel))
}

async fn declare(stack: &Stack, queue: &str, arguments: FieldTable) -> Result<()> {
    let (_connection, channel) = connect(stack).await?;
    let declared = channel.queue_declare(queue.into(), QueueDeclareOptions::durable(), arguments).await;
    declared.map(drop).with_context(|| queue.to_owned())
}

async fn delete(stack: &Stack, queue: &str) -> Result<()> {
    let (_connection, channel) = connect(stack).await?;
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await?;
    Ok(())
}

/// Deletes the queues and the exchange that services with this prefix have declared.
async fn delete_all(stack: &Stack, prefix: &str) -> Result<()> {
    let (_connection, channel) = connect(stack).await?;
    for queue in ["mq.user_login", "mq.user_login.dead", "mq.user_login.retry.1s"] {
        channel.queue_delete(format!("{prefix}{queue}").into(), QueueDeleteOptions::default()).await?;
    }
    channel.exchange_delete(format!("{prefix}usercenter").into(), Default::default()).await?;
    Ok(())
}

async fn publish(channel: &Channel, queue: &str, mobile: &str, id: &str) -> Result<()> {
    let properties = BasicProperties::default().with_message_id(id.into()).with_delivery_mode(2);
    let body = format!(r#"{{"Msg":"{mobile}"}}"#);
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    channel.confirm_select(Default::default()).await?;
    let confirm =
        channel.basic_publish("".into(), queue.into(), options, body.as_bytes(), properties).await?.await?;
    anyhow::ensure!(confirm.is_ack() && confirm.take_message().is_none(), "not confirmed");
    Ok(())
}

/// Waits until this many logins are applied.
async fn applied(database: &Database, mobile: &str, logins: i64, mq: &Process) -> Result<()> {
    let is_applied = async || (database.logins(mobile).await.ok()? == (logins, logins)).then_some(());
    let applied = poll(DEAD_LETTER_PATIENCE, is_applied).await;
    applied
        .with_context(|| format!("{logins} logins are not applied:\n{}", mq.output()))
        .with_context(|| format!("mq of {}", mq.address))
}

/// Returns the status and the body of api's answer to `GET /readyz`.
async fn ready(stack: &Stack, api: &Process) -> Result<(u16, serde_json::Value)> {
    let answer = stack.client.get(&format!("http://{}/readyz", api.address)).await?;
    Ok((answer.status.as_u16(), answer.json()))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_queue_has_its_type_and_arguments_whatever_the_default_of_the_virtual_host_is() -> Result<()> {
    let stack = Stack::start(&[("mq", "MQ_RETRY_DELAYS", "1s")]).await?;
    let queue = &stack.broker.topology.queue;
    let quorum = [
        ("x-queue-type", text("quorum")),
        ("x-delivery-limit", AMQPValue::LongInt(1_000_000_000)),
        ("x-overflow", text("reject-publish")),
    ];
    let dead_letters_to = |queue: &str| {
        [
            ("x-dead-letter-exchange", text("")),
            ("x-dead-letter-routing-key", text(queue)),
            ("x-dead-letter-strategy", text("at-least-once")),
        ]
    };
    let ttl = [("x-message-ttl", AMQPValue::LongLongInt(1000))];
    // Declaring a queue again succeeds only if all arguments are those of the existing queue.
    let dead = format!("{queue}.dead");
    declare(&stack, queue, table(&[&quorum[..], &dead_letters_to(&dead)].concat())).await?;
    declare(&stack, &dead, table(&quorum)).await?;
    let retry = format!("{queue}.retry.1s");
    declare(&stack, &retry, table(&[&quorum[..], &dead_letters_to(queue), &ttl].concat())).await?;
    assert!(declare(&stack, queue, table(&quorum)).await.is_err());

    let prefix = format!("{}classic.", stack.broker.prefix);
    let variables = [("AMQP_PREFIX", &*prefix), ("AMQP_QUEUE_TYPE", "classic"), ("MQ_RETRY_DELAYS", "1s")];
    let mq = stack.another("mq", &variables).await?;
    mq.said("consuming").await?;
    let queue = format!("{prefix}mq.user_login");
    let classic = [("x-queue-type", text("classic"))];
    declare(&stack, &queue, table(&classic)).await?;
    declare(&stack, &format!("{queue}.dead"), table(&classic)).await?;
    let arguments = [&classic[..], &dead_letters_to(&queue)[..2], &ttl].concat();
    declare(&stack, &format!("{queue}.retry.1s"), table(&arguments)).await?;
    // Earlier versions of the services declared classic queues without `x-queue-type`. On RabbitMQ, such a
    // declaration means the type `classic`, unless the virtual host's default is another type.
    drop(mq);
    delete_all(&stack, &prefix).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_a_retry_is_kept_while_the_main_queue_is_missing() -> Result<()> {
    let database = Database::new()?;
    let variables = [("mq", "MQ_DATABASE_URL", &*database.url), ("mq", "MQ_RETRY_DELAYS", "1s")];
    let mut stack = Stack::start(&variables).await?;
    stack.mq.stop().await?;
    let (_connection, channel) = connect(&stack).await?;
    let queue = stack.broker.topology.queue.clone();
    channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await?;
    // The test publishes to the queue in which mq lets a failed message wait for its retry.
    let retry = stack.broker.topology.retry_queue(Duration::from_secs(1));
    publish(&channel, &retry, KNOWN_MOBILE, "waiting").await?;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::durable() };
    let is_over = async || {
        let retry = channel.queue_declare(retry.as_str().into(), passive, FieldTable::default()).await;
        (retry.ok()?.message_count() == 0).then_some(())
    };
    poll(PATIENCE, is_over).await.context("the delay does not end")?;

    let variables = [("MQ_DATABASE_URL", &*database.url), ("MQ_RETRY_DELAYS", "1s")];
    let mq = stack.another("mq", &variables).await?;
    applied(&database, KNOWN_MOBILE, 1, &mq).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_returned_more_than_20_times_is_not_dropped() -> Result<()> {
    let database = Database::new()?;
    let mut stack = Stack::start(&[("mq", "MQ_DATABASE_URL", &*database.url)]).await?;
    stack.mq.stop().await?;
    let (_connection, channel) = connect(&stack).await?;
    let topology = &stack.broker.topology;
    publish(&channel, &topology.queue, KNOWN_MOBILE, "returned").await?;
    publish(&channel, &topology.dead_letter_queue, KNOWN_MOBILE, "dead").await?;
    for queue in [&topology.queue, &topology.dead_letter_queue] {
        for i in 0..25 {
            let got = poll(PATIENCE, async || {
                channel.basic_get(queue.as_str().into(), BasicGetOptions::default()).await.ok().flatten()
            });
            let got = got.await.with_context(|| format!("{queue} after {i} returns"))?;
            got.nack(BasicNackOptions { requeue: true, multiple: false }).await?;
        }
    }
    let mq = stack.another("mq", &[("MQ_DATABASE_URL", &database.url)]).await?;
    applied(&database, KNOWN_MOBILE, 1, &mq).await?;
    let letter = stack.dead_letter().await?;
    assert_eq!(letter.properties.message_id().as_ref().map(|id| id.as_str()), Some("dead"));
    Ok(())
}

/// This test kills the broker, so it uses a broker of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_killed_while_messages_wait_for_a_retry_loses_none() -> Result<()> {
    const LOGINS: i64 = 200;

    let is_rabbitmq = std::env::var_os("AMQP_URL").is_some() && Kind::Rabbitmq.is_installed();
    let kind = if is_rabbitmq { Kind::Rabbitmq } else { Kind::Embedded };
    let mut broker = Broker::start(kind).await?;
    let database = Database::new()?;
    let url = format!("amqp://guest:guest@{}/%2f", broker.address());
    // Most retry delays end while the broker is down.
    let delays = "3s,3s,3s,3s,3s,3s,3s,3s,3s,3s,3s,3s";
    let variables = [("mq", "MQ_DATABASE_URL", &*database.url), ("mq", "MQ_RETRY_DELAYS", delays)];
    let mut stack = Stack::start_on(TestBroker::at(url).await?, &variables).await?;
    database.poison(POISONED).await?;
    for _ in 0..LOGINS {
        assert_eq!(stack.login(POISONED, &[]).await?.status, 200);
    }
    let waiting = async || {
        let spans = stack.receiver.spans();
        let is_retry = |outcome: Option<&String>| outcome.is_some_and(|outcome| outcome == "retry");
        let attempts = spans.iter().filter(|s| is_retry(s.attributes.get("throughline.message.outcome")));
        (attempts.count() as i64 >= LOGINS).then_some(())
    };
    poll(PATIENCE, waiting).await.context("not every login has failed once")?;
    broker.down().await?;
    stack.mq.kill().await?;
    // When the broker is up again, the delay of every message is over.
    tokio::time::sleep(Duration::from_secs(4)).await;
    broker.up().await?;
    // The broker still knows which history the queue belongs to.
    let another = Database::new()?;
    let refused = stack.another("mq", &[("MQ_DATABASE_URL", &another.url)]).await?;
    refused.said("belongs to another history").await?;
    database.cure().await?;
    let mq = stack.another("mq", &[variables[0], variables[1]].map(|(_, name, value)| (name, value))).await?;
    applied(&database, POISONED, LOGINS, &mq).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_the_broker_holds_differently_is_an_error_on_both_sides_until_it_is_deleted()
-> Result<()> {
    let stack = Stack::start(&[]).await?;
    let (prefix, database) = (format!("{}other.", stack.broker.prefix), Database::new()?);
    let variables = [("AMQP_PREFIX", prefix.as_str()), ("MQ_DATABASE_URL", &database.url)];
    let queue = format!("{prefix}mq.user_login");
    declare(&stack, &queue, table(&[("x-queue-type", text("classic"))])).await?;
    let api = stack.another("api", &variables).await?;
    let mq = stack.another("mq", &[&variables[..], &[("MQ_RETRY_DELAYS", "1s")]].concat()).await?;
    for service in [&api, &mq] {
        let line = service.said("ERROR").await?;
        let told = format!("queue {queue} on the broker is not as expected");
        for part in [told.as_str(), "inequivalent arg", "x-queue-type=quorum", "docs/queues.md"] {
            assert!(line.contains(part), "{part}: {line}");
        }
        assert!(!service.output().contains("can't connect"), "{}", service.output());
    }
    let not_ready = poll(PATIENCE, async || {
        let (status, body) = ready(&stack, &api).await.ok()?;
        (status == 503 && body["topology"] == false && body["spool"] == true).then_some(())
    });
    not_ready.await.context("api is ready")?;
    assert!(!mq.is_healthy().await?);
    // api still accepts a login, and keeps it in the spool.
    let url = format!("http://{}/usercenter/v1/user/login", api.address);
    let body = serde_json::json!({ "mobile": KNOWN_MOBILE }).to_string();
    let headers = [("content-type", "application/json")];
    let answer = stack.client.send(http::Method::POST, &url, &headers, body).await?;
    assert_eq!(answer.status, 200);

    delete(&stack, &queue).await?;
    applied(&database, KNOWN_MOBILE, 1, &mq).await?;
    let is_ready = poll(PATIENCE, async || (ready(&stack, &api).await.ok()?.0 == 200).then_some(()));
    is_ready.await.context("api is not ready")?;
    assert!(mq.is_healthy().await?);
    // Every attempt to declare the queue failed, but each service logged only one error.
    for service in [&api, &mq] {
        assert_eq!(service.output().matches("ERROR").count(), 1, "{}", service.output());
    }
    drop((api, mq));
    delete_all(&stack, &prefix).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_queue_that_the_broker_holds_differently_is_an_error_and_mq_is_not_healthy() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let prefix = format!("{}other.", stack.broker.prefix);
    let retry = format!("{prefix}mq.user_login.retry.1s");
    declare(&stack, &retry, table(&[("x-message-ttl", AMQPValue::LongInt(5))])).await?;
    let mq = stack.another("mq", &[("AMQP_PREFIX", prefix.as_str()), ("MQ_RETRY_DELAYS", "1s")]).await?;
    let line = mq.said("ERROR").await?;
    for part in [&*format!("queue {retry} on the broker is not as expected"), "x-message-ttl=1000"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    assert!(!mq.is_healthy().await?);
    delete(&stack, &retry).await?;
    mq.said("consuming").await?;
    drop(mq);
    delete_all(&stack, &prefix).await
}

/// Declares a queue that belongs to the test's connection, and binds it to the exchange. Returns its name.
async fn tap(stack: &Stack, routing_key: &str, arguments: &[(&str, AMQPValue)]) -> Result<String> {
    let (channel, tap) = (&stack.broker.channel, format!("{}tap", stack.broker.prefix));
    let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::durable() };
    channel.queue_declare(tap.as_str().into(), options, table(arguments)).await?;
    let (exchange, bind) = (stack.broker.topology.exchange.as_str(), QueueBindOptions::default());
    channel
        .queue_bind(tap.as_str().into(), exchange.into(), routing_key.into(), bind, FieldTable::default())
        .await?;
    Ok(tap)
}

/// The first host accepts connections but never answers, and the second host stops during the test.
#[tokio::test(flavor = "multi_thread")]
async fn the_hosts_of_the_broker_are_tried_in_turn() -> Result<()> {
    let silent = std::net::TcpListener::bind("127.0.0.1:0")?;
    let second = broker::Broker::start().await?;
    let third = TestBroker::embedded().await?;
    let hosts = format!("@{},{},", silent.local_addr()?, second.address());
    let url = third.url.replacen('@', &hosts, 1);
    let stack = Stack::start_on(third, &[("*", "AMQP_URL", &url)]).await?;
    // Logs in. If the broker confirms the login at once, returns the ports that the producer span and the
    // consumer span show for the broker.
    let confirming_ports = async || {
        let answer = stack.login(KNOWN_MOBILE, &[]).await.ok()?;
        assert_eq!(answer.status, 200);
        let spans = stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
        let span = |kind| spans.iter().find(|span| span.kind == kind).expect("the span is in the tree");
        let is_confirmed = span("PRODUCER").attributes["throughline.publish.outcome"] == "confirmed";
        is_confirmed
            .then(|| ["PRODUCER", "CONSUMER"].map(|kind| span(kind).attributes["server.port"].clone()))
    };
    let port = second.address().port().to_string();
    assert_eq!(confirming_ports().await, Some([port.clone(), port]));
    drop(second);
    stack.api.said("lost the connection").await?;
    let ports = poll(PATIENCE, confirming_ports).await.with_context(|| stack.api.output())?;
    assert!(ports.iter().all(|port| stack.broker.url.contains(&format!(":{port}/"))), "{ports:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_is_replaced_while_mq_is_away_is_bound_again() -> Result<()> {
    let broker = TestBroker::connect().await?;
    let (proxy, url) = broker.proxy()?;
    let stack = Stack::start_on(broker, &[("mq", "AMQP_URL", &url)]).await?;
    let (topology, database) = (&stack.broker.topology, &stack.broker.database);
    proxy.refuse();
    stack.mq.said("lost the connection").await?;
    delete(&stack, &topology.queue).await?;
    // Like api, this call declares the queue without binding it.
    topology.declare(&stack.broker.channel, &[]).await?;
    proxy.restore();
    // Until mq binds the queue again, the broker drops every message, so the test publishes repeatedly.
    let is_applied = poll(PATIENCE, async || {
        let properties = BasicProperties::default().with_message_id("through the exchange".into());
        let body = format!(r#"{{"Msg":"{KNOWN_MOBILE}"}}"#);
        stack.publish(properties, body.as_bytes()).await.ok()?;
        (database.logins(KNOWN_MOBILE).await.ok()? == (1, 1)).then_some(())
    });
    is_applied.await.with_context(|| stack.mq.output())
}

/// Logs in, and waits for the whole trace. The broker must have confirmed the login at once. Returns the
/// trace id.
async fn confirmed(stack: &Stack) -> Result<String> {
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_eq!(answer.status, 200);
    let spans = stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    let producer = spans.iter().find(|span| span.kind == "PRODUCER").context("a producer span")?;
    assert_eq!(producer.attributes["throughline.publish.outcome"], "confirmed", "{producer:#?}");
    Ok(answer.trace_id())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_confirm_means_that_the_main_queue_has_the_login_whoever_else_is_bound() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let topology = &stack.broker.topology;
    tap(&stack, &topology.routing_key, &[]).await?;
    let (queue, exchange, key) = (&topology.queue, &topology.exchange, &topology.routing_key);
    let unbound = stack.broker.channel.queue_unbind(
        queue.as_str().into(),
        exchange.as_str().into(),
        key.as_str().into(),
        FieldTable::default(),
    );
    unbound.await?;
    for _ in 0..3 {
        confirmed(&stack).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_each_login_is_for_other_consumers_whose_queues_hold_up_nothing() -> Result<()> {
    let stack = Stack::start(&[("api", "PUBLISH_COPIES", "true")]).await?;
    // This queue has room for two messages.
    let full = [("x-max-length", AMQPValue::LongInt(2)), ("x-overflow", text("reject-publish"))];
    let tap = tap(&stack, "user.login.copy", &full).await?;
    let mut logins = Vec::new();
    for _ in 0..4 {
        logins.push(confirmed(&stack).await?);
    }
    for login in &logins[..2] {
        let get = async || {
            let options = BasicGetOptions { no_ack: true };
            stack.broker.channel.basic_get(tap.as_str().into(), options).await.ok().flatten()
        };
        let copy = poll(PATIENCE, get).await.context("no copy")?;
        let headers = copy.properties.headers().clone().context("headers")?;
        let Some(AMQPValue::LongString(traceparent)) = headers.inner().get("traceparent") else {
            anyhow::bail!("{headers:?}");
        };
        assert!(traceparent.to_string().contains(login), "{traceparent:?}");
    }

    // If the exchange is missing, only the copies are lost.
    let (channel, exchange) = (&stack.broker.channel, stack.broker.topology.exchange.as_str());
    channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await?;
    let told = async || {
        confirmed(&stack).await.ok()?;
        stack.api.output().contains("copies of logins were not published").then_some(())
    };
    poll(PATIENCE, told).await.context("the missing exchange is not logged")?;
    assert!(!stack.api.output().contains("lost the connection"), "{}", stack.api.output());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_opening_that_hangs_is_given_up_and_the_next_one_does_not_bind_again() -> Result<()> {
    const DECLARE_OK: (u16, u16) = (50, 11);
    const BIND: (u16, u16) = (50, 20);

    let broker = TestBroker::connect().await?;
    let (proxy, url) = broker.amqp_proxy()?;
    let stack = Stack::start_on(broker, &[("*", "AMQP_URL", &url)]).await?;
    confirmed(&stack).await?;
    let hung = proxy.withhold(Side::Server, DECLARE_OK);
    proxy.cut();
    // One of the services is now waiting for the withheld answer.
    tokio::time::timeout(PATIENCE, hung).await??;
    let mut bound = proxy.withhold(Side::Client, BIND);
    let is_back = async || {
        let is_ready = ready(&stack, &stack.api).await.ok()?.1["broker"] == true;
        (is_ready && stack.mq.is_healthy().await.ok()?).then_some(())
    };
    poll(PATIENCE, is_back).await.context("a service does not come back")?;
    // Without a time limit for opening a connection, the service would wait until it misses heartbeats.
    let said =
        |service: &Process| service.output().contains("did not answer all steps of opening the connection");
    assert!(said(&stack.api) || said(&stack.mq), "{}\n{}", stack.api.output(), stack.mq.output());
    confirmed(&stack).await?;
    assert!(bound.try_recv().is_err(), "mq binds the queue again");
    Ok(())
}
