//! What a connection will get: frames that wait to be written.

use super::{frames, message::Message};
use amq_protocol::protocol::AMQPClass;
use std::{mem, sync::Arc};
use tokio::sync::Notify;

/// Beyond so many bytes nothing is delivered to the connection, and nothing more is read from it, until
/// they are written. What is under way then may still be added, so this is not exact.
const ENOUGH: usize = 256 * 1024;

/// The output of one connection.
#[derive(Debug)]
pub struct Output {
    frame_max: usize,
    frames: Vec<u8>,
    /// Bytes that were taken and perhaps not written yet.
    in_flight: usize,
    /// Whether a consumer went without a delivery because there was enough.
    starved: bool,
    wake: Arc<Notify>,
}

impl Output {
    /// Nothing yet. Whoever writes is woken by `wake`.
    pub fn new(frame_max: usize, wake: Arc<Notify>) -> Self {
        Self { frame_max, frames: Vec::new(), in_flight: 0, starved: false, wake }
    }

    /// Appends a method.
    pub fn method(&mut self, channel: u16, method: AMQPClass) {
        frames::put_method(&mut self.frames, channel, method);
        self.wake.notify_one();
    }

    /// Appends a method with the content that belongs to it.
    pub fn content(&mut self, channel: u16, method: AMQPClass, message: &Message) {
        self.method(channel, method);
        frames::put_content(&mut self.frames, channel, message, self.frame_max);
    }

    /// Appends a sign of life.
    pub fn heartbeat(&mut self) {
        frames::put_heartbeat(&mut self.frames);
    }

    /// Whether a delivery can be added.
    pub fn has_room(&mut self) -> bool {
        let has_room = !self.is_full();
        self.starved |= !has_room;
        has_room
    }

    /// Whether there is enough.
    pub fn is_full(&self) -> bool {
        self.frames.len() + self.in_flight >= ENOUGH
    }

    /// Says that all that was taken is written, and takes the rest in exchange for an empty buffer.
    pub fn take(&mut self, empty: Vec<u8>) -> Vec<u8> {
        let frames = mem::replace(&mut self.frames, empty);
        self.in_flight = frames.len();
        frames
    }

    /// Whether a consumer went without since this was last asked.
    pub fn has_starved(&mut self) -> bool {
        mem::take(&mut self.starved)
    }
}
