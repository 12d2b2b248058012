//! The consumer of login messages.
//!
//! - [`config`]: flags and environment
//! - [`consumer`]: the delivery loop, with the hand-written span `mq_consumer_msg`
//! - [`processing`]: what is done with a login; it knows no AMQP

pub mod config;
pub mod consumer;
pub mod processing;

use anyhow::Context;
use config::Config;
use consumer::Consumer;
use futures_util::FutureExt;
use processing::LoginHistory;
use proto::topology::Topology;
use tokio::{
    net::TcpListener,
    time::{Instant, sleep_until},
};
use tonic::transport::{Server, server::TcpIncoming};
use tonic_health::ServingStatus;

/// Consumes until `stop` is ready; it tells by when deliveries in hand must be finished. Answers health
/// checks on `listener`.
///
/// # Errors
/// If the configuration can't be used. A broker that is away is waited for.
pub async fn run(
    config: &Config,
    listener: TcpListener,
    stop: impl Future<Output = Instant>,
) -> anyhow::Result<()> {
    let (health_reporter, health) = tonic_health::server::health_reporter();
    health_reporter.set_service_status("", ServingStatus::NotServing).await;
    let health = Server::builder().add_service(health).serve_with_incoming(TcpIncoming::from(listener));
    let consumer = Consumer::new(
        config.amqp_uri().map_err(anyhow::Error::msg)?,
        Topology::with_prefix(&config.amqp_prefix),
        config.prefetch,
        config.relation,
        LoginHistory::default(),
        health_reporter,
    );
    let stop = stop.shared();
    let deadline = async { sleep_until(stop.clone().await).await };
    tokio::select! {
        served = health => served.context("serving health checks"),
        () = consumer.run(stop.clone().map(drop)) => Ok(()),
        () = deadline => {
            tracing::warn!("deliveries in hand were cut off at the deadline");
            Ok(())
        }
    }
}
