//! Connects to the broker, with TLS or without.

use crate::{
    frames::{LONGEST_FRAME, Limits},
    inbound::{self, Checked, Socket},
};
use async_compat::CompatExt;
use lapin::{
    AsyncTcpStream, Channel, Connection, ConnectionProperties,
    uri::{AMQPAuthority, AMQPScheme, AMQPUri},
};
use std::{
    fmt, io,
    net::{self, Shutdown},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, pki_types::ServerName},
};
use tokio_util::either::Either;

/// The URL of RabbitMQ on localhost with its default settings.
pub const DEFAULT_URL: &str = "amqp://guest:guest@127.0.0.1:5672/%2f";

/// The interval of heartbeats. After two intervals without a sign of life, a connection counts as lost, so a
/// broker that froze is noticed within 20 seconds.
const HEARTBEAT_SECONDS: u16 = 10;

/// The longest frame in bytes that a connection asks for, unless the URL sets `frame_max`. The value is
/// RabbitMQ's default.
const FRAME_MAX: u32 = 128 * 1024;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where the broker is, and how to speak to it. All clones share the choice of the current host.
#[derive(Clone)]
pub struct Server {
    /// The address of each host of the broker, and the user to log in as. There is at least one host.
    pub hosts: Vec<AMQPUri>,
    /// The number of the current host, which is connected or is tried next. This number only grows, so beyond
    /// the end of the list it counts from the first host again.
    pub current: Arc<AtomicUsize>,
    /// The TLS configuration, for `amqps`.
    tls: Option<TlsConnector>,
    limits: Limits,
}

const EXPECTED: &str = "expected amqp(s)://user:password@host:port/vhost";

/// Reads `amqp://user:password@host:port/vhost`, or the same with `amqps`, which also needs
/// [`Server::with_tls`]. Instead of `host:port`, the URL may have a list of the nodes of one cluster,
/// `host:port,host:port`.
///
/// # Errors
/// If the URL is malformed. The error says what is expected, and does not quote the URL, which may hold a
/// password.
pub fn parse_url(url: &str) -> Result<Server, &'static str> {
    let (scheme, rest) = url.split_once("://").ok_or(EXPECTED)?;
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let (user, hosts) = authority.rsplit_once('@').map_or(("", authority), |(user, hosts)| (user, hosts));
    let at = if authority.contains('@') { "@" } else { "" };
    // A comma in the virtual host usually comes from a list of whole URLs.
    if rest.contains("://") || path.split('?').next().is_some_and(|vhost| vhost.contains(',')) {
        return Err(
            "expected several hosts as host:port,host:port; write a comma in the virtual host as %2c",
        );
    }
    let hosts: Vec<_> = hosts.split(',').collect();
    if hosts.len() > 1 && hosts.contains(&"") {
        return Err("expected a host before and after each comma");
    }
    let hosts = hosts.into_iter().map(|host| parse_host(&format!("{scheme}://{user}{at}{host}{path}"), host));
    let (hosts, current) = (hosts.collect::<Result<_, _>>()?, Arc::default());
    Ok(Server { hosts, current, tls: None, limits: Limits::default() })
}

/// Reads the URL of one host.
fn parse_host(url: &str, host: &str) -> Result<AMQPUri, &'static str> {
    let mut uri: AMQPUri = url.parse().map_err(|_| EXPECTED)?;
    // The parser knows only names and IPv4 addresses. For an address like [::1], the parser would use its
    // default, localhost.
    if let Some((address, _)) = host.strip_prefix('[').and_then(|host| host.split_once(']')) {
        uri.authority.host = address.to_owned();
    }
    if uri.scheme == AMQPScheme::AMQPS && ServerName::try_from(uri.authority.host.as_str()).is_err() {
        return Err("no certificate can have this host name");
    }
    if uri.vhost.len() > 255 {
        // AMQP carries the name as a short string, and lapin panics if a short string has more than 255
        // bytes.
        return Err("expected a virtual host of at most 255 bytes");
    }
    uri.query.heartbeat.get_or_insert(HEARTBEAT_SECONDS);
    let frame_max = uri.query.frame_max.filter(|bytes| *bytes > 0).unwrap_or(FRAME_MAX);
    uri.query.frame_max = Some(frame_max.min(LONGEST_FRAME as u32));
    Ok(uri)
}

impl Server {
    /// Returns the URL of the current host, which is connected or is tried next.
    pub fn uri(&self) -> &AMQPUri {
        &self.hosts[self.current.load(Relaxed) % self.hosts.len()]
    }

    /// Chooses the next host of the list, because something is wrong with the current one.
    pub(crate) fn try_next(&self) {
        self.current.fetch_add(1, Relaxed);
    }

    /// Returns the same server for another connection, which chooses its host independently.
    pub fn for_another(&self) -> Self {
        Self { current: Arc::default(), ..self.clone() }
    }

    /// Whether the URL asks for TLS.
    pub fn wants_tls(&self) -> bool {
        self.hosts[0].scheme == AMQPScheme::AMQPS
    }

    /// Uses this configuration to connect, if the URL asks for TLS.
    pub fn with_tls(self, config: Arc<ClientConfig>) -> Self {
        let tls = self.wants_tls().then(|| config.into());
        Self { tls, ..self }
    }

    /// Limits bodies on connections to this server. Of a longer body, only the first `bytes` bytes are passed
    /// on, and the header [`BODY_CUT`](crate::properties::BODY_CUT) says so. The rest of the body is read and
    /// dropped.
    pub fn with_longest_body(mut self, bytes: usize) -> Self {
        self.limits.longest_body = bytes;
        self
    }

    /// Returns the longest frame in bytes, as the last connection negotiated it.
    pub fn frame_max(&self) -> usize {
        self.limits.frame_max.load(Relaxed)
    }

    /// Opens a connection to the broker. Puts a second handle to the socket into `handle`, so that the caller
    /// can end the connection.
    async fn open(&self, handle: &Mutex<Option<net::TcpStream>>) -> io::Result<Socket> {
        let AMQPAuthority { host, port, .. } = &self.uri().authority;
        let stream = TcpStream::connect((host.as_str(), *port)).await?;
        stream.set_nodelay(true)?;
        *lock(handle) = Some(stream.as_fd().try_clone_to_owned()?.into());
        let stream = match &self.tls {
            Some(tls) => {
                let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
                Either::Right(tls.connect(name, stream).await?)
            }
            // If the URL asks for TLS, there is never a connection without TLS.
            None if self.wants_tls() => {
                return Err(io::Error::other("the URL is amqps, but TLS is not configured"));
            }
            None => Either::Left(stream),
        };
        Ok(stream.compat())
    }
}

impl fmt::Display for Server {
    /// Writes the address of each host.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, AMQPUri { authority, .. }) in self.hosts.iter().enumerate() {
            write!(f, "{}{}:{}", if i > 0 { "," } else { "" }, authority.host, authority.port)?;
        }
        Ok(())
    }
}

/// Opens a connection, which the broker shows as `name`. The current host is tried first, then the other
/// hosts in turn. The connection does not recover by itself. Its owner opens a new connection, because
/// everything that was set up on the old connection must be set up again.
///
/// # Errors
/// If every host refuses the connection, or does not answer within five seconds.
pub async fn connect(server: &Server, name: &'static str) -> lapin::Result<Connection> {
    if server.hosts.len() == 1 {
        return connect_to_current(server, name).await;
    }
    let mut failures = Vec::new();
    for _ in &server.hosts {
        match connect_to_current(server, name).await {
            Ok(connection) => return Ok(connection),
            Err(error) => {
                let AMQPAuthority { host, port, .. } = &server.uri().authority;
                failures.push(format!("{host}:{port}: {error}"));
                server.try_next();
            }
        }
    }
    Err(lapin_error(io::Error::other(failures.join("; "))))
}

async fn connect_to_current(server: &Server, name: &'static str) -> lapin::Result<Connection> {
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    // If a broker says nothing, lapin's thread waits as long as the socket is open, even if nobody needs the
    // connection any more. A second handle to the socket can end this wait.
    let socket = Arc::new(Mutex::new(None));
    let connect_socket = {
        let (socket, server) = (Arc::clone(&socket), server.clone());
        async move |_, _| {
            let opened =
                timeout(CONNECT_TIMEOUT, server.open(&socket)).await.map_err(io::Error::from).flatten();
            // The bytes are checked, because bytes that lapin can't read would end the connection or the
            // process.
            Ok(AsyncTcpStream::Plain(Checked::new(opened.map_err(lapin_error)?, server.limits.clone())))
        }
    };
    let connecting =
        Connection::connector(server.uri().clone(), inbound::runtime(), connect_socket, properties);
    let connected = timeout(CONNECT_TIMEOUT, connecting).await;
    let socket = lock(&socket).take();
    if let Ok(Ok(connection)) = &connected {
        // No content frame has been checked against this limit yet, because no channel is open.
        server.limits.frame_max.store(connection.configuration().frame_max() as usize, Relaxed);
    }
    connected.unwrap_or_else(|_| {
        // The socket may be closed already.
        let _ = socket.map(|socket| socket.shutdown(Shutdown::Both));
        Err(lapin_error(io::Error::new(io::ErrorKind::TimedOut, "no answer from the broker")))
    })
}

/// Opens a channel on a connection.
///
/// # Errors
/// If the connection is lost, or the broker does not answer within five seconds.
pub async fn open_channel(connection: &Connection) -> lapin::Result<Channel> {
    // If the connection is lost at this moment, lapin 4.12 may leave the request in the queue of a task that
    // has ended, and never answer.
    let opened = timeout(CONNECT_TIMEOUT, connection.create_channel()).await;
    opened.map_err(|elapsed| lapin_error(elapsed.into())).flatten()
}

/// Closes a connection in an orderly way, which takes at most a second.
pub async fn close(connection: &Connection) {
    // If the connection does not close in time, it closes when it is dropped.
    let _ = timeout(Duration::from_secs(1), connection.close(200, "done".into())).await;
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lapin_error(error: io::Error) -> lapin::Error {
    lapin::ErrorKind::IOError(error.into()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_do_not_show_the_url() {
        for url in ["", "amqp//user:secret@host", "http://user:secret@host", "amqps://user:secret@ho st"] {
            assert!(!parse_url(url).err().unwrap().contains("secret"), "{url}");
        }
    }

    #[test]
    fn a_virtual_host_is_a_short_string_whose_bytes_count() {
        let with_host = |host: String| parse_url(&format!("amqp://localhost/{host}")).is_ok();
        assert!(with_host("v".repeat(255)) && with_host("%C3%A9".repeat(127)));
        assert!(!with_host("v".repeat(256)) && !with_host("%C3%A9".repeat(128)));
    }

    /// Returns the number of lapin's threads in this process.
    fn lapin_threads() -> usize {
        let threads = std::fs::read_dir("/proc/self/task").unwrap();
        let names =
            threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("comm")).ok());
        names.filter(|name| name.starts_with("lapin")).count()
    }

    #[tokio::test]
    async fn a_broker_that_says_nothing_is_given_up_and_leaves_no_thread_behind() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = parse_url(&format!("amqp://{}", listener.local_addr().unwrap())).unwrap();
        let connecting = tokio::spawn(async move { connect(&server, "test").await.map(drop) });
        let _silent = listener.accept().await.unwrap();
        assert_eq!(lapin_threads(), 1);
        assert!(connecting.await.unwrap().is_err());
        timeout(Duration::from_secs(60), async {
            while lapin_threads() > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .expect("its thread ends");
    }

    #[test]
    fn the_host_may_be_a_name_or_an_address_of_either_kind() {
        for (url, host, port) in [
            ("amqp://broker", "broker", 5672),
            ("amqp://user:pass@10.0.0.1:1234/%2f", "10.0.0.1", 1234),
            ("amqp://user:pass@[fd00::5]:1234/%2f?heartbeat=3", "fd00::5", 1234),
            ("amqp://[::1]", "::1", 5672),
            ("amqps://broker", "broker", 5671),
            ("amqps://[::1]", "::1", 5671),
        ] {
            let authority = parse_url(url).unwrap().uri().authority.clone();
            assert_eq!((authority.host.as_str(), authority.port), (host, port), "{url}");
        }
    }

    #[test]
    fn hosts_may_be_a_list_but_urls_may_not() {
        let server = parse_url("amqps://user:p,w@h1,[::1]:1,h2:2/v?heartbeat=3").unwrap();
        assert_eq!(server.to_string(), "h1:5671,::1:1,h2:2");
        for uri in &server.hosts {
            let AMQPUri { authority, vhost, query, .. } = uri;
            assert_eq!((&*authority.userinfo.password, &**vhost, query.heartbeat), ("p,w", "v", Some(3)));
        }
        assert_eq!(parse_url("amqp://h1,h2/a%2cb").unwrap().hosts[1].vhost, "a,b");
        for url in ["amqp://h1/c,amqp://h2/c", "amqp://h1,amqp://h2", "amqp://h1,,h2/c", "amqps://h1,a..b/c"]
        {
            assert!(parse_url(url).is_err(), "{url}");
        }
    }

    #[test]
    fn a_heartbeat_is_asked_for_unless_the_url_has_one() {
        assert_eq!(parse_url(DEFAULT_URL).unwrap().uri().query.heartbeat, Some(10));
        assert_eq!(parse_url("amqp://localhost/%2f?heartbeat=3").unwrap().uri().query.heartbeat, Some(3));
    }
}
