//! Makes each span end at its start plus the time that has passed since then. The SDK takes the start and the
//! end of a span from the wall clock. If that clock were set back in between, the span would end before its
//! start.

use opentelemetry::trace::SpanId;
use opentelemetry_sdk::trace::SpanData;
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

/// A difference of at most this much is only drift, or the time between reading one clock and reading the
/// other.
const DRIFT: Duration = Duration::from_millis(100);

/// When each open span started, by the wall clock and by the monotonic clock.
#[derive(Debug, Default)]
pub(crate) struct Clock(Mutex<HashMap<SpanId, (SystemTime, Instant)>>);

impl Clock {
    /// Notes the start of a span.
    pub fn started(&self, span: SpanId) {
        let now = (SystemTime::now(), Instant::now());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(span, now);
    }

    /// Corrects the times of a span that has just ended, if the wall clock was set since the span started.
    pub fn ended(&self, span: &mut SpanData) {
        let started =
            self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&span.span_context.span_id());
        if let Some((wall, monotonic)) = started {
            correct(span, wall + monotonic.elapsed(), SystemTime::now());
        }
    }
}

/// Corrects the times of a span that ended when the wall clock said `now` instead of `right`.
fn correct(span: &mut SpanData, right: SystemTime, now: SystemTime) {
    let set = |time: SystemTime| match right.duration_since(now) {
        Ok(back) if back > DRIFT => time.checked_add(back),
        Err(forward) if forward.duration() > DRIFT => time.checked_sub(forward.duration()),
        _ => None,
    };
    span.end_time = set(span.end_time).unwrap_or(span.end_time);
    // An event that was recorded after the clock was set has a time outside the span.
    for event in &mut span.events.events {
        if !(span.start_time..=span.end_time).contains(&event.timestamp) {
            event.timestamp = set(event.timestamp).unwrap_or(event.timestamp);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::{
        InstrumentationScope,
        trace::{Event, SpanContext, SpanKind, Status},
    };
    use opentelemetry_sdk::trace::{SpanEvents, SpanLinks};

    /// Corrects a span of ten seconds with an event in its middle. By the wall clock, the event is `event`
    /// seconds and the end is `end` seconds after the start. Returns both numbers after the correction.
    fn corrected(event: i64, end: i64) -> (i64, i64) {
        let at = |seconds: i64| SystemTime::UNIX_EPOCH + Duration::from_secs((1000 + seconds) as u64);
        let mut events = SpanEvents::default();
        events.events.push(Event::new("event", at(event), Vec::new(), 0));
        let mut span = SpanData {
            span_context: SpanContext::NONE,
            parent_span_id: SpanId::INVALID,
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: "span".into(),
            start_time: at(0),
            end_time: at(end),
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events,
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::default(),
        };
        correct(&mut span, at(10), at(end));
        let since = |time: SystemTime| time.duration_since(at(0)).unwrap().as_secs() as i64;
        (since(span.events.events[0].timestamp), since(span.end_time))
    }

    #[test]
    fn a_span_lasts_as_long_as_it_took_however_the_clock_is_set() {
        // The clock was right, or was set a minute back or forward, before or after the event.
        for (event, end) in [(5, 10), (5 - 60, 10 - 60), (5 + 60, 10 + 60), (5, 10 - 60), (5, 10 + 60)] {
            assert_eq!(corrected(event, end), (5, 10), "{event}, {end}");
        }
    }
}
