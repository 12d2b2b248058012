//! A comparison of the embedded broker with RabbitMQ: the same client does the same work with both, in turns.
//!
//! Messages are small and not persistent, and queues are classic and durable. Ratios compare the brokers within
//! a round, and the order of the brokers changes from round to round. Memory sizes are those of this process,
//! which includes the embedded broker.

use super::{median, print, resident};
use ::broker::Broker;
use anyhow::{Context, Result, ensure};
use clap::Args;
use futures_util::{StreamExt, future::try_join_all};
use harness::stack::TestBroker;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
        QueueDeleteOptions,
    },
    types::FieldTable,
};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use uuid::Uuid;

/// How to measure.
#[derive(Args)]
pub struct Options {
    /// Rounds. Each round measures both brokers.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Messages of each measurement. The warm-up before a measurement has a tenth of this number.
    #[arg(long, default_value_t = 5000)]
    messages: usize,
    /// Bytes of a message's body.
    #[arg(long, default_value_t = 100)]
    size: usize,
}

/// The work with each message, and how many messages are in flight at the same time.
#[derive(Clone, Copy)]
enum Work {
    /// Publish a message and await its confirm.
    Confirm(usize),
    /// Publish a message, await its delivery, and acknowledge it.
    Consume(usize),
}

const WORKS: [(&str, Work); 4] = [
    ("publish, await confirm", Work::Confirm(1)),
    ("the same, 64 at a time", Work::Confirm(64)),
    ("publish, consume, ack", Work::Consume(1)),
    ("the same, 64 at a time", Work::Consume(64)),
];

/// How many messages a second each broker handled.
struct Run {
    embedded: f64,
    rabbitmq: f64,
}

/// Measures both brokers, and prints a table.
///
/// # Errors
/// If there is no RabbitMQ at `AMQP_URL` or on this machine, or if a message is lost.
pub async fn run(options: Options) -> Result<()> {
    let before = resident(std::process::id())?;
    let start = Instant::now();
    let broker = Broker::start().await?;
    drop(TcpStream::connect(broker.address()).await?);
    let ready = start.elapsed();
    let idle = resident(std::process::id())?;
    let rabbitmq = TestBroker::rabbitmq().await?;

    let mut runs: [Vec<Run>; WORKS.len()] = Default::default();
    for round in 0..options.rounds {
        for ((name, work), runs) in WORKS.iter().zip(&mut runs) {
            print(&format!("\rround {} of {}, {name:<30}", round + 1, options.rounds));
            let embedded =
                async || measure(&broker.url(), *work, &options).await.context("the embedded broker");
            let other = async || measure(&rabbitmq.url, *work, &options).await.context("RabbitMQ");
            // Each broker is first in every second round.
            runs.push(if round % 2 == 0 {
                let embedded = embedded().await?;
                Run { embedded, rabbitmq: other().await? }
            } else {
                let rabbitmq = other().await?;
                Run { embedded: embedded().await?, rabbitmq }
            });
        }
    }
    print(&format!(
        "\r{:60}\rmessages/s of {} bytes, medians of {} rounds\n{:<26}{:>10}{:>10}{:>8}\n",
        "", options.size, options.rounds, "", "embedded", "RabbitMQ", "ratio"
    ));
    for ((name, _), runs) in WORKS.iter().zip(&runs) {
        print(&format!(
            "{name:<26}{:>10.0}{:>10.0}{:>8.2}\n",
            median(runs.iter().map(|run| run.embedded)),
            median(runs.iter().map(|run| run.rabbitmq)),
            median(runs.iter().map(|run| run.embedded / run.rabbitmq)),
        ));
    }
    let after = resident(std::process::id())?;
    print(&format!(
        "embedded: ready after {:.1} ms; resident {before:.1} MB before, {idle:.1} MB with it, {after:.1} MB now\n",
        ready.as_secs_f64() * 1e3
    ));
    Ok(())
}

async fn measure(url: &str, work: Work, options: &Options) -> Result<f64> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    let queue = format!("bench.{}", Uuid::new_v4().simple());
    channel
        .queue_declare(queue.as_str().into(), QueueDeclareOptions::durable(), FieldTable::default())
        .await?;
    let body = vec![b'x'; options.size];
    let elapsed = match work {
        Work::Confirm(at_once) => {
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            confirm(&channel, &queue, &body, options.messages / 10, at_once).await?;
            confirm(&channel, &queue, &body, options.messages, at_once).await?
        }
        Work::Consume(at_once) => {
            let mut consumer = channel
                .basic_consume(
                    queue.as_str().into(),
                    "".into(),
                    BasicConsumeOptions::default(),
                    FieldTable::default(),
                )
                .await?;
            consume(&channel, &mut consumer, &queue, &body, options.messages / 10, at_once).await?;
            consume(&channel, &mut consumer, &queue, &body, options.messages, at_once).await?
        }
    };
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await?;
    connection.close(200, "done".into()).await?;
    Ok(options.messages as f64 / elapsed.as_secs_f64())
}

async fn publish(channel: &Channel, queue: &str, body: &[u8]) -> lapin::Result<lapin::PublisherConfirm> {
    let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
    channel.basic_publish("".into(), queue.into(), options, body, properties).await
}

async fn confirm(
    channel: &Channel,
    queue: &str,
    body: &[u8],
    messages: usize,
    at_once: usize,
) -> Result<Duration> {
    let start = Instant::now();
    for _ in 0..messages.div_ceil(at_once) {
        let mut confirms = Vec::with_capacity(at_once);
        for _ in 0..at_once {
            confirms.push(publish(channel, queue, body).await?);
        }
        let confirms = try_join_all(confirms).await?;
        ensure!(
            confirms.iter().all(|confirm| *confirm == Confirmation::Ack(None)),
            "a message was not taken"
        );
    }
    Ok(start.elapsed())
}

async fn consume(
    channel: &Channel,
    consumer: &mut Consumer,
    queue: &str,
    body: &[u8],
    messages: usize,
    at_once: usize,
) -> Result<Duration> {
    let start = Instant::now();
    for _ in 0..messages.div_ceil(at_once) {
        for _ in 0..at_once {
            publish(channel, queue, body).await?;
        }
        for _ in 0..at_once {
            let delivery = consumer.next().await.context("cancelled")??;
            delivery.ack(BasicAckOptions::default()).await?;
        }
    }
    Ok(start.elapsed())
}
