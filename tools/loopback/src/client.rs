//! A small HTTP client, for tests and tools.

use crate::PATIENCE;
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client as Hyper, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use std::{net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// A client that keeps idle connections open for a while.
#[derive(Clone)]
pub struct Client(Hyper<HttpConnector, Full<Bytes>>);

/// The answer to a request.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Client {
    /// Creates a client without connections.
    #[expect(clippy::new_without_default, reason = "there is nothing to default")]
    pub fn new() -> Self {
        // api closes a connection after ten seconds without a request, even if the next request has just been
        // sent. So this client closes an idle connection earlier.
        Self(Hyper::builder(TokioExecutor::new()).pool_idle_timeout(Duration::from_secs(5)).build_http())
    }

    /// Sends `GET url`.
    ///
    /// # Errors
    /// If there is no answer within 30 seconds.
    pub async fn get(&self, url: &str) -> Result<Answer> {
        self.send(Method::GET, url, &[], "").await
    }

    /// Sends a request with these headers and this body.
    ///
    /// # Errors
    /// If there is no answer within 30 seconds.
    pub async fn send(
        &self,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Result<Answer> {
        let mut request = Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = async {
            let (parts, body) = self.0.request(request.body(Full::new(body.into()))?).await?.into_parts();
            let body = body.collect().await?.to_bytes();
            Ok(Answer { status: parts.status, headers: parts.headers, body })
        };
        let answer = timeout(Duration::from_secs(30), answer).await.map_err(anyhow::Error::new);
        answer.and_then(|answer| answer).with_context(|| format!("no answer from {url}"))
    }
}

/// Sends bytes on a new connection, and reads until the other side closes the connection. Once `enough` accepts
/// the received text, reading also ends when the other side falls silent.
///
/// # Errors
/// If the connection cannot be opened, or if the other side accepts no bytes for a minute.
pub async fn raw(address: SocketAddr, bytes: &[u8], enough: impl Fn(&str) -> bool) -> Result<String> {
    let mut connection = TcpStream::connect(address).await?;
    // The write may fail, because the other side may have closed the connection already.
    let _ = timeout(PATIENCE, connection.write_all(bytes)).await?;
    let mut received = Vec::new();
    loop {
        let is_enough = enough(&String::from_utf8_lossy(&received));
        let patience = if is_enough { A_WHILE } else { PATIENCE };
        let Ok(Ok(1..)) = timeout(patience, connection.read_buf(&mut received)).await else {
            return Ok(String::from_utf8_lossy(&received).into_owned());
        };
    }
}

/// Returns a condition for [`raw`], which is met once at least this many HTTP/1 answers have arrived.
pub fn answers(count: usize) -> impl Fn(&str) -> bool {
    move |received| received.matches("HTTP/1.").count() >= count
}

/// Reads an answer with a `content-length` into `buffer`, and returns its status.
///
/// # Errors
/// If the connection ends before the answer is complete, or if the answer is not HTTP/1.
pub async fn read_status(connection: &mut TcpStream, buffer: &mut Vec<u8>) -> Result<u16> {
    buffer.clear();
    loop {
        ensure!(connection.read_buf(buffer).await? > 0, "the connection was closed");
        let Some(head) = buffer.windows(4).position(|window| window == b"\r\n\r\n") else {
            continue;
        };
        let text = std::str::from_utf8(&buffer[..head])?;
        let length = text.lines().find_map(|line| line.strip_prefix("content-length: "));
        let length: usize = length.unwrap_or("0").parse()?;
        let status = text.split(' ').nth(1).unwrap_or_default().parse()?;
        while buffer.len() < head + 4 + length {
            ensure!(connection.read_buf(buffer).await? > 0, "the connection was closed");
        }
        return Ok(status);
    }
}

/// How long the other side must be silent before [`raw`] stops reading.
const A_WHILE: Duration = Duration::from_millis(200);

impl Answer {
    /// Returns the value of a header, or an empty string if the header is missing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// Returns the trace id in the header `traceparent`.
    pub fn trace_id(&self) -> String {
        self.header("traceparent").split('-').nth(1).unwrap_or_default().to_owned()
    }

    /// Parses the body as JSON. Returns null if it is not JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}
