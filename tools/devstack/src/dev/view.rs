//! Decides when a trace is drawn: once it is complete and has not changed for a moment.

use super::terminal::Terminal;
use backend::Backend;
use harness::trace::Span;
use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};
use tokio::sync::broadcast::{self, error::TryRecvError};

/// How long a trace must be unchanged before it is drawn. The spans of one request come from three processes,
/// in separate batches.
const QUIET: Duration = Duration::from_millis(500);

/// How long to wait for a missing root or parent. After that, the trace is drawn without it.
const PATIENCE: Duration = Duration::from_secs(3);

/// The largest number of traces that are drawn at a time. Further traces are only counted, because under load
/// nobody reads every trace.
const MAX_AT_ONCE: usize = 4;

/// The traces that have changed and are not drawn yet.
pub struct View {
    terminal: Terminal,
    page: String,
    changes: broadcast::Receiver<String>,
    /// When each trace last changed.
    arriving: HashMap<String, Instant>,
}

impl View {
    /// Makes a view of the traces that arrive from now on.
    pub fn new(backend: &Backend, terminal: Terminal) -> Self {
        let page = format!("http://localhost:{}/trace", backend.addresses().query.port());
        Self { terminal, page, changes: backend.changes(), arriving: HashMap::new() }
    }

    /// Returns the drawings of the traces that are due now.
    pub fn due(&mut self, backend: &Backend) -> Vec<String> {
        let now = Instant::now();
        let mut missed = 0;
        loop {
            match self.changes.try_recv() {
                Ok(trace_id) => drop(self.arriving.insert(trace_id, now)),
                Err(TryRecvError::Lagged(more)) => missed += more,
                Err(TryRecvError::Empty | TryRecvError::Closed) => break,
            }
        }
        let quiet: Vec<String> = self
            .arriving
            .iter()
            .filter(|(_, changed)| now.duration_since(**changed) >= QUIET)
            .map(|(trace_id, _)| trace_id.clone())
            .collect();
        let mut drawn = Vec::new();
        for trace_id in quiet {
            let spans = backend.trace(&trace_id);
            let waited = self.arriving[&trace_id].elapsed();
            if !is_complete(&spans) && waited < PATIENCE {
                continue;
            }
            self.arriving.remove(&trace_id);
            if drawn.len() < MAX_AT_ONCE {
                drawn.push(self.terminal.draw(&spans, &format!("{}/{trace_id}", self.page)));
            } else {
                missed += 1;
            }
        }
        if missed > 0 {
            drawn.push(format!("… and more: some {missed} traces are not drawn here\n"));
        }
        drawn
    }
}

/// Returns whether exactly one span has no parent among the spans. Its missing parent may be the caller's span.
fn is_complete(spans: &[Span]) -> bool {
    let ids: HashSet<&str> = spans.iter().map(|span| span.span_id.as_str()).collect();
    let without_parent = spans.iter().filter(|span| !ids.contains(span.parent_span_id.as_str())).count();
    without_parent == 1
}
