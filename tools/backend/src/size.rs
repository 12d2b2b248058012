//! How much memory the parts of a request take, as the store accounts for them.

use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    resource::v1::Resource,
};
use std::mem::size_of;

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
