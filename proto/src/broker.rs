//! How both sides reach the broker that the login message travels through.

use lapin::{
    Connection, ConnectionProperties,
    uri::{AMQPScheme, AMQPUri},
};
use std::{io, time::Duration};
use tokio::time::timeout;

/// RabbitMQ as it comes, on this machine.
pub const DEFAULT_URL: &str = "amqp://guest:guest@127.0.0.1:5672/%2f";

/// After two of these without a sign of life a connection counts as lost, so a broker that froze is
/// noticed within 20 seconds.
const HEARTBEAT_SECONDS: u16 = 10;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Reads `amqp://user:password@host:port/vhost`.
///
/// # Errors
/// Says what is expected and not what was given, which may hold a password.
pub fn parse_url(url: &str) -> Result<AMQPUri, &'static str> {
    let mut uri: AMQPUri = url.parse().map_err(|_| "expected amqp://user:password@host:port/vhost")?;
    if uri.scheme != AMQPScheme::AMQP {
        return Err("TLS (amqps) is not supported");
    }
    uri.query.heartbeat.get_or_insert(HEARTBEAT_SECONDS);
    Ok(uri)
}

/// Opens a connection that the broker knows as `name`. It does not recover by itself: whoever holds it
/// opens a new one, because what was set up on it must be set up again.
///
/// # Errors
/// If the broker is not reached within five seconds, or refuses.
pub async fn connect(uri: &AMQPUri, name: &'static str) -> lapin::Result<Connection> {
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let connecting = Connection::connect_uri(uri.clone(), properties);
    timeout(CONNECT_TIMEOUT, connecting).await.unwrap_or_else(|_| {
        let error = io::Error::new(io::ErrorKind::TimedOut, "no answer from the broker");
        Err(lapin::ErrorKind::IOError(error.into()).into())
    })
}

/// The pause before the next attempt to connect: from a tenth of a second up to two, with jitter, so
/// that services don't come back in step. It never gives up.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(2);

    /// Starts with the shortest pause.
    #[expect(clippy::new_without_default, reason = "there is nothing to default")]
    pub fn new() -> Self {
        Self { next: Self::FIRST }
    }

    /// Waits, and makes the next pause twice as long.
    pub async fn pause(&mut self) {
        let pause = self.next.mul_f64(0.5 + 0.5 * fastrand::f64());
        self.next = (self.next * 2).min(Self::LONGEST);
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_do_not_show_the_url() {
        for url in ["", "amqp//user:secret@host", "http://user:secret@host", "amqps://user:secret@host"] {
            assert!(!parse_url(url).unwrap_err().contains("secret"), "{url}");
        }
    }

    #[test]
    fn a_heartbeat_is_asked_for_unless_the_url_has_one() {
        assert_eq!(parse_url(DEFAULT_URL).unwrap().query.heartbeat, Some(10));
        assert_eq!(parse_url("amqp://localhost/%2f?heartbeat=3").unwrap().query.heartbeat, Some(3));
    }
}
