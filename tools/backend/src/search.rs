//! Finds the traces that a query describes. As in Jaeger, a trace is found if one of its spans meets all
//! criteria.

use super::{
    parameters::{self, Parameters, Refusal},
    spans::StoredSpan,
    store::{Store, Trace},
    tags,
};
use std::{cmp::Reverse, collections::BTreeMap, sync::Arc};

/// The criteria of a search. A criterion that is not set is met by every span.
#[derive(Debug, Default)]
pub(super) struct Filter {
    pub service: Option<String>,
    pub operation: Option<String>,
    /// The tags that the span, its process or its logs must have, with values written as text.
    pub tags: BTreeMap<String, String>,
    /// The shortest duration of the span, in nanoseconds.
    pub min_duration: Option<u64>,
    /// The longest duration of the span, in nanoseconds.
    pub max_duration: Option<u64>,
    /// The earliest start of the span, in nanoseconds since 1970.
    pub from: Option<u64>,
    /// The latest start of the span, in nanoseconds since 1970.
    pub to: Option<u64>,
}

impl Filter {
    /// Reads the criteria from the parameters of Jaeger's API.
    pub fn from_parameters(parameters: &Parameters) -> Result<Self, Refusal> {
        let mut tags = BTreeMap::new();
        for tag in parameters.all("tag") {
            let (key, value) = tag.split_once(':').ok_or_else(|| {
                Refusal::malformed(&format!(
                    "malformed 'tag' parameter, expecting key:value, received: {tag}"
                ))
            })?;
            tags.insert(key.to_owned(), value.to_owned());
        }
        for json in parameters.all("tags").filter(|json| !json.is_empty()) {
            let more: BTreeMap<String, String> = serde_json::from_str(json).map_err(|error| {
                Refusal::malformed(&format!("malformed 'tags' parameter, cannot unmarshal JSON: {error}"))
            })?;
            tags.extend(more);
        }
        let to = parameters.parsed("end", parameters::microseconds)?;
        let lookback = parameters.parsed("lookback", |value| match value {
            // Jaeger's page sends this value if the user has chosen a start and an end. In that case, the
            // page also sends these two times.
            "custom" => Ok(u64::MAX),
            _ => parameters::duration(value),
        })?;
        let earliest =
            || lookback.map(|lookback| to.unwrap_or_else(parameters::now).saturating_sub(lookback));
        let min_duration = parameters.parsed("minDuration", parameters::duration)?;
        let max_duration = parameters.parsed("maxDuration", parameters::duration)?;
        if min_duration.zip(max_duration).is_some_and(|(min, max)| max < min) {
            return Err(Refusal::malformed("'maxDuration' should be greater than 'minDuration'"));
        }
        Ok(Self {
            service: parameters.first("service").map(str::to_owned),
            operation: parameters.first("operation").map(str::to_owned),
            tags,
            min_duration,
            max_duration,
            from: parameters.parsed("start", parameters::microseconds)?.or_else(earliest),
            to,
        })
    }

    /// Returns the latest traces that meet the criteria, at most `limit`. The search also ends when the
    /// traces found so far have, together, more spans than one trace may have.
    pub fn find(&self, store: &Store, limit: usize) -> Vec<Arc<Trace>> {
        let mut found = Vec::new();
        let mut spans = 0;
        for trace in latest_first(store) {
            if found.len() >= limit || spans > store.limits().spans_of_a_trace() {
                break;
            }
            if self.matches_trace(&trace) {
                spans += trace.spans().len();
                found.push(trace);
            }
        }
        found
    }

    /// Returns whether one of the trace's spans meets all criteria.
    pub fn matches_trace(&self, trace: &Trace) -> bool {
        trace.spans().any(|span| self.matches(span))
    }

    fn matches(&self, stored: &StoredSpan) -> bool {
        let start = stored.start;
        let duration = stored.duration();
        self.service.as_ref().is_none_or(|service| service == stored.service())
            && self.operation.as_ref().is_none_or(|operation| **operation == *stored.name)
            && self.from.is_none_or(|from| start >= from)
            && self.to.is_none_or(|to| start <= to)
            && self.min_duration.is_none_or(|min| duration >= min)
            && self.max_duration.is_none_or(|max| duration <= max)
            && (self.tags.is_empty() || self.matches_tags(stored))
    }

    fn matches_tags(&self, stored: &StoredSpan) -> bool {
        let decoded = stored.decoded();
        let mut all = tags::of_span(&decoded);
        all.extend(tags::of_process(stored));
        all.extend(decoded.span.events.iter().flat_map(tags::of_event));
        let has = |key: &str, value: &str| all.iter().any(|tag| tag.key == key && tag.is(value));
        self.tags.iter().all(|(key, value)| has(key, value))
    }
}

/// Returns all traces, the latest start first.
pub(super) fn latest_first(store: &Store) -> Vec<Arc<Trace>> {
    let mut traces = store.traces();
    traces.sort_unstable_by_key(|trace| Reverse((trace.start, trace.id)));
    traces
}
