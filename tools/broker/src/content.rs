//! A message while it arrives in parts: a method, a header, and bodies (specification, section 4.2.6).

use super::{
    exception::{Exception, Outcome},
    virtual_host::{ChannelId, VirtualHost},
};
use amq_protocol::protocol::{BasicProperties, basic};

/// The largest body of a message, in bytes, as in RabbitMQ 4.
pub const MAX_BODY: u64 = 16 * 1024 * 1024;

/// The largest number of bytes of incomplete messages that one connection may have, on all its channels
/// together.
const MAX_ASSEMBLING: usize = 2 * MAX_BODY as usize;

/// A message that is incomplete.
#[derive(Debug)]
pub struct Content {
    /// The method, with the exchange, the routing key and the flags.
    pub publish: basic::Publish,
    /// The parsed properties.
    pub properties: BasicProperties,
    /// The properties as bytes, as they were received.
    pub raw_properties: Vec<u8>,
    /// The part of the body that has arrived.
    pub body: Vec<u8>,
    /// The size of the whole body in bytes, once the header has arrived.
    size: Option<u64>,
}

impl Content {
    /// Returns how many bytes have arrived.
    pub fn len(&self) -> usize {
        self.raw_properties.len() + self.body.len()
    }
}

impl VirtualHost {
    pub(super) fn begin_publish(&mut self, at: ChannelId, publish: basic::Publish) -> Outcome {
        if publish.immediate {
            return Err(Exception::not_implemented("immediate=true"));
        }
        if let Some(peer) = self.peers.get_mut(&at.connection) {
            peer.publishes = true;
        }
        if let Some(channel) = self.channel(at) {
            channel.content = Some(Content {
                publish,
                properties: BasicProperties::default(),
                raw_properties: Vec::new(),
                body: Vec::new(),
                size: None,
            });
        }
        Ok(())
    }

    pub(super) fn header(
        &mut self,
        at: ChannelId,
        size: u64,
        properties: BasicProperties,
        raw_properties: Vec<u8>,
    ) -> Outcome {
        let Some(peer) = self.peers.get_mut(&at.connection) else {
            return Ok(());
        };
        let Some(channel) = peer.channels.get_mut(&at.number) else {
            return Err(Exception::channel_error("expected 'channel.open'"));
        };
        if channel.is_closing {
            return Ok(());
        }
        let Some(content) = channel.content.as_mut().filter(|content| content.size.is_none()) else {
            return Err(Exception::unexpected_frame("a content header, but no content is expected"));
        };
        let longest = self.memory.longest_body();
        if size > longest {
            let text = format!("message size {size} is larger than configured max size {longest}");
            return Err(Exception::precondition_failed(text));
        }
        peer.assembling += raw_properties.len();
        (content.size, content.properties, content.raw_properties) = (Some(size), properties, raw_properties);
        self.publish_if_complete(at)
    }

    pub(super) fn body(&mut self, at: ChannelId, part: &[u8]) -> Outcome {
        let Some(peer) = self.peers.get_mut(&at.connection) else {
            return Ok(());
        };
        let Some(channel) = peer.channels.get_mut(&at.number) else {
            return Err(Exception::channel_error("expected 'channel.open'"));
        };
        if channel.is_closing {
            return Ok(());
        }
        let Some((content, size)) =
            channel.content.as_mut().and_then(|content| content.size.map(|size| (content, size)))
        else {
            return Err(Exception::unexpected_frame("a content body, but no body is expected"));
        };
        if (content.body.len() + part.len()) as u64 > size {
            return Err(Exception::unexpected_frame("a body that is longer than its header announced"));
        }
        content.body.extend_from_slice(part);
        peer.assembling += part.len();
        if peer.assembling > MAX_ASSEMBLING {
            return Err(Exception::resource_error("too many large messages at once"));
        }
        self.publish_if_complete(at)
    }

    fn publish_if_complete(&mut self, at: ChannelId) -> Outcome {
        let Some(peer) = self.peers.get_mut(&at.connection) else {
            return Ok(());
        };
        let Some(channel) = peer.channels.get_mut(&at.number) else {
            return Ok(());
        };
        match channel.content.take_if(|content| content.size == Some(content.body.len() as u64)) {
            Some(content) => {
                peer.assembling -= content.len();
                self.publish(at, content)
            }
            None => Ok(()),
        }
    }
}
