//! Exports spans to Zipkin with the published exporter. That exporter is deprecated upstream, so the lasting
//! solution is a collector in between.
//!
//! `opentelemetry-zipkin` 0.33 leaves out the name of the service, by which Zipkin sorts spans, and gives a
//! root span a parent id of zeros. Both faults are corrected in the JSON of the request.

#![expect(deprecated, reason = "upstream deprecates it for OTLP, which is the default here")]

use crate::{config::ConfigError, otlp::Client};
use async_trait::async_trait;
use http::Uri;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_sdk::Resource;
use opentelemetry_zipkin::ZipkinExporter;
use serde_json::{Value, json};

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
        if span["parentId"] == "0000000000000000"
            && let Some(span) = span.as_object_mut()
        {
            span.remove("parentId");
        }
    }
}
