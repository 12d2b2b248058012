//! The gRPC service usercenter.
//!
//! - [`config`]: flags and environment variables
//! - [`layers`]: every layer around the service
//! - `service`: the gRPC API, and which error becomes which status
//! - `directory`: the users

pub mod config;
mod directory;
pub mod layers;
mod protocol;
mod service;

use anyhow::Context;
use config::Config;
use futures_util::FutureExt;
use layers::RequestLimits;
use proto::usercenter::v1::{FILE_DESCRIPTOR_SET, usercenter_server::UsercenterServer};
use resilience::InFlight;
use service::Service;
use serving::{grpc, listener::reserve_files, shutdown::Shutdown};
use tokio::{net::TcpListener, time::sleep_until};
use tonic::transport::Endpoint;
use tonic_health::ServingStatus;

/// The most connections from outside. Only `api` calls this service, with one connection from each instance.
const MAX_CONNECTIONS: usize = 10_000;

/// The largest message that a caller may send, in bytes.
const MAX_MESSAGE: usize = 64 * 1024;

/// Asks the service that listens on `config.listen` whether it is ready, over TLS if the service uses TLS.
///
/// # Errors
/// If the service does not answer within two seconds, or is not serving.
pub async fn health(config: &Config) -> anyhow::Result<()> {
    let Some(tls) = config.tls().map_err(anyhow::Error::msg)? else {
        return serving::health::probe(config.listen).await;
    };
    let (tls, verifier) = tls.asked_by_itself();
    let endpoint = Endpoint::from_shared(format!("https://{}", config.listen))?;
    serving::health::probe_by(endpoint.tls_config_with_verifier(tls, verifier)?).await
}

/// Serves on `listener` until `shutdown`.
///
/// # Errors
/// If the server fails. Calls that are cut off at shutdown are logged, and are not an error.
pub async fn run(config: &Config, listener: TcpListener, shutdown: &Shutdown) -> anyhow::Result<()> {
    let (health_reporter, health) = tonic_health::server::health_reporter();
    health_reporter.set_serving::<UsercenterServer<Service>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .context("gRPC reflection")?;

    let usercenter = UsercenterServer::new(Service);
    let tls = config.tls().map_err(anyhow::Error::msg)?.map(|tls| tls.rustls);
    let incoming = grpc::incoming(listener, reserve_files(MAX_CONNECTIONS), config.max_connection_age, tls);
    let in_flight = InFlight::at_most(config.max_in_flight);
    let limits = RequestLimits { in_flight: in_flight.clone(), deadline: config.deadline };
    let server = layers::in_layers(grpc::builder(config.max_connection_age), limits)
        .add_service(usercenter.max_decoding_message_size(MAX_MESSAGE))
        .add_service(health)
        .add_service(reflection)
        .serve_with_incoming_shutdown(incoming, shutdown.stopped().map(drop));
    let mut server = Box::pin(server);

    // After the signal, load balancers that ask for the health of the instance (the name "") learn that it is
    // no longer ready. Load balancers that ask for the health of the service learn this only later.
    let ends = async {
        let schedule = shutdown.begun().await;
        health_reporter.set_service_status("", ServingStatus::NotServing).await;
        shutdown.stopped().await;
        schedule
    };
    let schedule = tokio::select! {
        biased;
        schedule = ends => schedule,
        served = &mut server => return served.context("serving gRPC"),
    };
    tracing::info!("stopping: finishing calls in flight");
    health_reporter.set_not_serving::<UsercenterServer<Service>>().await;
    tokio::select! {
        served = server => served.context("serving gRPC"),
        // A connection may stay open because its peer does not answer HTTP/2's GOAWAY, or is watching the
        // health.
        () = in_flight.ended() => Ok(()),
        () = sleep_until(schedule.finish_by) => {
            tracing::warn!("calls in flight were cut off at the deadline");
            Ok(())
        }
    }
}
