//! Alive, ready, and the probe: a container without a shell asks itself.

use crate::{publisher::Readiness, router::App};
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

/// `GET /readyz`: 200 if logins can be taken, else 503. The body says what is there: a login needs usercenter,
/// and the broker or the spool, and an instance that is not stopping.
pub async fn ready(State(app): State<Arc<App>>) -> (StatusCode, Json<Value>) {
    let mut usercenter = app.usercenter_health.clone();
    // The service by its name: an instance that is about to end says of itself ("") that it is not serving,
    // and yet it serves until the connection has moved on.
    let check = usercenter.check(HealthCheckRequest { service: usercenter_server::SERVICE_NAME.to_owned() });
    let answer = timeout(Duration::from_secs(1), check).await;
    let usercenter = matches!(answer, Ok(Ok(answer)) if answer.get_ref().status() == ServingStatus::Serving);
    let publisher = app.publisher.readiness();

    let stopping = app.shutdown.has_begun();

    let is_ready = usercenter && publisher.is_ready() && !stopping;
    let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let Readiness { broker, spool, spooled } = publisher;
    let body = json!({
        "usercenter": usercenter,
        "broker": broker,
        "spool": spool,
        "spooled": spooled,
        "stopping": stopping,
    });
    (status, Json(body))
}

/// Asks the service that listens on `listen` for its readiness; 0.0.0.0 is this machine.
///
/// # Errors
/// If it does not answer within two seconds, or is not ready.
pub async fn probe(listen: SocketAddr) -> anyhow::Result<()> {
    let answer = timeout(Duration::from_secs(2), get(listen, "/readyz")).await.context("no answer")??;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    ensure!(head.starts_with("HTTP/1.1 200 "), "not ready: {body}");
    Ok(())
}

async fn get(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let mut connection = TcpStream::connect(address).await.context("connecting")?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    connection.take(64 * 1024).read_to_string(&mut answer).await?;
    Ok(answer)
}
