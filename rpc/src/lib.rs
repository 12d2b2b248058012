//! The gRPC service usercenter.
//!
//! - [`config`]: flags and environment
//! - [`service`]: the gRPC face, and which error becomes which status
//! - [`directory`]: the users

pub mod config;
pub mod directory;
pub mod service;

use anyhow::Context;
use directory::Directory;
use proto::usercenter::v1::{FILE_DESCRIPTOR_SET, usercenter_server::UsercenterServer};
use service::Service;
use std::time::Duration;
use telemetry::grpc::GrpcServerLayer;
use tokio::{
    net::TcpListener,
    sync::oneshot,
    time::{Instant, timeout_at},
};
use tonic::transport::{Server, server::TcpIncoming};

/// Serves on `listener` until `stop` is ready; it tells by when calls in flight must be finished.
///
/// # Errors
/// If the server fails; calls that had to be cut off are logged, not an error.
pub async fn run(listener: TcpListener, stop: impl Future<Output = Instant>) -> anyhow::Result<()> {
    let (health_reporter, health) = tonic_health::server::health_reporter();
    health_reporter.set_serving::<UsercenterServer<Service>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .context("gRPC reflection")?;

    let (drain, draining) = oneshot::channel();
    let server = Server::builder()
        // A client that vanished without a word is noticed.
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        // The first layer listed sees the request first.
        .layer(GrpcServerLayer::new(FILE_DESCRIPTOR_SET)) // the server span
        .add_service(UsercenterServer::new(Service::new(Directory::demo())))
        .add_service(health)
        .add_service(reflection)
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), async {
            let _ = draining.await;
        });
    let mut server = Box::pin(server);

    let deadline = tokio::select! {
        served = &mut server => return served.context("serving gRPC"),
        deadline = stop => deadline,
    };
    tracing::info!("stopping: finishing calls in flight");
    health_reporter.set_not_serving::<UsercenterServer<Service>>().await;
    let _ = drain.send(());
    match timeout_at(deadline, server).await {
        Ok(served) => served.context("serving gRPC"),
        Err(_) => {
            tracing::warn!("calls in flight were cut off at the deadline");
            Ok(())
        }
    }
}
