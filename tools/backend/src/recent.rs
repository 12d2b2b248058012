//! The endpoints that the trace page needs in addition to Jaeger's API: the latest traces of all services, and an
//! event whenever a trace changes.

use super::{
    jaeger::Envelope,
    parameters::{self, Parameters, Refusal},
    query::{blocking, json},
    search::{self, Filter},
    spans::StoredSpan,
    store::{Store, Trace},
    trace::text,
};
use axum::{
    Router,
    extract::{Path, State},
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
    routing::get,
};
use futures_util::stream;
use serde::Serialize;
use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashSet},
    convert::Infallible,
    sync::Arc,
    time::Duration,
};
use tokio::{
    select,
    sync::broadcast::{
        Receiver,
        error::{RecvError, TryRecvError},
    },
    time::sleep,
};

const DEFAULT_LIMIT: usize = 20;

/// How long changes are collected before they are sent, so that each trace is sent at most four times per
/// second.
const PAUSE: Duration = Duration::from_millis(250);

/// The largest number of changed traces that are sent after a pause. If more traces have changed, the others
/// are not sent.
const MAX_CHANGED: usize = 100;

/// The largest number of links to a trace in one response.
const MAX_LINKS: usize = 100;

/// How often an SSE comment is sent on an idle stream, so that a dead connection is noticed.
const HEARTBEAT: Duration = Duration::from_secs(15);

pub(super) fn routes() -> Router<Arc<Store>> {
    Router::new()
        .route("/api/recent", get(recent))
        .route("/api/links/{id}", get(links))
        .route("/api/events", get(events))
}

/// A summary of a trace, for one line of the list.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Summary<'a> {
    #[serde(rename = "traceID")]
    trace_id: String,
    root_service: &'a str,
    root_operation: &'a str,
    /// The root's HTTP or gRPC status. A root without such a status has `error` if it failed, and otherwise
    /// an empty text.
    status: String,
    /// The trace's start, in microseconds since 1970.
    start_time: u64,
    /// The trace's duration in microseconds.
    duration: u64,
    spans: usize,
    /// How many spans have the status error.
    errors: usize,
    services: Vec<Service<'a>>,
}

#[derive(Serialize)]
struct Service<'a> {
    name: &'a str,
    spans: usize,
}

/// A link to a span of the requested trace.
#[derive(Serialize)]
struct Link<'a> {
    #[serde(rename = "traceID")]
    trace_id: String,
    #[serde(rename = "spanID")]
    span_id: String,
    service: &'a str,
    operation: &'a str,
    /// The id of the linked span in the requested trace.
    to: String,
}

/// Returns a part of the list of traces, from number `offset` on, and the total number of traces. The
/// parameter `sort` decides which traces come first: the latest (the default), the longest, or those with
/// errors. Unlike in Jaeger's search, the service is optional, and the limits on the duration apply to the
/// whole trace.
async fn recent(State(store): State<Arc<Store>>, parameters: Parameters) -> Response {
    blocking(move || {
        let limit = parameters.limit("limit", DEFAULT_LIMIT)?;
        let number = |value: &str| value.parse::<usize>().map_err(|error| error.to_string());
        let offset = parameters.parsed("offset", number)?.unwrap_or(0);
        let mut filter = Filter::from_parameters(&parameters)?;
        let min_duration = filter.min_duration.take().unwrap_or(0);
        let max_duration = filter.max_duration.take().unwrap_or(u64::MAX);
        let mut traces: Vec<_> = match parameters.parsed("traceID", parameters::trace_id)? {
            Some(id) => store.trace(id).into_iter().collect(),
            None => search::latest_first(&store),
        };
        traces.retain(|trace| {
            (min_duration..=max_duration).contains(&trace.duration()) && filter.matches_trace(trace)
        });
        match parameters.first("sort") {
            None | Some("newest") => {}
            Some("longest") => traces.sort_by_key(|trace| Reverse(trace.duration())),
            Some("errors") => traces.sort_by_cached_key(|trace| !trace.spans().any(|stored| stored.is_error)),
            Some(_) => return Err(Refusal::malformed("param 'sort' must be newest, longest or errors")),
        }
        let page = traces.iter().skip(offset).take(limit);
        let summaries: Vec<_> = page.map(|trace| Summary::new(trace)).collect();
        Ok::<_, Refusal>(json(&Envelope::part(summaries, traces.len())))
    })
    .await
}

/// Returns the links that spans of other traces have to this trace. The links of the latest trace come first.
async fn links(State(store): State<Arc<Store>>, Path(id): Path<String>) -> Response {
    blocking(move || {
        let id = parameters::trace_id(&id).map_err(|error| Refusal::malformed(&error))?;
        let traces = search::latest_first(&store);
        let others = traces.iter().filter(|trace| trace.id != id);
        let spans = others.flat_map(|trace| trace.spans().map(|stored| (trace.id, stored)));
        let links = spans.flat_map(|(trace_id, stored)| {
            let here = stored.links.iter().filter(|(linked, _)| *linked == id);
            here.map(move |(_, to)| Link {
                trace_id: trace_id.to_string(),
                span_id: stored.id.to_string(),
                service: stored.service(),
                operation: &stored.name,
                to: to.to_string(),
            })
        });
        Ok::<_, Refusal>(json(&Envelope::new(links.take(MAX_LINKS).collect())))
    })
    .await
}

/// Sends server-sent events: the summary of each trace that gets spans, log records, or links from other
/// traces.
async fn events(State(store): State<Arc<Store>>) -> Response {
    let (changes, page_changes) = (store.changes(), store.page_changes());
    let feed = Feed { store, changes, page_changes, changed: HashSet::new() };
    let events = stream::unfold(feed, |mut feed| async {
        let event = feed.next().await?;
        Some((Ok::<_, Infallible>(event), feed))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(HEARTBEAT)).into_response()
}

/// The source of the events for one client. The next event is made only after the previous event has been
/// written. If the client reads slowly, changed traces wait in `changed`, without duplicates. Beyond
/// `MAX_CHANGED`, changed traces are dropped.
struct Feed {
    store: Arc<Store>,
    changes: Receiver<String>,
    page_changes: Receiver<String>,
    changed: HashSet<String>,
}

impl Feed {
    /// Returns the next event, or `None` when the store is gone.
    async fn next(&mut self) -> Option<Event> {
        loop {
            while let Some(id) = self.changed.iter().next().cloned() {
                self.changed.remove(&id);
                // The trace may have been evicted by now.
                if let Some(trace) = id.parse().ok().and_then(|id| self.store.trace(id)) {
                    return Event::default().json_data(Summary::new(&trace)).ok();
                }
            }
            let change = select! {
                change = self.changes.recv() => change,
                change = self.page_changes.recv() => change,
            };
            match change {
                Ok(id) => self.changed.insert(id),
                Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return None,
            };
            sleep(PAUSE).await;
            for changes in [&mut self.changes, &mut self.page_changes] {
                loop {
                    match changes.try_recv() {
                        Ok(id) if self.changed.len() < MAX_CHANGED => self.changed.insert(id),
                        Ok(_) | Err(TryRecvError::Lagged(_)) => continue,
                        Err(TryRecvError::Empty | TryRecvError::Closed) => break,
                    };
                }
            }
        }
    }
}

impl<'a> Summary<'a> {
    fn new(trace: &'a Trace) -> Self {
        let root = root(trace);
        let mut services: BTreeMap<&str, usize> = BTreeMap::new();
        let mut errors = 0;
        for stored in trace.spans() {
            *services.entry(stored.service()).or_default() += 1;
            errors += usize::from(stored.is_error);
        }
        Self {
            trace_id: trace.id.to_string(),
            root_service: root.map_or("", StoredSpan::service),
            root_operation: root.map_or("", |root| &root.name),
            status: root.map(status).unwrap_or_default(),
            start_time: trace.start / 1000,
            duration: trace.duration() / 1000,
            spans: trace.spans().len(),
            errors,
            services: services.into_iter().map(|(name, spans)| Service { name, spans }).collect(),
        }
    }
}

fn status(root: &StoredSpan) -> String {
    let span = root.decoded().span;
    let keys = ["http.response.status_code", "rpc.response.status_code", "rpc.status_code"];
    let status =
        keys.into_iter().find_map(|key| span.attributes.iter().find(|attribute| attribute.key == key));
    let status = status.and_then(|attribute| attribute.value.as_ref()).map(text);
    status.unwrap_or_else(|| if root.is_error { "error" } else { "" }.to_owned())
}

/// Returns the span without a parent or, while there is no such span, the earliest span whose parent is
/// missing.
fn root(trace: &Trace) -> Option<&StoredSpan> {
    trace.spans().min_by_key(|stored| {
        let is_child = stored.parent.is_some_and(|parent| trace.span(parent).is_some());
        (is_child, stored.parent.is_some(), stored.start, stored.id)
    })
}
