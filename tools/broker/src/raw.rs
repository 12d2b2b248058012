//! A client that sends AMQP frames by hand, including frames that no client library would send.

use amq_protocol::{
    frame::{AMQPFrame, WriteContext, gen_frame, parse_frame},
    protocol::{AMQPClass, basic, channel, connection, constants},
    types::AMQPValue,
};
use amqp::content_header::CONTENT_HEAD;
use anyhow::{Context, Result, bail};
use lapin::uri::AMQPUri;
use loopback::PATIENCE;
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// A socket to the broker.
pub struct Raw {
    stream: TcpStream,
    input: Vec<u8>,
}

impl Raw {
    /// Connects, and sends nothing.
    pub async fn connect(url: &str) -> Result<Self> {
        let uri: AMQPUri = url.parse().map_err(anyhow::Error::msg)?;
        let stream = TcpStream::connect((uri.authority.host.as_str(), uri.authority.port)).await?;
        Ok(Self { stream, input: Vec::new() })
    }

    /// Logs in, and opens channel 1. `heartbeat` is the interval in seconds; 0 means no heartbeats.
    pub async fn open_with_heartbeat(url: &str, heartbeat: u16) -> Result<Self> {
        let uri: AMQPUri = url.parse().map_err(anyhow::Error::msg)?;
        let (mut raw, virtual_host) = (Self::connect(url).await?, uri.vhost.as_str().into());
        raw.log_in(connection::TuneOk { channel_max: 2047, frame_max: 131_072, heartbeat }).await?;
        raw.connection(connection::AMQPMethod::Open(connection::Open { virtual_host })).await?;
        raw.expect(|method| matches!(method, AMQPClass::Connection(connection::AMQPMethod::OpenOk(_))))
            .await?;
        raw.method(1, AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {}))).await?;
        raw.expect(|method| matches!(method, AMQPClass::Channel(channel::AMQPMethod::OpenOk(_)))).await?;
        Ok(raw)
    }

    /// Logs in without heartbeats, and opens channel 1.
    pub async fn open(url: &str) -> Result<Self> {
        Self::open_with_heartbeat(url, 0).await
    }

    /// Performs the handshake up to `tune-ok`.
    pub async fn log_in(&mut self, tune_ok: connection::TuneOk) -> Result<()> {
        self.server_capabilities().await?;
        let start_ok = connection::StartOk {
            mechanism: "PLAIN".into(),
            response: "\0guest\0guest".into(),
            locale: "en_US".into(),
            ..Default::default()
        };
        self.connection(connection::AMQPMethod::StartOk(start_ok)).await?;
        self.expect(|method| matches!(method, AMQPClass::Connection(connection::AMQPMethod::Tune(_))))
            .await?;
        self.connection(connection::AMQPMethod::TuneOk(tune_ok)).await
    }

    /// Sends the protocol header, and returns the capabilities in the broker's `start`.
    pub async fn server_capabilities(&mut self) -> Result<Vec<String>> {
        self.send(b"AMQP\0\0\x09\x01").await?;
        let start = self
            .expect(|method| matches!(method, AMQPClass::Connection(connection::AMQPMethod::Start(_))))
            .await?;
        let AMQPClass::Connection(connection::AMQPMethod::Start(start)) = start else { bail!("{start:?}") };
        let Some(AMQPValue::FieldTable(capabilities)) = start.server_properties.inner().get("capabilities")
        else {
            bail!("no capabilities")
        };
        Ok(capabilities.inner().keys().map(ToString::to_string).collect())
    }

    /// Sends these bytes.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(timeout(PATIENCE, self.stream.write_all(bytes)).await??)
    }

    /// Sends a frame.
    pub async fn frame(&mut self, frame: &AMQPFrame) -> Result<()> {
        self.send(&encoded(frame)).await
    }

    /// Sends a method.
    pub async fn method(&mut self, channel: u16, method: AMQPClass) -> Result<()> {
        self.frame(&AMQPFrame::Method(channel, method)).await
    }

    async fn connection(&mut self, method: connection::AMQPMethod) -> Result<()> {
        self.method(0, AMQPClass::Connection(method)).await
    }

    /// Returns the next frame, or `None` if the broker has closed the socket.
    pub async fn next(&mut self) -> Result<Option<AMQPFrame>> {
        self.next_within(PATIENCE).await
    }

    /// Returns all bytes that the broker sends before it closes the socket.
    pub async fn until_the_end(mut self) -> Result<Vec<u8>> {
        let end = async {
            // A reset also closes the socket.
            while self.stream.read_buf(&mut self.input).await.unwrap_or(0) > 0 {}
        };
        timeout(PATIENCE, end).await.context("the socket stays open")?;
        Ok(self.input)
    }

    /// Returns the next frame if it arrives within `limit`, or `None` if the broker has closed the socket.
    pub async fn next_within(&mut self, limit: Duration) -> Result<Option<AMQPFrame>> {
        loop {
            if let Ok((rest, frame)) = parse_frame(&self.input[..]) {
                self.input = rest.to_vec();
                return Ok(Some(frame));
            }
            let read = timeout(limit, self.stream.read_buf(&mut self.input)).await.context("no answer")?;
            // A reset also closes the socket.
            if read.unwrap_or(0) == 0 {
                return Ok(None);
            }
        }
    }

    /// Skips frames up to a method that `is_it` accepts, and returns the method.
    pub async fn expect(&mut self, is_it: impl Fn(&AMQPClass) -> bool) -> Result<AMQPClass> {
        loop {
            match self.next().await?.context("the socket was closed")? {
                AMQPFrame::Method(_, method) if is_it(&method) => return Ok(method),
                AMQPFrame::Method(_, AMQPClass::Connection(connection::AMQPMethod::Close(close))) => {
                    bail!("{close:?}")
                }
                _ => {}
            }
        }
    }

    /// Returns the code with which the broker closes the connection.
    pub async fn closed_with(&mut self) -> Result<u16> {
        loop {
            let frame = self.next().await?.context("the broker closed the socket without sending `close`")?;
            if let AMQPFrame::Method(0, AMQPClass::Connection(connection::AMQPMethod::Close(close))) = frame {
                self.connection(connection::AMQPMethod::CloseOk(connection::CloseOk {})).await?;
                return Ok(close.reply_code);
            }
        }
    }

    /// Gets a message without acknowledging it.
    pub async fn get(&mut self, queue: &str) -> Result<String> {
        let get = basic::Get { queue: queue.into(), no_ack: false };
        self.method(1, AMQPClass::Basic(basic::AMQPMethod::Get(get))).await?;
        loop {
            match self.next().await?.context("closed")? {
                AMQPFrame::Body(_, body) => return Ok(String::from_utf8(body)?),
                AMQPFrame::Method(_, AMQPClass::Basic(basic::AMQPMethod::GetEmpty(_))) => bail!("no message"),
                _ => {}
            }
        }
    }

    /// Publishes a message to a queue.
    pub async fn publish(&mut self, queue: &str, body: &[u8]) -> Result<()> {
        self.send(&publish(queue, body)).await
    }
}

/// Encodes the frames of a small message to a queue.
pub fn publish(queue: &str, body: &[u8]) -> Vec<u8> {
    publish_with(queue, &[0, 0], body)
}

/// Encodes the frames of a small message with these properties: the flags, then the properties that the flags
/// name.
pub fn publish_with(queue: &str, properties: &[u8], body: &[u8]) -> Vec<u8> {
    let publish = basic::Publish { routing_key: queue.into(), mandatory: true, ..Default::default() };
    let mut header = vec![constants::FRAME_HEADER, 0, 1];
    header.extend((CONTENT_HEAD as u32 + properties.len() as u32).to_be_bytes());
    header.extend([0, 60, 0, 0]);
    header.extend((body.len() as u64).to_be_bytes());
    header.extend(properties);
    header.push(constants::FRAME_END);
    let method = encoded(&AMQPFrame::Method(1, AMQPClass::Basic(basic::AMQPMethod::Publish(publish))));
    [method, header, encoded(&AMQPFrame::Body(1, body.to_vec()))].concat()
}

/// Encodes a frame.
///
/// # Panics
/// If the frame cannot be encoded.
pub fn encoded(frame: &AMQPFrame) -> Vec<u8> {
    gen_frame(frame)(WriteContext::from(Vec::new())).expect("a frame").into_inner().0
}
