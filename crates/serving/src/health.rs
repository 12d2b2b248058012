//! The health probe for services that answer gRPC health checks. A container without a shell uses this probe
//! to check its own health.

use anyhow::{Context, ensure};
use std::{net::SocketAddr, time::Duration};
use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

/// Asks the service that listens on `listen` for its health, by the standard gRPC health protocol. The
/// address 0.0.0.0 means localhost.
///
/// # Errors
/// If the service does not answer within two seconds, or if it is not serving.
pub async fn probe(listen: SocketAddr) -> anyhow::Result<()> {
    probe_by(Endpoint::from_shared(format!("http://{listen}"))?).await
}

/// Does the same for a service that is reached in another way, for example over TLS.
///
/// # Errors
/// As for [`probe`].
pub async fn probe_by(endpoint: Endpoint) -> anyhow::Result<()> {
    let endpoint = endpoint.connect_timeout(Duration::from_secs(2)).timeout(Duration::from_secs(2));
    let uri = endpoint.uri().clone();
    let channel =
        endpoint.connect().await.with_context(|| format!("connecting to {uri}; is the service running?"))?;
    let answer = HealthClient::new(channel).check(HealthCheckRequest::default()).await?;
    let status = answer.get_ref().status();
    ensure!(status == ServingStatus::Serving, "{uri} answered {}", status.as_str_name());
    Ok(())
}
