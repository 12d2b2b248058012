//! The consumer of login messages.
//!
//! - [`config`]: flags and environment variables
//! - `consumer`: the delivery loop; `claim`: which history the queue belongs to
//! - `attempt`: one delivery, with the hand-written span `mq_consumer_msg`; `failure`: why an attempt
//!   failed
//! - [`processing`]: processes a login, and knows no AMQP
//! - [`history`]: the database in which each login takes effect once
//! - `forwarder`: publishes messages again; `properties`: what these messages carry
//! - [`dead_letters`]: lets an operator look at dead letters and replay them

mod attempt;
pub mod bounds;
mod claim;
pub mod config;
mod consumer;
pub mod dead_letters;
mod failure;
mod forwarder;
pub mod history;
pub mod processing;
mod properties;

use anyhow::{Context, bail};
use attempt::Attempts;
use config::Config;
use consumer::Consumer;
use forwarder::Forwarder;
use futures_util::FutureExt;
use history::{History, Login, Processed};
use proto::topology::{EXCHANGE, QUEUE, ROUTING_KEY};
use serving::{grpc, listener::reserve_files, shutdown::Shutdown};
use telemetry::amqp::Broker;
use tokio::{net::TcpListener, select, sync::watch, time::sleep_until};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::{BoxError, Service, ServiceBuilder};

/// Makes the service that processes a login. Layers are added here, the outermost first. Each layer sees
/// every attempt, inside the attempt's span.
pub fn processing_stack(
    history: History,
) -> impl Service<Login, Response = Processed, Error: Into<BoxError>> + Clone {
    ServiceBuilder::new().service_fn(move |login| processing::record(history.clone(), login))
}

/// Consumes until `shutdown`. Answers health checks on `listener`.
///
/// # Errors
/// If the configuration can't be used, health checks can't be served, or a task panics. An unavailable broker
/// is not an error, because mq waits until the broker is back.
pub async fn run(config: &Config, listener: TcpListener, shutdown: &Shutdown) -> anyhow::Result<()> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("", ServingStatus::NotServing).await;
    let incoming =
        grpc::incoming(listener, reserve_files(bounds::MAX_CONNECTIONS), bounds::MAX_CONNECTION_AGE, None);
    let health = grpc::builder(bounds::MAX_CONNECTION_AGE).add_service(health).serve_with_incoming(incoming);

    let server = config.amqp.server().map_err(anyhow::Error::msg)?;
    let topology = config.amqp.topology(EXCHANGE, ROUTING_KEY, QUEUE);
    let (history, keeping) = History::start(config.database().map_err(anyhow::Error::msg)?);
    let retry_delays = config.retry_delays.0.clone();
    let (consuming, is_consuming) = watch::channel(false);
    let available = history.available();
    let consumer = Consumer {
        server: server.clone().with_longest_body(bounds::LONGEST_BODY),
        prefetch: config.prefetch,
        commit_interval: config.commit_interval,
        consuming,
        attempts: Attempts {
            processing: processing_stack(history.clone()),
            history,
            broker: Broker::of_hosts(&server.hosts, server.current.clone(), consumer::CLIENT_ID),
            forwarder: Forwarder::new(server.for_another(), topology.clone(), retry_delays.clone()),
            topology,
            relation: config.relation,
            retry_delays,
        },
    };
    let deadline = async { sleep_until(shutdown.begun().await.finish_by).await };
    select! {
        served = health => served.context("serving health checks"),
        () = report(reporter, is_consuming, available, shutdown) => Ok(()),
        () = consumer.run(shutdown.stopped().map(drop)) => Ok(()),
        _ = keeping => bail!("the task of the login history panicked"),
        () = deadline => {
            tracing::warn!("deliveries in hand were cut off at the deadline");
            Ok(())
        }
    }
}

/// Reports until `shutdown` whether the broker and the database are available, because consuming needs both.
async fn report(
    reporter: HealthReporter,
    mut consuming: watch::Receiver<bool>,
    mut available: watch::Receiver<bool>,
    shutdown: &Shutdown,
) {
    loop {
        let can_consume = *consuming.borrow_and_update() && *available.borrow_and_update();
        let serving = can_consume && !shutdown.has_begun();
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        reporter.set_service_status("", status).await;
        let changed = select! {
            changed = consuming.changed() => changed,
            changed = available.changed() => changed,
            _ = shutdown.begun(), if serving => Ok(()),
        };
        if changed.is_err() || serving != can_consume {
            // The process is ending, so it will not be ready again.
            std::future::pending::<()>().await;
        }
    }
}
