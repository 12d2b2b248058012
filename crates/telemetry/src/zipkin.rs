//! Exports spans to Zipkin with the published exporter. That exporter is deprecated upstream, so the lasting
//! solution is a collector between the services and Zipkin.
//!
//! `opentelemetry-zipkin` 0.33 leaves out the name of the service, by which Zipkin sorts spans. It also
//! leaves out the remote endpoint, from which Zipkin knows the broker, and gives a root span a parent id of
//! zeros. This file corrects these faults in the JSON of the request.

#![expect(deprecated, reason = "upstream deprecates it for OTLP, which is the default here")]

use crate::{config::ConfigError, otlp::Client};
use async_trait::async_trait;
use http::Uri;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_sdk::Resource;
use opentelemetry_zipkin::ZipkinExporter;
use serde_json::{Value, json};
use std::net::IpAddr;

/// Sends spans as Zipkin v2 JSON.
pub(crate) fn exporter(
    client: Client,
    endpoint: &Uri,
    resource: &Resource,
) -> Result<ZipkinExporter, ConfigError> {
    let tags = resource.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    ZipkinExporter::builder()
        .with_http_client(Mending { client, tags })
        .with_collector_endpoint(endpoint.to_string())
        .build()
        .map_err(|error| ConfigError::new("OTEL_EXPORTER_ZIPKIN_ENDPOINT", error.to_string()))
}

#[derive(Debug)]
struct Mending {
    client: Client,
    /// The attributes of the resource.
    tags: Vec<(String, String)>,
}

#[async_trait]
impl HttpClient for Mending {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = request.into_parts();
        let mut spans: Vec<Value> = serde_json::from_slice(&body)?;
        for span in &mut spans {
            self.mend(span);
        }
        self.client.send_bytes(Request::from_parts(head, serde_json::to_vec(&spans)?.into())).await
    }
}

impl Mending {
    fn mend(&self, span: &mut Value) {
        for (key, value) in &self.tags {
            if key == "service.name" {
                span["localEndpoint"]["serviceName"] = json!(value);
            } else if span["tags"][key].is_null() {
                span["tags"][key] = json!(value);
            }
        }
        if let Some(remote) = remote_endpoint(&span["tags"]) {
            span["remoteEndpoint"] = remote;
        }
        if span["parentId"] == "0000000000000000"
            && let Some(span) = span.as_object_mut()
        {
            span.remove("parentId");
        }
    }
}

/// Returns the other side of a call or of a message. Only the broker gets a name here. A service names itself
/// in its own spans, and Zipkin would draw any other name, such as an address, as a separate service.
fn remote_endpoint(tags: &Value) -> Option<Value> {
    let name = tags["messaging.system"].as_str();
    let tag = |attribute: &str| {
        // The consumer's span names no peer, because a message may be processed after its connection has
        // ended.
        let broker = name.and_then(|_| tags[format!("server.{attribute}")].as_str());
        tags[format!("network.peer.{attribute}")].as_str().or(broker)
    };
    let mut endpoint = json!({});
    if let Some(name) = name {
        endpoint["serviceName"] = json!(name);
    }
    if let Some(address) = tag("address").and_then(|address| address.parse::<IpAddr>().ok()) {
        endpoint[if address.is_ipv4() { "ipv4" } else { "ipv6" }] = json!(address);
    }
    if let Some(port) = tag("port").and_then(|port| port.parse::<u16>().ok()) {
        endpoint["port"] = json!(port);
    }
    Some(endpoint).filter(|endpoint| endpoint != &json!({}))
}
