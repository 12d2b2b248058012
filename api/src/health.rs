//! Alive, ready, and the probe: a container without a shell asks itself.

use crate::router::App;
use anyhow::{Context, ensure};
use axum::{Json, extract::State, http::StatusCode};
use serde_json::{Value, json};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

/// `GET /readyz`: 200 if every dependency answers, else 503; the body says which.
pub async fn ready(State(app): State<Arc<App>>) -> (StatusCode, Json<Value>) {
    let mut usercenter = app.usercenter_health.clone();
    let check = usercenter.check(HealthCheckRequest::default());
    let answer = timeout(Duration::from_secs(1), check).await;
    let usercenter = matches!(answer, Ok(Ok(answer)) if answer.get_ref().status() == ServingStatus::Serving);
    let broker = app.publisher.is_connected();

    let status = if usercenter && broker { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({ "usercenter": usercenter, "broker": broker })))
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
