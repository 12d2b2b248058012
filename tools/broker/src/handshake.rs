//! The handshake of a connection: protocol, login, and the limits that both sides agree on (specification,
//! section 2.2.4).

use super::{
    PASSWORD, USER,
    channel::CHANNEL_MAX,
    exception::{Exception, Outcome},
    frames::{FRAME_MAX, Frame, put_method},
};
use amq_protocol::{
    protocol::{AMQPClass, connection},
    types::{AMQPValue, FieldTable},
};
use std::time::Duration;

/// The heartbeat interval in seconds that the broker suggests. A client may choose another interval.
const HEARTBEAT: u16 = 60;

/// The smallest `frame_max` that a client may choose, because every peer must accept frames of this size
/// (specification, section 4.2.3).
const FRAME_MIN: u32 = 4096;

/// The progress of a handshake. Each step handles a frame from the client and appends the answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Handshake {
    /// The broker has sent `start`.
    Started,
    /// The broker has sent `tune`.
    Tuning(Capabilities),
    /// The client has sent `tune-ok`.
    Tuned(Agreement),
    /// The broker has sent `open-ok`.
    Open(Agreement),
}

/// The capabilities that the client announces.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Capabilities {
    /// Whether the client accepts `basic.cancel`, which the broker sends when the queue of a consumer is
    /// deleted.
    pub takes_cancel: bool,
    /// Whether the client accepts `connection.blocked`, which the broker sends when it stops reading
    /// messages.
    pub takes_blocked: bool,
}

/// The parameters that both sides have agreed on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Agreement {
    /// The capabilities of the client.
    pub capabilities: Capabilities,
    /// The size of the largest frame, in bytes.
    pub frame_max: usize,
    /// The heartbeat interval, or `None` for no heartbeats.
    pub heartbeat: Option<Duration>,
}

impl Handshake {
    /// Begins a handshake by appending `start`.
    pub fn start(output: &mut Vec<u8>) -> Self {
        let mut capabilities = FieldTable::default();
        for name in [
            "authentication_failure_close",
            "basic.nack",
            "connection.blocked",
            "consumer_cancel_notify",
            "per_consumer_qos",
            "publisher_confirms",
        ] {
            capabilities.insert(name.into(), AMQPValue::Boolean(true));
        }
        let mut properties = FieldTable::default();
        properties.insert("product".into(), AMQPValue::LongString("devstack broker".into()));
        properties.insert("version".into(), AMQPValue::LongString(env!("CARGO_PKG_VERSION").into()));
        properties.insert("capabilities".into(), AMQPValue::FieldTable(capabilities));
        put(
            output,
            connection::AMQPMethod::Start(connection::Start {
                version_major: 0,
                version_minor: 9,
                server_properties: properties,
                mechanisms: "PLAIN".into(),
                locales: "en_US".into(),
            }),
        );
        Self::Started
    }

    /// Handles a frame of the client.
    pub fn step(self, frame: &Frame, output: &mut Vec<u8>) -> Outcome<Self> {
        use connection::AMQPMethod as Method;

        let method = match frame {
            Frame::Heartbeat => return Ok(self),
            Frame::Method(0, AMQPClass::Connection(method)) => method,
            _ => return Err(Exception::channel_error("the connection is not open yet")),
        };
        match (self, method) {
            (Self::Started, Method::StartOk(start_ok)) => {
                let capabilities = authenticate(start_ok)?;
                // `FRAME_MAX` is a constant that fits into 32 bits, so the cast loses nothing.
                let frame_max = FRAME_MAX as u32;
                let tune = connection::Tune { channel_max: CHANNEL_MAX, frame_max, heartbeat: HEARTBEAT };
                put(output, Method::Tune(tune));
                Ok(Self::Tuning(capabilities))
            }
            (Self::Tuning(capabilities), Method::TuneOk(tune_ok)) => {
                agree(capabilities, tune_ok).map(Self::Tuned)
            }
            (Self::Tuned(agreement), Method::Open(open)) => {
                if open.virtual_host.as_str() != "/" {
                    return Err(Exception::not_allowed(format!("vhost {} not found", open.virtual_host)));
                }
                put(output, Method::OpenOk(connection::OpenOk {}));
                Ok(Self::Open(agreement))
            }
            _ => Err(Exception::command_invalid("unexpected method during the handshake")),
        }
    }
}

fn authenticate(start_ok: &connection::StartOk) -> Outcome<Capabilities> {
    if start_ok.mechanism.as_str() != "PLAIN" {
        let text = format!("unknown authentication mechanism '{}'", start_ok.mechanism);
        return Err(Exception::command_invalid(text));
    }
    if start_ok.response.as_bytes() != format!("\0{USER}\0{PASSWORD}").as_bytes() {
        return Err(Exception::access_refused("Login was refused using authentication mechanism PLAIN."));
    }
    let takes = |what| match start_ok.client_properties.inner().get("capabilities") {
        Some(AMQPValue::FieldTable(capabilities)) => {
            capabilities.inner().get(what) == Some(&AMQPValue::Boolean(true))
        }
        _ => false,
    };
    Ok(Capabilities {
        takes_cancel: takes("consumer_cancel_notify"),
        takes_blocked: takes("connection.blocked"),
    })
}

/// Checks the limits that the client chose. A `channel_max` or `frame_max` of 0 means "no limit", which is
/// more than the broker offers. So 0 is refused, as in RabbitMQ.
fn agree(capabilities: Capabilities, tune_ok: &connection::TuneOk) -> Outcome<Agreement> {
    let &connection::TuneOk { channel_max, frame_max, heartbeat } = tune_ok;
    if !(1..=CHANNEL_MAX).contains(&channel_max) {
        let text = format!("negotiated channel_max = {channel_max} is not from 1 to {CHANNEL_MAX}");
        return Err(Exception::not_allowed(text));
    }
    let largest = FRAME_MAX as u32;
    if !(FRAME_MIN..=largest).contains(&frame_max) {
        let text = format!("negotiated frame_max = {frame_max} is not from {FRAME_MIN} to {largest}");
        return Err(Exception::not_allowed(text));
    }
    let heartbeat = (heartbeat > 0).then(|| Duration::from_secs(heartbeat.into()));
    Ok(Agreement { capabilities, frame_max: frame_max as usize, heartbeat })
}

fn put(output: &mut Vec<u8>, method: connection::AMQPMethod) {
    put_method(output, 0, AMQPClass::Connection(method));
}
