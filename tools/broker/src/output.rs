//! The output of a connection: the frames that wait to be written.

use super::{frames, message::Message};
use amq_protocol::protocol::AMQPClass;
use std::{mem, sync::Arc};
use tokio::sync::Notify;

/// The size in bytes at which the output is full. Until a full output is written, the connection gets no
/// further deliveries, and no further frames are read from the connection. The output can exceed this size,
/// because the broker still appends replies, and always appends a whole delivery.
const ENOUGH: usize = 256 * 1024;

/// The output of one connection.
#[derive(Debug)]
pub struct Output {
    frame_max: usize,
    frames: Vec<u8>,
    /// The number of bytes that the writer took last, and may still be writing.
    in_flight: usize,
    /// Whether a consumer missed a delivery because the output was full.
    starved: bool,
    wake: Arc<Notify>,
}

impl Output {
    /// Creates an empty output, which notifies `wake` when a method is appended.
    pub fn new(frame_max: usize, wake: Arc<Notify>) -> Self {
        Self { frame_max, frames: Vec::new(), in_flight: 0, starved: false, wake }
    }

    /// Appends a method.
    pub fn method(&mut self, channel: u16, method: AMQPClass) {
        frames::put_method(&mut self.frames, channel, method);
        self.wake.notify_one();
    }

    /// Appends a method and the content that belongs to it.
    pub fn content(&mut self, channel: u16, method: AMQPClass, message: &Message) {
        self.method(channel, method);
        frames::put_content(&mut self.frames, channel, message, self.frame_max);
    }

    /// Appends a heartbeat.
    pub fn heartbeat(&mut self) {
        frames::put_heartbeat(&mut self.frames);
    }

    /// Returns whether there is room for a delivery. If there is no room, records that a consumer missed a
    /// delivery.
    pub fn has_room(&mut self) -> bool {
        let has_room = !self.is_full();
        self.starved |= !has_room;
        has_room
    }

    /// Returns whether the output is full.
    pub fn is_full(&self) -> bool {
        self.frames.len() + self.in_flight >= ENOUGH
    }

    /// Removes and returns the waiting frames, in exchange for an empty buffer. The caller must have written
    /// all frames from earlier calls.
    pub fn take(&mut self, empty: Vec<u8>) -> Vec<u8> {
        let frames = mem::replace(&mut self.frames, empty);
        self.in_flight = frames.len();
        frames
    }

    /// Returns whether a consumer has missed a delivery since the last call.
    pub fn has_starved(&mut self) -> bool {
        mem::take(&mut self.starved)
    }
}
