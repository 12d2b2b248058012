//! Calculates how much memory the parts of a request take, for the store's limits.

use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    resource::v1::Resource,
};
use std::mem::size_of;

/// Returns how many bytes a resource owns on the heap.
pub(super) fn of_resource(resource: &Resource) -> usize {
    let text = |text: &String| block(text.capacity()) + size_of::<String>();
    let entities = resource.entity_refs.iter().map(|entity| {
        let keys = entity.id_keys.iter().chain(&entity.description_keys);
        block(entity.schema_url.capacity()) + block(entity.r#type.capacity()) + keys.map(text).sum::<usize>()
    });
    of_attributes(&resource.attributes) + array(&resource.entity_refs) + entities.sum::<usize>()
}

/// Returns how many bytes an instrumentation scope owns on the heap.
pub(super) fn of_scope(scope: &InstrumentationScope) -> usize {
    block(scope.name.capacity()) + block(scope.version.capacity()) + of_attributes(&scope.attributes)
}

/// Returns the memory that an allocation of this many bytes takes. The allocator adds a header of 8 bytes,
/// rounds up to a multiple of 16, and takes at least 32 bytes. For 0 bytes there is no allocation.
pub(super) fn block(bytes: usize) -> usize {
    if bytes == 0 { 0 } else { (bytes + 8).next_multiple_of(16).max(32) }
}

fn of_attributes(attributes: &Vec<KeyValue>) -> usize {
    let each = attributes
        .iter()
        .map(|attribute| block(attribute.key.capacity()) + attribute.value.as_ref().map_or(0, of_value));
    array(attributes) + each.sum::<usize>()
}

/// Returns how many bytes a value owns on the heap. The recursion is bounded, because the decoders limit the
/// depth: prost to 100 messages, serde_json to 128 levels.
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
