//! Decides when a trace is drawn: once it is complete and has not changed for a moment. Spans that arrive after
//! that are drawn separately.

use super::terminal::{MAX_SPANS, Terminal};
use backend::Backend;
use harness::trace::Span;
use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};
use tokio::sync::broadcast::{self, error::TryRecvError};

/// How long a trace must be unchanged before it is drawn. The spans of one request come from three processes,
/// in separate batches.
const QUIET: Duration = Duration::from_millis(500);

/// How long a trace with a missing root or parent must be unchanged before it is drawn without that span.
const PATIENCE: Duration = Duration::from_secs(3);

/// The largest number of traces that are drawn per second, first without load, then under load. All other
/// traces are only counted, because nobody reads every trace.
const PER_SECOND: [usize; 2] = [4, 1];

/// The number of traces for which [`View`] remembers the spans that were drawn.
const REMEMBERED: usize = 1000;

/// The traces that have changed and are not drawn yet.
#[derive(Default)]
pub struct View {
    /// The changes that the current backend reports.
    changes: Option<broadcast::Receiver<String>>,
    /// When each trace last changed.
    arriving: HashMap<String, Instant>,
    /// The latest traces that were drawn, and the ids of their spans.
    drawn: VecDeque<(String, HashSet<String>)>,
    /// The current second: its start, how many traces were drawn in it, and how many were not.
    second: Option<(Instant, usize, u64)>,
}

impl View {
    /// Follows a backend that has just started.
    pub fn follow(&mut self, backend: &Backend) {
        self.changes = Some(backend.changes());
    }

    /// Returns the drawings of the traces that are due now. If a trace was drawn before, the new drawing
    /// shows only its new spans and their ancestors.
    pub fn due(&mut self, backend: &Backend, under_load: bool) -> Vec<String> {
        let now = Instant::now();
        let (begin, mut count, mut missed) = self.second.unwrap_or((now, 0, 0));
        while let Some(changes) = &mut self.changes {
            match changes.try_recv() {
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
        let mut drawings = Vec::new();
        for trace_id in quiet {
            let spans = backend.trace(&trace_id);
            let waited = self.arriving[&trace_id].elapsed();
            if !is_complete(&spans) && waited < PATIENCE {
                continue;
            }
            self.arriving.remove(&trace_id);
            if count < PER_SECOND[usize::from(under_load)] {
                count += 1;
                let url = format!("http://localhost:{}/trace/{trace_id}", backend.addresses().query.port());
                let ids = spans.iter().take(MAX_SPANS).map(|span| span.span_id.clone()).collect();
                let known = self.remember(trace_id, ids);
                drawings.push(Terminal::now().draw(&spans, &known, &url));
            } else {
                missed += 1;
            }
        }
        self.second = Some((begin, count, missed));
        if now.duration_since(begin) >= Duration::from_secs(1) {
            self.second = None;
            if missed > 0 {
                drawings.push(format!("… and {missed} more traces, which are on the page"));
            }
        }
        drawings
    }

    /// Remembers which spans of a trace are drawn now. Returns the spans of this trace that were drawn
    /// before.
    fn remember(&mut self, trace_id: String, ids: HashSet<String>) -> HashSet<String> {
        let before = self.drawn.iter().position(|(drawn, _)| *drawn == trace_id);
        let before = before.and_then(|position| self.drawn.remove(position));
        self.drawn.truncate(REMEMBERED - 1);
        self.drawn.push_front((trace_id, ids));
        before.map(|(_, ids)| ids).unwrap_or_default()
    }
}

/// Returns whether `spans` has the parent of every span except one. That span is the root, or a child of the
/// caller's span, which does not arrive here.
fn is_complete(spans: &[Span]) -> bool {
    let ids: HashSet<&str> = spans.iter().map(|span| span.span_id.as_str()).collect();
    let without_parent = spans.iter().filter(|span| !ids.contains(span.parent_span_id.as_str())).count();
    without_parent == 1
}
