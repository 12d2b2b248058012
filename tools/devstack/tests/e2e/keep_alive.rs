//! The clients in the services stop using a connection that becomes silent, although they send no HTTP/2
//! pings. By default, a gRPC server in Go closes a connection with `too_many_pings` if pings come more often
//! than every five minutes (gRPC's proposal A8).

use anyhow::Result;
use futures_util::future::try_join_all;
use harness::{
    proxy::Proxy,
    receiver::Receiver,
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack},
};
use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

// The frame types of RFC 9113, section 6.
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;

/// A server that speaks HTTP/2 and never answers a request.
struct Silent {
    url: String,
    /// The types of the frames that arrived on each connection.
    connections: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Silent {
    async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let connections = Arc::<Mutex<Vec<Vec<u8>>>>::default();
        let kept = connections.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let number = {
                    let mut connections = kept.lock().unwrap_or_else(PoisonError::into_inner);
                    connections.push(Vec::new());
                    connections.len() - 1
                };
                let kept = kept.clone();
                tokio::spawn(read_frames(stream, move |kind| {
                    kept.lock().unwrap_or_else(PoisonError::into_inner)[number].push(kind);
                }));
            }
        });
        Ok(Self { url, connections })
    }

    /// Returns the number of connections so far, and how many frames of type `kind` arrived on all of them
    /// together.
    fn counts(&self, kind: u8) -> (usize, usize) {
        let connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        (connections.len(), connections.iter().flatten().filter(|of| **of == kind).count())
    }
}

async fn read_frames(mut stream: TcpStream, arrived: impl Fn(u8)) -> io::Result<()> {
    stream.read_exact(&mut [0; "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len()]).await?;
    stream.write_all(&[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]).await?;
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        stream.read_exact(&mut vec![0; length as usize]).await?;
        arrived(head[3]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_usercenter_that_does_not_answer_gets_no_ping_and_no_flood_of_connections() -> Result<()> {
    let usercenter = Silent::start().await?;
    let variables = [
        ("api", "USERCENTER_URL", usercenter.url.as_str()),
        ("api", "USERCENTER_TIMEOUT", "4s"),
        ("api", "API_DEADLINE", "9s"),
    ];
    let stack = Stack::start(&variables).await?;
    let answers = try_join_all((0..10).map(|_| stack.login(KNOWN_MOBILE, &[]))).await?;
    assert_eq!(usercenter.counts(PING).1, 0);
    assert!(answers.iter().all(|answer| answer.status == 504), "{}", stack.api.output());
    let (connections, calls) = usercenter.counts(HEADERS);
    // After two seconds without an answer, a new call gets another connection. All ten calls begin within the
    // two seconds, unless the machine is very slow.
    assert!(calls == 10 && connections <= 2, "{calls} calls on {connections} connections");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_does_not_answer_gets_no_ping() -> Result<()> {
    let collector = Silent::start().await?;
    let variables = [
        ("api", "OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.as_str()),
        ("api", "OTEL_EXPORTER_OTLP_TIMEOUT", "6000"),
    ];
    let stack = Stack::start(&variables).await?;
    stack.login(KNOWN_MOBILE, &[]).await?;
    stack.api.said("spans can't be exported").await?;
    assert!(collector.counts(HEADERS).1 > 0);
    assert_eq!(collector.counts(PING).1, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_vanishes_without_a_word_is_looked_for_again() -> Result<()> {
    let receiver = Receiver::start().await?;
    // The first connections go through both proxies. Later connections will bypass `vanishing`.
    let vanishing = Proxy::start(receiver.grpc)?;
    let network = Proxy::start(vanishing.address)?;
    let url = format!("http://{}", network.address);
    let variables =
        [("*", "OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()), ("*", "OTEL_EXPORTER_OTLP_TIMEOUT", "2000")];
    let stack = Stack::start(&variables).await?;
    let before = stack.login(KNOWN_MOBILE, &[]).await?;
    receiver.expect_tree(&before.trace_id(), LOGIN_TREE).await;

    vanishing.freeze();
    network.lead_to(receiver.grpc);
    let after = stack.login(KNOWN_MOBILE, &[]).await?;
    receiver.expect_tree(&after.trace_id(), LOGIN_TREE).await;
    Ok(())
}
