//! How much memory a decoded span takes, as the store accounts for it.

use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    resource::v1::Resource,
    trace::v1::Span,
};
use std::mem::size_of;

/// What a span owns, itself not included.
pub(super) fn of_span(span: &Span) -> usize {
    let ids = [&span.trace_id, &span.span_id, &span.parent_span_id];
    let events =
        span.events.iter().map(|event| block(event.name.capacity()) + of_attributes(&event.attributes));
    let links = span.links.iter().map(|link| {
        block(link.trace_id.capacity())
            + block(link.span_id.capacity())
            + block(link.trace_state.capacity())
            + of_attributes(&link.attributes)
    });
    ids.iter().map(|id| block(id.capacity())).sum::<usize>()
        + block(span.trace_state.capacity())
        + block(span.name.capacity())
        + of_attributes(&span.attributes)
        + array(&span.events)
        + events.sum::<usize>()
        + array(&span.links)
        + links.sum::<usize>()
        + span.status.as_ref().map_or(0, |status| block(status.message.capacity()))
}

/// What a resource owns.
pub(super) fn of_resource(resource: &Resource) -> usize {
    let text = |text: &String| block(text.capacity()) + size_of::<String>();
    let entities = resource.entity_refs.iter().map(|entity| {
        let keys = entity.id_keys.iter().chain(&entity.description_keys);
        block(entity.schema_url.capacity()) + block(entity.r#type.capacity()) + keys.map(text).sum::<usize>()
    });
    of_attributes(&resource.attributes) + array(&resource.entity_refs) + entities.sum::<usize>()
}

/// What an instrumentation scope owns.
pub(super) fn of_scope(scope: &InstrumentationScope) -> usize {
    block(scope.name.capacity()) + block(scope.version.capacity()) + of_attributes(&scope.attributes)
}

/// What an allocation of so many bytes takes, with the allocator's own words and rounding.
pub(super) fn block(bytes: usize) -> usize {
    if bytes == 0 { 0 } else { (bytes + 8).next_multiple_of(16).max(32) }
}

fn of_attributes(attributes: &Vec<KeyValue>) -> usize {
    let each = attributes
        .iter()
        .map(|attribute| block(attribute.key.capacity()) + attribute.value.as_ref().map_or(0, of_value));
    array(attributes) + each.sum::<usize>()
}

/// Its depth is bounded by the decoders': prost's 100 messages, serde_json's 128 levels.
fn of_value(value: &AnyValue) -> usize {
    match &value.value {
        Some(Value::StringValue(text)) => block(text.capacity()),
        Some(Value::BytesValue(bytes)) => block(bytes.capacity()),
        Some(Value::ArrayValue(list)) => {
            array(&list.values) + list.values.iter().map(of_value).sum::<usize>()
        }
        Some(Value::KvlistValue(list)) => of_attributes(&list.values),
        Some(
            Value::BoolValue(_) | Value::IntValue(_) | Value::DoubleValue(_) | Value::StringValueStrindex(_),
        )
        | None => 0,
    }
}

fn array<T>(array: &Vec<T>) -> usize {
    block(array.capacity() * size_of::<T>())
}
