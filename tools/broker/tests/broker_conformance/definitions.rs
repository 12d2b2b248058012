//! Declaring and deleting exchanges, queues and bindings.

use crate::client::{Client, bind, body, code, declare, exclusive, long_string};
use anyhow::Result;
use lapin::{
    BasicProperties, ExchangeKind,
    options::{
        BasicConsumeOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueDeclareOptions,
        QueueDeleteOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
};

const PASSIVE: QueueDeclareOptions = QueueDeclareOptions {
    passive: true,
    durable: false,
    exclusive: false,
    auto_delete: false,
    nowait: false,
};

#[tokio::test]
async fn predeclared_exchanges_route_by_their_types() -> Result<()> {
    let client = Client::connect().await?;
    client.confirm().await?;
    let queue = client.queue("q", &[]).await?;
    let key = client.name("key.of.three");
    for (exchange, binding) in
        [("amq.direct", key.clone()), ("amq.topic", key.replace("three", "*")), ("amq.fanout", String::new())]
    {
        bind(&client.channel, &queue, exchange, &binding).await?;
        client.publish(exchange, &key, exchange.as_bytes(), BasicProperties::default()).await?;
        assert_eq!(body(&client.expect(&queue).await?), exchange);
    }
    Ok(())
}

#[tokio::test]
async fn a_direct_exchange_routes_by_the_whole_key() -> Result<()> {
    let client = Client::connect().await?;
    client.confirm().await?;
    let queue = client.queue("q", &[]).await?;
    let exchange = client.exchange("x", ExchangeKind::Direct, &queue, &["a.b"]).await?;
    for (key, is_routed) in [("a.b", true), ("a", false), ("a.b.c", false), ("A.B", false), ("", false)] {
        let returned = client.publish(&exchange, key, b"m", BasicProperties::default()).await?.take_message();
        assert_eq!(returned.is_none(), is_routed, "{key}");
    }
    Ok(())
}

#[tokio::test]
async fn a_fanout_exchange_routes_to_every_queue() -> Result<()> {
    let client = Client::connect().await?;
    client.confirm().await?;
    let (one, two) = (client.queue("one", &[]).await?, client.queue("two", &[]).await?);
    let exchange = client.exchange("x", ExchangeKind::Fanout, &one, &["ignored"]).await?;
    bind(&client.channel, &two, &exchange, "").await?;
    client.publish(&exchange, "any", b"m", BasicProperties::default()).await?;
    for queue in [one, two] {
        assert_eq!(body(&client.expect(&queue).await?), "m");
    }
    Ok(())
}

#[tokio::test]
async fn a_topic_exchange_routes_by_words() -> Result<()> {
    let client = Client::connect().await?;
    client.confirm().await?;
    for (pattern, routed, others) in [
        ("a.*", &["a.b", "a."][..], &["a", "a.b.c", "b.a"][..]),
        ("a.#", &["a", "a.b", "a.b.c"], &["b", "ab"]),
        ("a.*.b", &["a.c.b", "a..b"], &["a.b"]),
        ("a.#.*", &["a.b", "a.b.c"], &["a"]),
        ("#.#", &["", "a"], &[]),
        ("#.a.#.a.#", &["a.a", "b.a.b.a"], &["a.b"]),
        ("#.z", &["z", "a.z", "a.b.z"], &["z.a"]),
        ("*.*.c", &["a.b.c"], &["b.c", "a.b.b.c"]),
        ("a.#.c.*", &["a.c.d", "a.b.b.c.d"], &["a.c", "a.b.c"]),
        ("#", &["", "a", "a.b"], &[]),
        ("*", &["a"], &["", "a.b"]),
    ] {
        let queue = client.queue("q", &[]).await?;
        let exchange = client.exchange("x", ExchangeKind::Topic, &queue, &[pattern]).await?;
        for (keys, expected) in [(routed, true), (others, false)] {
            for key in keys {
                let returned =
                    client.publish(&exchange, key, b"m", BasicProperties::default()).await?.take_message();
                assert_eq!(returned.is_none(), expected, "{pattern} {key}");
            }
        }
        client.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_queue_bound_twice_gets_a_message_once() -> Result<()> {
    let client = Client::connect().await?;
    client.confirm().await?;
    let queue = client.queue("q", &[]).await?;
    let exchange = client.exchange("x", ExchangeKind::Topic, &queue, &["a.#", "#.b", "a.#"]).await?;
    client.publish(&exchange, "a.b", b"m", BasicProperties::default()).await?;
    client.expect_counts(&queue, (1, 0)).await;
    Ok(())
}

#[tokio::test]
async fn an_unbound_queue_gets_nothing_more_and_unbinding_again_is_no_error() -> Result<()> {
    let client = Client::connect().await?;
    client.confirm().await?;
    let queue = client.queue("q", &[]).await?;
    let exchange = client.exchange("x", ExchangeKind::Direct, &queue, &["k", "other"]).await?;
    for _ in 0..2 {
        let (queue, exchange) = (queue.as_str().into(), exchange.as_str().into());
        client.channel.queue_unbind(queue, exchange, "k".into(), FieldTable::default()).await?;
        let returned = client.publish(&client.name("x"), "k", b"m", BasicProperties::default()).await?;
        assert!(returned.take_message().is_some());
    }
    Ok(())
}

#[tokio::test]
async fn a_queue_without_a_name_gets_one_and_an_empty_name_means_the_last() -> Result<()> {
    let client = Client::connect().await?;
    let queue = declare(&client.channel, "", exclusive(), &[]).await?;
    assert!(queue.name().as_str().starts_with("amq.gen-"), "{queue:?}");
    client.fill(queue.name().as_str(), &["m"]).await?;
    assert_eq!(body(&client.expect("").await?), "m");
    let other = declare(&client.channel, "", exclusive(), &[]).await?;
    assert_ne!(queue.name(), other.name());
    client
        .expect_channel_error(404, async |channel| channel.basic_get("".into(), Default::default()).await)
        .await
}

#[tokio::test]
async fn an_exclusive_queue_is_locked_for_other_connections() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    let other = client.another().await?;
    other.expect_channel_error(405, async |channel| declare(&channel, &queue, PASSIVE, &[]).await).await?;
    other
        .expect_channel_error(405, async |channel| declare(&channel, &queue, exclusive(), &[]).await)
        .await?;
    other
        .expect_channel_error(405, async |channel| {
            let options = BasicConsumeOptions::default();
            channel
                .basic_consume(queue.as_str().into(), "".into(), options, FieldTable::default())
                .await
                .map(drop)
        })
        .await?;
    other
        .expect_channel_error(405, async |channel| {
            channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await
        })
        .await?;
    // The owner's connection may use the queue on any channel.
    declare(&client.connection.create_channel().await?, &queue, exclusive(), &[]).await?;
    Ok(())
}

#[tokio::test]
async fn an_exclusive_queue_goes_with_its_connection() -> Result<()> {
    let client = Client::connect().await?;
    let other = client.another().await?;
    let queue = other.queue("q", &[]).await?;
    other.connection.close(200, "done".into()).await?;
    let gone = loopback::poll(loopback::PATIENCE, async || {
        (client.has_queue(&queue).await.ok() == Some(false)).then_some(())
    });
    assert!(gone.await.is_some());
    Ok(())
}

#[tokio::test]
async fn an_auto_delete_queue_goes_with_its_last_consumer_and_not_before_it_had_one() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.name("q");
    let options = QueueDeclareOptions { durable: true, auto_delete: true, ..Default::default() };
    declare(&client.channel, &queue, options, &[]).await?;
    assert!(client.has_queue(&queue).await?);
    // The consumers are kept in a variable, because lapin cancels a consumer when it is dropped.
    let _consumers = (client.consume(&queue, "one").await?, client.consume(&queue, "two").await?);
    client.channel.basic_cancel("one".into(), Default::default()).await?;
    assert!(client.has_queue(&queue).await?);
    client.channel.basic_cancel("two".into(), Default::default()).await?;
    assert!(!client.has_queue(&queue).await?);
    Ok(())
}

#[tokio::test]
async fn an_auto_delete_exchange_goes_with_its_last_binding() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    let exchange = client.exchange("x", ExchangeKind::Direct, &queue, &["k"]).await?;
    client.channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await?;
    let options = ExchangeDeclareOptions { passive: true, ..Default::default() };
    client
        .expect_channel_error(404, async |channel| {
            channel
                .exchange_declare(exchange.into(), ExchangeKind::Direct, options, FieldTable::default())
                .await
        })
        .await
}

#[tokio::test]
async fn declaring_again_changes_nothing_and_otherwise_is_a_406() -> Result<()> {
    let client = Client::connect().await?;
    let ttl = [("x-message-ttl", AMQPValue::LongInt(60_000))];
    let queue = client.queue("q", &ttl).await?;
    client.fill(&queue, &["m"]).await?;
    let again = declare(&client.channel, &queue, exclusive(), &ttl).await?;
    assert_eq!((again.name().as_str(), again.message_count()), (queue.as_str(), 1));

    let other_ttl = [("x-message-ttl", AMQPValue::LongInt(1))];
    // `durable` makes no difference for an exclusive queue, because the queue is deleted with its connection.
    declare(&client.channel, &queue, QueueDeclareOptions { durable: true, ..exclusive() }, &ttl).await?;
    let auto_delete = QueueDeclareOptions { auto_delete: true, ..exclusive() };
    for (options, arguments) in [(exclusive(), &other_ttl[..]), (exclusive(), &[]), (auto_delete, &ttl)] {
        client
            .expect_channel_error(406, async |channel| declare(&channel, &queue, options, arguments).await)
            .await?;
    }

    let exchange = client.exchange("x", ExchangeKind::Direct, &queue, &["k"]).await?;
    let same = ExchangeDeclareOptions { durable: true, auto_delete: true, ..Default::default() };
    for (kind, options) in [
        (ExchangeKind::Topic, same),
        (ExchangeKind::Direct, ExchangeDeclareOptions { durable: false, ..same }),
        (ExchangeKind::Direct, ExchangeDeclareOptions { auto_delete: false, ..same }),
    ] {
        client
            .expect_channel_error(406, async |channel| {
                channel.exchange_declare(exchange.as_str().into(), kind, options, FieldTable::default()).await
            })
            .await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_alternate_exchange_routes_what_matches_no_binding_and_can_not_be_another() -> Result<()> {
    let client = Client::connect().await?;
    let [queue, others] = [client.queue("q", &[]).await?, client.queue("others", &[]).await?];
    let alternate = client.exchange("alternate", ExchangeKind::Fanout, &others, &[""]).await?;
    let exchange = client.name("x");
    let options = ExchangeDeclareOptions { durable: true, auto_delete: true, ..Default::default() };
    let declare = async |channel: lapin::Channel, alternate: &str| {
        let mut arguments = FieldTable::default();
        arguments.insert("alternate-exchange".into(), long_string(alternate));
        channel.exchange_declare(exchange.as_str().into(), ExchangeKind::Direct, options, arguments).await
    };
    for _ in 0..2 {
        declare(client.channel.clone(), &alternate).await?;
    }
    bind(&client.channel, &queue, &exchange, "k").await?;
    client.confirm().await?;
    for (key, body) in [("k", "to the queue"), ("else", "to the others")] {
        client.publish(&exchange, key, body.as_bytes(), BasicProperties::default()).await?;
    }
    assert_eq!(body(&client.expect(&queue).await?), "to the queue");
    assert_eq!(body(&client.expect(&others).await?), "to the others");
    client.expect_channel_error(406, async |channel| declare(channel, "another").await).await
}

#[tokio::test]
async fn arguments_that_make_no_sense_are_a_406() -> Result<()> {
    let client = Client::connect().await?;
    for argument in [
        ("x-message-ttl", AMQPValue::LongInt(-1)),
        ("x-message-ttl", long_string("1000")),
        ("x-expires", AMQPValue::LongInt(0)),
        ("x-max-length", AMQPValue::LongInt(-1)),
        ("x-dead-letter-routing-key", long_string("without an exchange")),
        ("x-overflow", long_string("spill")),
    ] {
        let name = client.name("q");
        client
            .expect_channel_error(406, async |channel| {
                declare(&channel, &name, exclusive(), &[argument]).await
            })
            .await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_quorum_queue_is_durable_and_shared_and_its_arguments_stay() -> Result<()> {
    let client = Client::connect().await?;
    let (name, other) = (client.name("q"), client.name("other"));
    let quorum = ("x-queue-type", long_string("quorum"));
    let limit = ("x-delivery-limit", AMQPValue::LongInt(5));
    let arguments = [quorum.clone(), limit.clone(), ("x-overflow", long_string("reject-publish"))];
    let durable = QueueDeclareOptions::durable();
    declare(&client.channel, &name, durable, &arguments).await?;
    declare(&client.channel, &name, durable, &arguments).await?;
    for (queue, options, arguments) in [
        (&name, durable, &[("x-queue-type", long_string("classic"))][..]),
        (&name, durable, &arguments[..2]),
        (&name, durable, &[quorum.clone(), ("x-delivery-limit", AMQPValue::LongInt(6))]),
        (&other, exclusive(), std::slice::from_ref(&quorum)),
        (&other, QueueDeclareOptions { auto_delete: true, ..durable }, std::slice::from_ref(&quorum)),
    ] {
        let refused = async |channel: lapin::Channel| declare(&channel, queue, options, arguments).await;
        client.expect_channel_error(406, refused).await?;
    }
    client.channel.queue_delete(name.as_str().into(), Default::default()).await?;
    Ok(())
}

#[tokio::test]
async fn names_of_the_broker_are_refused_with_403() -> Result<()> {
    let client = Client::connect().await?;
    client
        .expect_channel_error(403, async |channel| declare(&channel, "amq.mine", exclusive(), &[]).await)
        .await?;
    for exchange in ["amq.mine", ""] {
        client
            .expect_channel_error(403, async |channel| {
                let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
                channel
                    .exchange_declare(exchange.into(), ExchangeKind::Direct, options, FieldTable::default())
                    .await
            })
            .await?;
    }
    for exchange in ["amq.direct", ""] {
        client
            .expect_channel_error(403, async |channel| {
                channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await
            })
            .await?;
    }
    let queue = client.queue("q", &[]).await?;
    client.expect_channel_error(403, async |channel| bind(&channel, &queue, "", "k").await).await
}

#[tokio::test]
async fn what_is_not_there_is_a_404() -> Result<()> {
    let client = Client::connect().await?;
    let (queue, missing) = (client.queue("q", &[]).await?, client.name("missing"));
    client.expect_channel_error(404, async |channel| declare(&channel, &missing, PASSIVE, &[]).await).await?;
    client
        .expect_channel_error(404, async |channel| {
            let passive = ExchangeDeclareOptions { passive: true, ..Default::default() };
            channel
                .exchange_declare(
                    missing.as_str().into(),
                    ExchangeKind::Direct,
                    passive,
                    FieldTable::default(),
                )
                .await
        })
        .await?;
    client
        .expect_channel_error(404, async |channel| bind(&channel, &missing, "amq.direct", "k").await)
        .await?;
    client.expect_channel_error(404, async |channel| bind(&channel, &queue, &missing, "k").await).await?;
    client
        .expect_channel_error(404, async |channel| {
            channel.basic_get(missing.as_str().into(), Default::default()).await.map(drop)
        })
        .await?;
    client
        .expect_channel_error(404, async |channel| {
            channel.queue_purge(missing.as_str().into(), QueuePurgeOptions::default()).await
        })
        .await?;
    client
        .expect_channel_error(404, async |channel| {
            let options = BasicConsumeOptions::default();
            channel
                .basic_consume(missing.as_str().into(), "".into(), options, FieldTable::default())
                .await
                .map(drop)
        })
        .await
}

#[tokio::test]
async fn an_unknown_exchange_type_is_refused() -> Result<()> {
    let client = Client::connect().await?;
    let other = client.another().await?;
    let kind = ExchangeKind::Custom("nonsense".into());
    let options = ExchangeDeclareOptions::default();
    let declared =
        other.channel.exchange_declare(client.name("x").into(), kind, options, FieldTable::default());
    let error = declared.await.expect_err("an error");
    // AMQP 0-9-1 and RabbitMQ 3 close the connection (503), but RabbitMQ 4 closes only the channel (406).
    assert!([503, 406].contains(&code(&error)), "{error}");
    Ok(())
}

#[tokio::test]
async fn a_purge_removes_what_waits_and_leaves_what_was_delivered() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    client.fill(&queue, &["a", "b", "c"]).await?;
    let taken = client.expect(&queue).await?;
    assert_eq!(client.channel.queue_purge(queue.as_str().into(), QueuePurgeOptions::default()).await?, 2);
    client.expect_counts(&queue, (0, 0)).await;
    taken.nack(lapin::options::BasicNackOptions { requeue: true, multiple: false }).await?;
    assert_eq!(body(&client.expect(&queue).await?), "a");
    Ok(())
}

#[tokio::test]
async fn a_queue_is_deleted_unless_it_is_used_or_not_empty_and_that_matters() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    client.fill(&queue, &["a", "b"]).await?;
    let delete = async |options| {
        let channel = client.connection.create_channel().await?;
        channel
            .queue_delete(queue.as_str().into(), options)
            .await
            .map_err(|error| code(&error))
            .map_or_else(|code| Ok::<_, anyhow::Error>(Err(code)), |count| Ok(Ok(count)))
    };
    let if_empty = QueueDeleteOptions { if_empty: true, ..Default::default() };
    let if_unused = QueueDeleteOptions { if_unused: true, ..Default::default() };
    assert_eq!(delete(if_empty).await?, Err(406));
    let consumer = client.consume(&queue, "c").await?;
    assert_eq!(delete(if_unused).await?, Err(406));
    client.channel.basic_cancel(consumer.tag(), Default::default()).await?;
    // The count of deleted messages excludes the messages that the consumer got.
    assert_eq!(delete(if_unused).await?, Ok(0));
    // Deleting a queue that does not exist succeeds.
    assert_eq!(delete(QueueDeleteOptions::default()).await?, Ok(0));
    Ok(())
}

#[tokio::test]
async fn an_exchange_is_deleted_unless_it_is_used_and_that_matters() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    let exchange = client.exchange("x", ExchangeKind::Direct, &queue, &["k"]).await?;
    client
        .expect_channel_error(406, async |channel| {
            let options = ExchangeDeleteOptions { if_unused: true, ..Default::default() };
            channel.exchange_delete(exchange.as_str().into(), options).await
        })
        .await?;
    for _ in 0..2 {
        client.channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await?;
    }
    client.expect_channel_error(404, async |channel| bind(&channel, &queue, &exchange, "k").await).await
}

#[tokio::test]
async fn a_queue_that_is_declared_once_more_after_its_deletion_is_empty() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    let exchange = client.exchange("x", ExchangeKind::Direct, &queue, &["k"]).await?;
    // Another queue is also bound to the auto-delete exchange, so that the exchange is not deleted.
    let other = client.queue("other", &[]).await?;
    bind(&client.channel, &other, &exchange, "other").await?;
    client.fill(&queue, &["a", "b"]).await?;
    let delivered = client.expect(&queue).await?;
    client.channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await?;
    client.queue("q", &[]).await?;
    // A requeued delivery from the deleted queue must not appear in the new queue.
    delivered.nack(lapin::options::BasicNackOptions { requeue: true, multiple: false }).await?;
    client.expect_counts(&queue, (0, 0)).await;
    client.confirm().await?;
    let returned = client.publish(&exchange, "k", b"m", BasicProperties::default()).await?;
    assert!(returned.take_message().is_some(), "the binding is still there");
    Ok(())
}
