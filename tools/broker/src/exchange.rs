//! An exchange: its bindings, and which bindings match a routing key.

use super::{
    exception::{Exception, Outcome},
    memory::Held,
    virtual_host::QueueId,
};
use amq_protocol::types::ShortString;

/// The type of an exchange (specification, section 3.1.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A binding matches if its key equals the routing key.
    Direct,
    /// Every binding matches.
    Fanout,
    /// A binding matches if its key is a pattern that the routing key matches.
    Topic,
}

impl Kind {
    /// Parses the exchange type in a declaration.
    pub fn parse(name: &str) -> Outcome<Self> {
        match name {
            "direct" => Ok(Self::Direct),
            "fanout" => Ok(Self::Fanout),
            "topic" => Ok(Self::Topic),
            "headers" => Err(Exception::not_implemented("headers exchanges")),
            _ => Err(Exception::command_invalid(format!("unknown exchange type '{name}'"))),
        }
    }

    /// Returns the name of the type.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Fanout => "fanout",
            Self::Topic => "topic",
        }
    }
}

/// An exchange other than the default exchange. The default exchange needs no such value, because it routes
/// by the names of the queues.
#[derive(Debug)]
pub struct Exchange {
    /// The type, which decides how the exchange routes.
    pub kind: Kind,
    /// Whether the exchange survives [`Broker::crash`](super::Broker::crash). No exchange survives the
    /// process.
    pub durable: bool,
    /// Whether the exchange is deleted with its last binding.
    pub auto_delete: bool,
    /// Whether clients are forbidden to publish to the exchange.
    pub internal: bool,
    /// `alternate-exchange`: the exchange that routes the messages that match no binding.
    pub alternate: Option<ShortString>,
    /// The bindings, in the order of their creation.
    pub bindings: Vec<Binding>,
    /// The exchange's share of the broker's memory.
    pub _held: Held,
}

/// A binding of a queue to an exchange. Its arguments are not kept, because only headers exchanges use them.
#[derive(Debug)]
pub struct Binding {
    /// The bound queue.
    pub queue: QueueId,
    /// The routing key, or the pattern for a topic exchange.
    pub key: ShortString,
    /// The binding's share of the broker's memory.
    pub _held: Held,
}

impl Exchange {
    /// Returns the queues that a message with this routing key goes to, without duplicates.
    pub fn route(&self, routing_key: &str) -> Vec<QueueId> {
        let mut queues: Vec<QueueId> = Vec::new();
        for binding in &self.bindings {
            let matches = match self.kind {
                Kind::Direct => binding.key.as_str() == routing_key,
                Kind::Fanout => true,
                Kind::Topic => matches(binding.key.as_str(), routing_key),
            };
            if matches {
                queues.push(binding.queue);
            }
        }
        if queues.len() > 1 {
            queues.sort_unstable();
            queues.dedup();
        }
        queues
    }
}

/// Returns whether a routing key matches a pattern of a topic exchange. Both are words separated by dots. In
/// the pattern, `*` stands for any one word, and `#` stands for any number of words. The search needs to
/// backtrack only to the last `#`, so no pattern takes long to match.
fn matches(pattern: &str, routing_key: &str) -> bool {
    let pattern: Vec<&str> = pattern.split('.').collect();
    // The empty key has no words, rather than one empty word.
    let words: Vec<&str> = routing_key.split('.').filter(|_| !routing_key.is_empty()).collect();
    let (mut at, mut word) = (0, 0);
    let mut last_hash = None;
    while word < words.len() {
        match pattern.get(at) {
            Some(&"#") => {
                last_hash = Some((at, word));
                at += 1;
            }
            Some(&expected) if expected == "*" || expected == words[word] => {
                at += 1;
                word += 1;
            }
            _ => match last_hash {
                Some((hash, taken)) => {
                    last_hash = Some((hash, taken + 1));
                    (at, word) = (hash + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|part| *part == "#") || (pattern == [""] && words.is_empty())
}

#[cfg(test)]
mod tests {
    use super::matches;
    use std::time::Instant;

    #[test]
    fn a_pattern_of_many_hashes_takes_no_longer_than_others() {
        let start = Instant::now();
        assert!(!matches(&format!("{}z", "#.a.".repeat(60)), &format!("{}b", "a.".repeat(120))));
        // Backtracking to every `#` would take years.
        assert!(start.elapsed() < loopback::PATIENCE);
    }
}
