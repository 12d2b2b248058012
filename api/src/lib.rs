//! The HTTP service: logs a user in, over usercenter, and publishes the login.
//!
//! - [`config`]: flags and environment
//! - [`router`]: every route and every layer
//! - [`login`]: the handler, with the hand-written span `local`
//! - [`publisher`]: the message to the broker, with the hand-written span `send_msg_mq`
//! - [`token`]: the access token
//! - [`problem`]: which failure gets which answer
//! - [`health`]: alive, ready, and the probe that `api health` makes
//! - [`server`][]: connections

pub mod config;
pub mod health;
pub mod login;
pub mod problem;
pub mod publisher;
pub mod router;
pub mod server;
pub mod token;

use config::Config;
use opentelemetry::global::{self, BoxedTracer};
use proto::{topology::Topology, usercenter::v1::usercenter_client::UsercenterClient};
use publisher::Publisher;
use router::App;
use std::sync::{Arc, LazyLock};
use telemetry::grpc::GrpcClientLayer;
use token::TokenIssuer;
use tokio::{net::TcpListener, time::Instant};
use tonic::transport::Endpoint;
use tower::Layer;

/// Makes the hand-written spans of this service.
static TRACER: LazyLock<BoxedTracer> = LazyLock::new(|| global::tracer("api"));

/// Serves on `listener` until `stop` is ready; it tells by when requests in flight must be finished.
///
/// # Errors
/// If the configuration can't be used. Connections to usercenter and to the broker are made in the
/// background, as often as needed.
pub async fn run(
    config: &Config,
    listener: TcpListener,
    stop: impl Future<Output = Instant>,
) -> anyhow::Result<()> {
    let channel = Endpoint::from(config.usercenter_url.clone())
        .connect_timeout(config.usercenter_timeout)
        .tcp_nodelay(true)
        .connect_lazy();
    let traced = GrpcClientLayer::new(&config.usercenter_url).layer(channel.clone()); // the client span
    let publisher = Publisher::start(
        config.amqp_uri().map_err(anyhow::Error::msg)?,
        Topology::with_prefix(&config.amqp_prefix),
        config.publish_timeout,
    );
    let secret = config.access_secret().map_err(anyhow::Error::msg)?;
    let app = Arc::new(App {
        usercenter: UsercenterClient::new(traced),
        usercenter_timeout: config.usercenter_timeout,
        tokens: TokenIssuer::new(secret, config.access_expire),
        publisher,
        usercenter_health: tonic_health::pb::health_client::HealthClient::new(channel),
    });

    let deadline = server::serve(listener, router::router(app.clone()), stop).await;
    app.publisher.close(deadline).await;
    Ok(())
}
