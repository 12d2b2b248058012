//! The HTTP service. It logs a user in with the help of usercenter, and publishes the login.
//!
//! - [`config`]: flags and environment variables
//! - `app`: the state that the handlers use
//! - [`router`]: every route and every layer
//! - [`bounds`]: bounds on the size and the time of requests
//! - `body`: reads the body of a request, before the handler runs
//! - `login`: the handler, with the hand-written span `local`
//! - [`publisher`]: publishes a login, with the hand-written span `send_msg_mq`
//! - [`outbox`]: delivery to the broker, or to disk and later to the broker
//! - [`spool`]: an operator's commands on the spool of an instance that no longer runs
//! - `token`: the access token; `tracer`: the tracer of the hand-written spans
//! - `problem`: which failure gets which answer
//! - `host`: the header `Host`
//! - [`health`]: readiness, and the probe that `api health` makes
//! - `server`: serves connections; `head`: reads the headers of a connection's first request
//! - `stream`: notices that the client has reset the connection
//! - [`usercenter`]: the gRPC client, and every layer around it

mod app;
mod body;
pub mod bounds;
pub mod config;
mod head;
pub mod health;
mod host;
mod login;
pub mod outbox;
mod problem;
pub mod publisher;
pub mod router;
mod server;
pub mod spool;
mod stream;
mod token;
mod tracer;
pub mod usercenter;

use anyhow::{Context, bail};
use app::App;
use config::Config;
use outbox::Spool;
use proto::{
    topology::{EXCHANGE, QUEUE, ROUTING_KEY},
    usercenter::v1::usercenter_client::UsercenterClient,
};
use publisher::Publisher;
use server::MaxConnections;
use serving::{listener::reserve_files, shutdown::Shutdown};
use std::sync::Arc;
use token::TokenIssuer;
use tokio::{net::TcpListener, select};
use tonic::transport::Endpoint;
use usercenter::Connection;

/// Serves on `listener` until `shutdown`.
///
/// # Errors
/// If the configuration can't be used, the spool can't be opened, or a task or thread panics. A failed
/// connection to usercenter or to the broker is not an error, because api connects again in the background.
pub async fn run(config: &Config, listener: TcpListener, shutdown: &Shutdown) -> anyhow::Result<()> {
    let mut endpoint = Endpoint::from(config.usercenter_url.clone())
        .connect_timeout(config.usercenter_timeout)
        .tcp_nodelay(true);
    if let Some(tls) = config.usercenter_tls().map_err(anyhow::Error::msg)? {
        endpoint = endpoint.tls_config(tls).context("TLS to usercenter")?;
    }
    let channel = Connection::new(endpoint, config.usercenter_timeout / 2);
    let limits = usercenter::CallLimits {
        timeout: config.usercenter_timeout,
        attempts: config.usercenter_attempts,
        circuit_pause: config.usercenter_circuit_pause,
    };
    let layered = usercenter::in_layers(&config.usercenter_url, limits, channel.clone());
    let spool = Spool::open(&config.data_dir, config.spool_capacity())
        .with_context(|| format!("opening the spool in {}", config.data_dir.display()))?;
    let (publisher, mut publishing) = Publisher::start(
        config.amqp.server().map_err(anyhow::Error::msg)?,
        config.amqp.topology(EXCHANGE, ROUTING_KEY, QUEUE),
        config.publish_options(),
        spool,
    );
    let secret = config.access_secret().map_err(anyhow::Error::msg)?;
    let app = Arc::new(App {
        usercenter: UsercenterClient::new(layered),
        tokens: TokenIssuer::new(secret, config.access_expire),
        publisher,
        shutdown: shutdown.clone(),
        usercenter_health: usercenter::health(channel),
    });

    let limits = router::RequestLimits { max_in_flight: config.max_in_flight, deadline: config.deadline };
    let router = router::router(app, limits);
    let in_all = reserve_files(config.max_connections);
    let by_address = config.max_connections_per_address.unwrap_or_else(|| in_all.div_ceil(2));
    let max = MaxConnections { in_all, by_address };
    let schedule = select! {
        schedule = server::serve(listener, router, max, shutdown.clone()) => schedule,
        part = publishing.failed() => bail!("{part} panicked"),
    };
    publishing.close(schedule.close_by).await;
    Ok(())
}
