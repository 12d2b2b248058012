//! When a trace is drawn: once it is complete and nothing more came for a moment.

use super::terminal::Terminal;
use backend::Backend;
use harness::trace::Span;
use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};
use tokio::sync::broadcast::{self, error::TryRecvError};

/// Spans of one request come from three processes, each with batches of its own.
const QUIET: Duration = Duration::from_millis(500);

/// A trace whose root or some parent does not come is drawn all the same.
const PATIENCE: Duration = Duration::from_secs(3);

/// Under load nobody reads every trace: more than so many at a time are only counted.
const MAX_AT_ONCE: usize = 4;

/// Which traces are on their way.
pub struct View {
    terminal: Terminal,
    page: String,
    changes: broadcast::Receiver<String>,
    /// When each last changed.
    arriving: HashMap<String, Instant>,
}

impl View {
    /// A view of the traces that come from now on.
    pub fn new(backend: &Backend, terminal: Terminal) -> Self {
        let page = format!("http://localhost:{}/trace", backend.addresses().query.port());
        Self { terminal, page, changes: backend.changes(), arriving: HashMap::new() }
    }

    /// The traces to be drawn now.
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

/// One root at least, and every parent is there; the root's may be the caller's.
fn is_complete(spans: &[Span]) -> bool {
    let ids: HashSet<&str> = spans.iter().map(|span| span.span_id.as_str()).collect();
    let without_parent = spans.iter().filter(|span| !ids.contains(span.parent_span_id.as_str())).count();
    without_parent == 1
}
