//! Tells whether the service is ready, and has the probe with which a container without a shell checks its
//! own health.

use crate::{app::App, outbox::Readiness};
use anyhow::{Context, ensure};
use axum::{Json, extract::State, http::StatusCode};
use proto::usercenter::v1::usercenter_server;
use serde_json::{Value, json};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

/// Answers `GET /readyz` with 200 if this instance can take logins, and otherwise with 503. The body shows
/// each condition. A login needs usercenter, either the broker or the spool, and an instance that is not
/// stopping. If the broker refuses the declaration of a queue, api is not ready either, because the refusal
/// does not end by itself.
pub async fn ready(State(app): State<Arc<App>>) -> (StatusCode, Json<Value>) {
    let mut usercenter = app.usercenter_health.clone();
    // Ask for the service by its name. A usercenter that is shutting down reports NOT_SERVING for the empty
    // name at once. For the service's name, it reports SERVING until its `SHUTDOWN_DELAY` is over.
    let check = usercenter.check(HealthCheckRequest { service: usercenter_server::SERVICE_NAME.to_owned() });
    let answer = timeout(Duration::from_secs(1), check).await;
    let usercenter = matches!(answer, Ok(Ok(answer)) if answer.get_ref().status() == ServingStatus::Serving);
    let publisher = app.publisher.readiness();

    let stopping = app.shutdown.has_begun();

    let is_ready = usercenter && publisher.is_ready() && !stopping;
    let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let Readiness { broker, topology, spool, spooled, bytes, age } = publisher;
    let body = json!({
        "usercenter": usercenter,
        "broker": broker,
        "topology": topology,
        "spool": spool,
        "spooled": spooled,
        "spooledBytes": bytes,
        "oldestSeconds": age.as_secs(),
        "stopping": stopping,
    });
    (status, Json(body))
}

/// Asks the service that listens on `listen` whether it is ready. The address 0.0.0.0 means localhost.
///
/// # Errors
/// If the service does not answer within two seconds, or is not ready.
pub async fn probe(listen: SocketAddr) -> anyhow::Result<()> {
    let answer = timeout(Duration::from_secs(2), get(listen, "/readyz"))
        .await
        .with_context(|| format!("no answer from http://{listen}/readyz"))??;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    ensure!(
        head.starts_with("HTTP/1.1 200 "),
        "http://{listen}/readyz answered that it is not ready: {body}"
    );
    Ok(())
}

async fn get(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let mut connection = TcpStream::connect(address)
        .await
        .with_context(|| format!("connecting to http://{address}; is the service running?"))?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    connection.take(64 * 1024).read_to_string(&mut answer).await?;
    Ok(answer)
}
