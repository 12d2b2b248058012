//! The page's endpoints beside Jaeger's API: the latest traces of all services, and events when a trace
//! changes.

use super::{
    jaeger::Envelope,
    parameters::{self, Parameters, Refusal},
    query::{blocking, json},
    search::{self, Filter},
    spans::StoredSpan,
    store::{Store, Trace},
};
use axum::{
    Router,
    extract::State,
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
    routing::get,
};
use futures_util::stream;
use serde::Serialize;
use serde_json::json;
use std::{
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

/// How long changes are collected before they are sent, so that each trace is sent at most four times a second.
const PAUSE: Duration = Duration::from_millis(250);

/// The largest number of changed traces that are sent after a pause. Further changed traces are not sent.
const MAX_CHANGED: usize = 100;

/// How often a comment is sent on an idle stream, so that a dead connection is noticed.
const HEARTBEAT: Duration = Duration::from_secs(15);

pub(super) fn routes() -> Router<Arc<Store>> {
    Router::new()
        .route("/api/recent", get(recent))
        .route("/api/events", get(events))
        .route("/api/statistics", get(statistics))
}

/// A summary of a trace, for one line of the list.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Summary<'a> {
    #[serde(rename = "traceID")]
    trace_id: String,
    root_service: &'a str,
    root_operation: &'a str,
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

/// Returns the latest traces. Unlike in Jaeger's search, the service may be left out, and the duration that
/// counts is the whole trace's, which the list shows.
async fn recent(State(store): State<Arc<Store>>, parameters: Parameters) -> Response {
    blocking(move || {
        let limit = parameters.limit("limit", DEFAULT_LIMIT)?;
        let mut filter = Filter::from_parameters(&parameters)?;
        let min_duration = filter.min_duration.take().unwrap_or(0);
        let max_duration = filter.max_duration.take().unwrap_or(u64::MAX);
        let traces = match parameters.parsed("traceID", parameters::trace_id)? {
            Some(id) => store.trace(id).into_iter().collect(),
            None => search::latest_first(&store),
        };
        let traces = traces.iter().filter(|trace| {
            (min_duration..=max_duration).contains(&trace.duration()) && filter.matches_trace(trace)
        });
        let summaries: Vec<_> = traces.take(limit).map(|trace| Summary::new(trace)).collect();
        Ok::<_, Refusal>(json(&Envelope::new(summaries)))
    })
    .await
}

/// Sends server-sent events: the summary of each trace that gets spans or log records.
async fn events(State(store): State<Arc<Store>>) -> Response {
    let (changes, log_changes) = (store.changes(), store.log_changes());
    let feed = Feed { store, changes, log_changes, changed: HashSet::new() };
    let events = stream::unfold(feed, |mut feed| async {
        let event = feed.next().await?;
        Some((Ok::<_, Infallible>(event), feed))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(HEARTBEAT)).into_response()
}

/// Returns how full the store is, and its limits.
async fn statistics(State(store): State<Arc<Store>>) -> Response {
    json(&json!({ "statistics": store.statistics(), "limits": store.limits() }))
}

/// The events of one client. An event is made only when the previous event has been written. If the client
/// reads slowly, changed traces wait in `changed`, without duplicates. Beyond `MAX_CHANGED`, changed traces are
/// dropped.
struct Feed {
    store: Arc<Store>,
    changes: Receiver<String>,
    log_changes: Receiver<String>,
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
                change = self.log_changes.recv() => change,
            };
            match change {
                Ok(id) => self.changed.insert(id),
                Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return None,
            };
            sleep(PAUSE).await;
            for changes in [&mut self.changes, &mut self.log_changes] {
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
            start_time: trace.start / 1000,
            duration: trace.duration() / 1000,
            spans: trace.spans().len(),
            errors,
            services: services.into_iter().map(|(name, spans)| Service { name, spans }).collect(),
        }
    }
}

/// Returns the span without a parent or, while there is no such span, the earliest span whose parent is
/// missing.
fn root(trace: &Trace) -> Option<&StoredSpan> {
    trace.spans().min_by_key(|stored| {
        let is_child = stored.parent.is_some_and(|parent| trace.span(parent).is_some());
        (is_child, stored.parent.is_some(), stored.start, stored.id)
    })
}
