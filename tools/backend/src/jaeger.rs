//! Jaeger's query API, `/api/…`, which Jaeger's page and Grafana call.

use super::{
    ids::TraceId,
    parameters::{self, Parameters, Refusal},
    query::{blocking, json},
    search::Filter,
    spans::{DecodedSpan, StoredSpan},
    store::Store,
    tags::{self, Tag},
};
use axum::{
    Router,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{any, get, post},
};
use prost::Message;
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

/// The default limit on the number of traces that a search returns, as in Jaeger.
const DEFAULT_LIMIT: usize = 100;

/// The default period in which dependencies are counted, in nanoseconds. It is a day, as in Jaeger.
const DEFAULT_DEPENDENCIES_LOOKBACK: u64 = 24 * 3600 * 1_000_000_000;

pub(super) fn routes() -> Router<Arc<Store>> {
    Router::new()
        .route("/api/services", get(services))
        .route("/api/services/{service}/operations", get(operation_names))
        .route("/api/operations", get(operations))
        .route("/api/traces", get(search))
        .route("/api/traces/{id}", get(trace))
        .route("/api/dependencies", get(dependencies))
        // Jaeger also refuses these requests when it has no storage for metrics and no archive.
        .route("/api/metrics/{name}", get(async || not_implemented("metrics querying is currently disabled")))
        .route("/api/archive/{id}", post(async || not_implemented("archive span storage was not configured")))
        .route(
            "/api/{*rest}",
            any(async || Refusal(StatusCode::NOT_FOUND, "there is no such API".to_owned())),
        )
}

/// The JSON object around every response.
#[derive(Serialize)]
pub(super) struct Envelope<T> {
    data: T,
    total: usize,
    limit: usize,
    offset: usize,
    errors: Option<Vec<Error>>,
}

#[derive(Serialize)]
struct Error {
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
    msg: String,
    #[serde(rename = "traceID", skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
}

/// An operation of a service.
#[derive(Serialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "camelCase")]
struct Operation {
    name: String,
    span_kind: &'static str,
}

#[derive(Serialize)]
struct JaegerTrace<'a> {
    #[serde(rename = "traceID")]
    trace_id: String,
    spans: Vec<JaegerSpan<'a>>,
    processes: BTreeMap<String, Process<'a>>,
    warnings: Option<Vec<String>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JaegerSpan<'a> {
    #[serde(rename = "traceID")]
    trace_id: String,
    #[serde(rename = "spanID")]
    span_id: String,
    operation_name: &'a str,
    references: Vec<Reference>,
    /// Microseconds since 1970.
    start_time: u64,
    /// Microseconds.
    duration: u64,
    tags: Vec<Tag<'a>>,
    logs: Vec<Log<'a>>,
    #[serde(rename = "processID")]
    process_id: String,
    warnings: Option<Vec<String>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Reference {
    ref_type: &'static str,
    #[serde(rename = "traceID")]
    trace_id: String,
    #[serde(rename = "spanID")]
    span_id: String,
}

#[derive(Serialize)]
struct Log<'a> {
    /// Microseconds since 1970.
    timestamp: u64,
    fields: Vec<Tag<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Process<'a> {
    service_name: &'a str,
    tags: Vec<Tag<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Dependency {
    parent: String,
    child: String,
    call_count: u64,
}

async fn services(State(store): State<Arc<Store>>) -> Response {
    blocking(move || {
        let traces = store.traces();
        let names: BTreeSet<&str> =
            traces.iter().flat_map(|trace| trace.spans()).map(StoredSpan::service).collect();
        Ok(json(&Envelope::new(names.into_iter().collect())))
    })
    .await
}

async fn operation_names(State(store): State<Arc<Store>>, Path(service): Path<String>) -> Response {
    blocking(move || {
        let names: BTreeSet<_> = operations_of(&store, &service, None).into_iter().map(|o| o.name).collect();
        Ok(json(&Envelope::new(names.into_iter().collect())))
    })
    .await
}

async fn operations(State(store): State<Arc<Store>>, parameters: Parameters) -> Response {
    blocking(move || {
        let Some(service) = parameters.first("service") else {
            return Err(Refusal::malformed("parameter 'service' is required"));
        };
        Ok(json(&Envelope::new(operations_of(&store, service, parameters.first("spanKind")))))
    })
    .await
}

async fn trace(State(store): State<Arc<Store>>, Path(id): Path<String>) -> Response {
    blocking(move || {
        let id = parameters::trace_id(&id).map_err(|error| Refusal::malformed(&error))?;
        let Some(trace) = store.trace(id) else {
            return Err(Refusal(StatusCode::NOT_FOUND, "trace not found".to_owned()));
        };
        Ok(json(&Envelope::new(vec![JaegerTrace::new(id, &trace.decoded())])))
    })
    .await
}

/// `/api/traces`: returns the traces named by `traceID`, or else the traces that the other parameters
/// describe.
async fn search(State(store): State<Arc<Store>>, parameters: Parameters) -> Response {
    blocking(move || {
        let limit = parameters.limit("limit", DEFAULT_LIMIT)?;
        let filter = Filter::from_parameters(&parameters)?;
        let ids: BTreeSet<TraceId> = parameters
            .all("traceID")
            .map(parameters::trace_id)
            .collect::<Result<_, _>>()
            .map_err(|error| Refusal::malformed(&format!("cannot parse traceID param: {error}")))?;
        let mut errors = Vec::new();
        let traces = if !ids.is_empty() {
            let (found, missing): (Vec<_>, Vec<_>) =
                ids.into_iter().map(|id| (id, store.trace(id))).partition(|(_, trace)| trace.is_some());
            errors.extend(missing.into_iter().map(|(id, _)| Error {
                code: None,
                msg: "trace not found".to_owned(),
                trace_id: Some(id.to_string()),
            }));
            found.into_iter().filter_map(|(_, trace)| trace).collect()
        } else if filter.service.is_none() {
            return Err(Refusal::malformed("parameter 'service' is required"));
        } else {
            filter.find(&store, limit)
        };
        let decoded: Vec<_> = traces.iter().map(|trace| (trace.id, trace.decoded())).collect();
        let traces = decoded.iter().map(|(id, spans)| JaegerTrace::new(*id, spans));
        let mut envelope = Envelope::new(traces.collect());
        envelope.errors = (!errors.is_empty()).then_some(errors);
        Ok(json(&envelope))
    })
    .await
}

/// Returns how often each service calls each other service in the traces that start in the requested period.
/// A call is a span whose parent belongs to another service.
async fn dependencies(State(store): State<Arc<Store>>, parameters: Parameters) -> Response {
    blocking(move || {
        let end = parameters.parsed("endTs", parameters::milliseconds)?.unwrap_or_else(parameters::now);
        let lookback = parameters.parsed("lookback", parameters::milliseconds)?;
        let from = end.saturating_sub(lookback.unwrap_or(DEFAULT_DEPENDENCIES_LOOKBACK));
        let mut calls: BTreeMap<(String, String), u64> = BTreeMap::new();
        for trace in store.traces().iter().filter(|trace| (from..=end).contains(&trace.start)) {
            for span in trace.spans() {
                let Some(parent) = span.parent.and_then(|parent| trace.span(parent)) else {
                    continue;
                };
                if parent.service() != span.service() {
                    *calls.entry((parent.service().to_owned(), span.service().to_owned())).or_default() += 1;
                }
            }
        }
        let calls = calls.into_iter();
        let calls = calls.map(|((parent, child), call_count)| Dependency { parent, child, call_count });
        Ok(json(&Envelope::new(calls.collect())))
    })
    .await
}

fn not_implemented(why: &str) -> Refusal {
    Refusal(StatusCode::NOT_IMPLEMENTED, why.to_owned())
}

/// Returns the operations of a service, of one span kind or of all span kinds.
fn operations_of(store: &Store, service: &str, kind: Option<&str>) -> Vec<Operation> {
    let traces = store.traces();
    let spans = traces.iter().flat_map(|trace| trace.spans()).filter(|span| span.service() == service);
    let operations: BTreeSet<(&str, &'static str)> = spans
        .map(|span| (&*span.name, tags::kind(span.kind).unwrap_or("internal")))
        .filter(|(_, of)| kind.is_none_or(|kind| kind == *of))
        .collect();
    operations.into_iter().map(|(name, span_kind)| Operation { name: name.to_owned(), span_kind }).collect()
}

impl<T> Envelope<Vec<T>> {
    pub fn new(data: Vec<T>) -> Self {
        let total = data.len();
        Self::part(data, total)
    }

    /// Returns an envelope for some of `total` items.
    pub fn part(data: Vec<T>, total: usize) -> Self {
        Self { data, total, limit: 0, offset: 0, errors: None }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Self(status, msg) = self;
        let errors = Some(vec![Error { code: Some(status.as_u16()), msg, trace_id: None }]);
        let envelope = Envelope { data: (), total: 0, limit: 0, offset: 0, errors };
        (status, json(&envelope)).into_response()
    }
}

impl<'a> JaegerTrace<'a> {
    fn new(id: TraceId, spans: &'a [DecodedSpan<'a>]) -> Self {
        let mut processes = Processes::default();
        let spans = spans.iter().map(|span| JaegerSpan::new(id, span, processes.id(span.stored))).collect();
        Self { trace_id: id.to_string(), spans, processes: processes.processes, warnings: None }
    }
}

impl<'a> JaegerSpan<'a> {
    fn new(trace_id: TraceId, decoded: &'a DecodedSpan<'a>, process_id: String) -> Self {
        let DecodedSpan { stored, span } = decoded;
        let logs = span
            .events
            .iter()
            .map(|event| Log { timestamp: event.time_unix_nano / 1000, fields: tags::of_event(event) });
        Self {
            trace_id: trace_id.to_string(),
            span_id: stored.id.to_string(),
            operation_name: &span.name,
            references: references(trace_id, stored),
            start_time: span.start_time_unix_nano / 1000,
            duration: stored.duration() / 1000,
            tags: tags::of_span(decoded),
            logs: logs.collect(),
            process_id,
            warnings: None,
        }
    }
}

/// Returns a reference to the parent, then references to the links. As in Jaeger, the reference to the parent
/// is left out if a link leads to the parent.
fn references(trace_id: TraceId, stored: &StoredSpan) -> Vec<Reference> {
    // OTLP allows a link with attributes only, but a reference needs a trace id and a span id.
    let links = stored.links.iter().map(|(trace_id, span_id)| Reference {
        ref_type: "FOLLOWS_FROM",
        trace_id: trace_id.to_string(),
        span_id: span_id.to_string(),
    });
    let mut references: Vec<_> = links.collect();
    if let Some(parent) = stored.parent {
        let (trace_id, span_id) = (trace_id.to_string(), parent.to_string());
        if !references.iter().any(|link| link.trace_id == trace_id && link.span_id == span_id) {
            references.insert(0, Reference { ref_type: "CHILD_OF", trace_id, span_id });
        }
    }
    references
}

/// The processes of a trace. Each process is listed once, although its resource comes with every batch of
/// spans.
#[derive(Default)]
struct Processes<'a> {
    processes: BTreeMap<String, Process<'a>>,
    /// The process ids by the encoded resource.
    ids: HashMap<Vec<u8>, String>,
    /// The process ids by the address of the resource. With this map, the resource is not encoded for every
    /// span.
    known: HashMap<usize, String>,
}

impl<'a> Processes<'a> {
    fn id(&mut self, span: &'a StoredSpan) -> String {
        let address = Arc::as_ptr(&span.resource).addr();
        if let Some(id) = self.known.get(&address) {
            return id.clone();
        }
        let next = format!("p{}", self.processes.len() + 1);
        let id = self.ids.entry(span.resource.resource.encode_to_vec()).or_insert(next).clone();
        self.known.insert(address, id.clone());
        self.processes
            .entry(id.clone())
            .or_insert_with(|| Process { service_name: span.service(), tags: tags::of_process(span) });
        id
    }
}
