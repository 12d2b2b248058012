//! Jaeger's current query API, `/api/v3/…`, which returns traces as OTLP/JSON.

use super::{
    jaeger,
    parameters::{self, Parameters, Refusal},
    query::{blocking_or, json},
    search::{self, Filter},
    spans::DecodedSpan,
    store::{Store, Trace},
};
use axum::{
    Router,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{any, get},
};
use opentelemetry_proto::tonic::{common::v1::InstrumentationScope, resource::v1::Resource, trace::v1::Span};
use serde::Serialize;
use serde_json::json;
use std::{collections::HashMap, sync::Arc};

/// How many traces a search returns at most, by default, as in Jaeger.
const DEFAULT_SEARCH_DEPTH: usize = 100;

pub(super) fn routes() -> Router<Arc<Store>> {
    Router::new()
        .route("/api/v3/services", get(services))
        .route("/api/v3/operations", get(operations))
        .route("/api/v3/traces", get(search))
        .route("/api/v3/traces/{id}", get(trace))
        .route("/api/v3/{*rest}", any(async || refusal(not_found("there is no such API"))))
}

/// The JSON object around traces, as the gRPC gateway writes it.
#[derive(Serialize)]
struct Wrapper<'a> {
    result: TracesData<'a>,
}

/// The OTLP message `TracesData`, with contents borrowed from the store. The two types below are also OTLP
/// messages with borrowed contents.
#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct TracesData<'a> {
    resource_spans: Vec<ResourceSpans<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ResourceSpans<'a> {
    resource: &'a Resource,
    scope_spans: Vec<ScopeSpans<'a>>,
    schema_url: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ScopeSpans<'a> {
    scope: &'a InstrumentationScope,
    spans: Vec<&'a Span>,
    schema_url: &'a str,
}

async fn services(State(store): State<Arc<Store>>) -> Response {
    answer(move || Ok(json(&json!({ "services": jaeger::service_names(&store) })))).await
}

async fn operations(State(store): State<Arc<Store>>, parameters: Parameters) -> Response {
    answer(move || {
        let Some(service) = parameters.first("service") else {
            return Err(Refusal::malformed("parameter 'service' is required"));
        };
        let kind = parameters.first("spanKind").or(parameters.first("span_kind"));
        Ok(json(&json!({ "operations": jaeger::operations_of(&store, service, kind) })))
    })
    .await
}

async fn trace(State(store): State<Arc<Store>>, Path(id): Path<String>) -> Response {
    answer(move || {
        let id = parameters::trace_id(&id)
            .map_err(|error| Refusal::malformed(&format!("malformed parameter trace_id: {error}")))?;
        traces(store.trace(id).as_slice())
    })
    .await
}

async fn search(State(store): State<Arc<Store>>, parameters: Parameters) -> Response {
    answer(move || {
        let (filter, limit) = query(&parameters)?;
        traces(&filter.find(&store, limit))
    })
    .await
}

/// Each parameter has a camel-case name, since about Jaeger 2.18, and an older snake-case name.
fn query(parameters: &Parameters) -> Result<(Filter, usize), Refusal> {
    let either = |new: &'static str, old: &'static str| {
        if parameters.first(new).is_some() { new } else { old }
    };
    let text = |name: &str| parameters.first(name).map(str::to_owned);
    let time = |name: &str| parameters.parsed(name, parameters::rfc3339);
    let duration = |name: &str| parameters.parsed(name, parameters::duration);
    let attributes = parameters.first("query.attributes");
    let filter = Filter {
        service: text(either("query.serviceName", "query.service_name")),
        operation: text(either("query.operationName", "query.operation_name")),
        tags: attributes
            .map(|json| search::tags_from_json("query.attributes", json))
            .transpose()?
            .unwrap_or_default(),
        min_duration: duration(either("query.durationMin", "query.duration_min"))?,
        max_duration: duration(either("query.durationMax", "query.duration_max"))?,
        from: time(either("query.startTimeMin", "query.start_time_min"))?,
        to: time(either("query.startTimeMax", "query.start_time_max"))?,
    };
    let depth = either("query.searchDepth", either("query.search_depth", "query.num_traces"));
    Ok((filter.checked()?, parameters.limit(depth, DEFAULT_SEARCH_DEPTH)?))
}

fn traces(traces: &[Arc<Trace>]) -> Result<Response, Refusal> {
    if traces.is_empty() {
        return Err(not_found("No traces found"));
    }
    let mut result = TracesData::default();
    let decoded: Vec<_> = traces.iter().map(|trace| trace.decoded()).collect();
    for spans in &decoded {
        result.add(spans);
    }
    Ok(json(&Wrapper { result }))
}

async fn answer(work: impl FnOnce() -> Result<Response, Refusal> + Send + 'static) -> Response {
    blocking_or(work, refusal).await
}

fn not_found(what: &str) -> Refusal {
    Refusal(StatusCode::NOT_FOUND, what.to_owned())
}

/// Returns an error as the gRPC gateway writes it.
fn refusal(Refusal(status, message): Refusal) -> Response {
    let error = json!({ "error": { "httpCode": status.as_u16(), "message": message } });
    (status, json(&error)).into_response()
}

impl<'a> TracesData<'a> {
    /// Adds the spans, ordered by their start, and groups them again by their resource and scope.
    fn add(&mut self, spans: &'a [DecodedSpan<'a>]) {
        let mut resources = HashMap::new();
        let mut scopes = HashMap::new();
        for DecodedSpan { stored, span } in spans {
            let (resource, scope) = (&stored.resource, &stored.scope);
            let i = *resources.entry(Arc::as_ptr(resource)).or_insert_with(|| {
                let (resource, schema_url) = (&resource.resource, resource.schema_url.as_str());
                self.resource_spans.push(ResourceSpans { resource, scope_spans: Vec::new(), schema_url });
                self.resource_spans.len() - 1
            });
            let scope_spans = &mut self.resource_spans[i].scope_spans;
            // A scope belongs to one resource, because spans that share a scope came in one request with one
            // resource.
            let j = *scopes.entry(Arc::as_ptr(scope)).or_insert_with(|| {
                let (scope, schema_url) = (&scope.scope, scope.schema_url.as_str());
                scope_spans.push(ScopeSpans { scope, spans: Vec::new(), schema_url });
                scope_spans.len() - 1
            });
            scope_spans[j].spans.push(span);
        }
    }
}
