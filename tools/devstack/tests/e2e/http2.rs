//! usercenter and the health checks of mq receive broken and hostile HTTP/2 frames. Only the connection that
//! sends such frames may end. The services continue to serve, and their memory stays bounded.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use harness::{
    PATIENCE,
    client::raw,
    poll,
    stack::{KNOWN_MOBILE, Stack},
};
use http::Request;
use http_body_util::Empty;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use proto::usercenter::v1::{GetUserByMobileRequest, usercenter_client::UsercenterClient};
use std::fs;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic::{Code, transport::Channel};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

// The frame types of RFC 9113, section 6, and the flag `END_HEADERS`.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// `POST http://x/a` in HPACK: two fields from the static table, and a literal path and authority.
const POST: &[u8] = b"\x83\x86\x04\x02/a\x01\x01x";

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short payload").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Encodes a literal header field without indexing.
fn field(name: &str, value: &str) -> Vec<u8> {
    let short = |text: &str| vec![u8::try_from(text.len()).expect("a short text")];
    [vec![0], short(name), name.into(), short(value), value.into()].concat()
}

fn resident_kib(pid: u32) -> Result<usize> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_frames_end_their_connection_and_nothing_else() -> Result<()> {
    let mut stack = Stack::start(&[]).await?;
    let settings = frame(SETTINGS, 0, 0, b"");
    let streams =
        |each: &dyn Fn(u32) -> Vec<u8>| (0..50_000).flat_map(|i| each(2 * i + 1)).collect::<Vec<_>>();
    let headers = |payload: &[u8]| frame(HEADERS, END_HEADERS, 1, payload);
    let cases = [
        // Each case has a name, the bytes that are sent after the preface and the settings, and whether these
        // bytes end the connection.
        ("no frame at all", b"\xff".repeat(100), true),
        ("a frame larger than allowed", frame(DATA, 0, 1, &[0; 20_000]), true),
        ("settings of an odd length", frame(SETTINGS, 0, 0, b"odd"), true),
        ("a window update of zero", frame(WINDOW_UPDATE, 0, 0, &[0; 4]), true),
        ("a window that overflows", frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]), true),
        ("data for a stream that is not open", frame(DATA, 0, 1, b"x"), true),
        ("a stream id that only the server may use", frame(HEADERS, END_HEADERS, 2, POST), true),
        ("headers that are not HPACK", headers(b"\xff\xff\xff\xff\xff\xff"), true),
        ("an index that is not in the table", headers(b"\xbe"), true),
        (
            "headers cut short by another frame",
            [frame(HEADERS, 0, 1, POST), frame(PING, 0, 0, &[0; 8])].concat(),
            true,
        ),
        ("a header in capitals", headers(&[POST, &field("X-Evil", "1")].concat()), false),
        ("a line break in a header", headers(&[POST, &field("x", "a\r\nevil: 1")].concat()), false),
        ("transfer-encoding", headers(&[POST, &field("transfer-encoding", "chunked")].concat()), false),
        ("no path", headers(b"\x83\x86"), false),
        ("a flood of settings", settings.repeat(100_000), false),
        ("a flood of pings", frame(PING, 0, 0, &[0; 8]).repeat(100_000), false),
        (
            "a flood of CONTINUATION",
            [
                frame(HEADERS, 0, 1, POST),
                frame(CONTINUATION, 0, 1, &field("x", "y").repeat(100)).repeat(10_000),
            ]
            .concat(),
            true,
        ),
        (
            "empty CONTINUATION",
            [frame(HEADERS, 0, 1, POST), frame(CONTINUATION, 0, 1, b"").repeat(100_000)].concat(),
            true,
        ),
        (
            "rapid reset (CVE-2023-44487)",
            streams(&|id| {
                [frame(HEADERS, END_HEADERS, id, POST), frame(RST_STREAM, 0, id, &[0, 0, 0, 8])].concat()
            }),
            true,
        ),
        ("more streams than allowed", streams(&|id| frame(HEADERS, END_HEADERS, id, POST)), false),
    ];
    for service in [&stack.rpc, &stack.mq] {
        let before = resident_kib(service.id())?;
        for (name, frames, is_fatal) in &cases {
            let sent = [PREFACE, &settings, frames].concat();
            let goes_away = |text: &str| text.contains("\u{7}\0\0\0\0\0");
            let enough = |text: &str| if *is_fatal { goes_away(text) } else { !text.is_empty() };
            let answer = raw(service.address, &sent, enough).await?;
            assert!(goes_away(&answer) || !is_fatal, "{}: {name}", service.name);
            let alive = poll(PATIENCE, async || serving::health::probe(service.address).await.ok());
            alive.await.with_context(|| format!("{}: {name}", service.name))?;
        }
        let grown = resident_kib(service.id())?.saturating_sub(before);
        assert!(grown < 64 * 1024, "{}: {grown} KiB more", service.name);
    }
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);
    // No service panicked.
    stack.stop().await?;
    for service in [&stack.rpc, &stack.mq] {
        assert!(!service.output().contains("panicked"), "{}", service.output());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preface_may_arrive_in_parts() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let mut connection = TcpStream::connect(stack.rpc.address).await?;
    connection.set_nodelay(true)?;
    let end = [&PREFACE[20..], &frame(SETTINGS, 0, 0, b""), &frame(PING, 0, 0, b"12345678")].concat();
    for part in [&PREFACE[..3], &PREFACE[3..20], &end] {
        connection.write_all(part).await?;
        // usercenter has read this part before it answers.
        serving::health::probe(stack.rpc.address).await?;
    }
    // The frames before the answer to the ping are about settings and windows.
    let mut head = [0; 9];
    while head[3] != PING {
        timeout(PATIENCE, connection.read_exact(&mut head)).await??;
        ensure!([SETTINGS, WINDOW_UPDATE, PING].contains(&head[3]), "{head:?}");
        timeout(PATIENCE, connection.read_exact(&mut vec![0; usize::from(head[2])])).await??;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_grpc_is_refused_and_a_message_that_is_too_large_has_its_own_status() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let url = format!("http://{}/usercenter.v1.Usercenter/GetUserByMobile", stack.rpc.address);
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http::<Empty<Bytes>>();
    for (method, content_type, status) in [
        ("GET", "application/grpc", 405),
        ("POST", "application/json", 415),
        ("POST", "application/grpcx", 415),
        ("POST", "application/grpc+proto", 200),
    ] {
        let request = Request::builder().method(method).uri(&url).header("content-type", content_type);
        let answer = client.request(request.body(Empty::new())?).await?;
        assert_eq!(answer.status(), status, "{method} {content_type}");
        // A gRPC answer has a gRPC status. Here, this status reports that the request message is missing.
        assert_eq!(answer.headers().contains_key("grpc-status"), status == 200, "{method} {content_type}");
    }
    let channel = Channel::from_shared(format!("http://{}", stack.rpc.address))?.connect().await?;
    let lookup = GetUserByMobileRequest { mobile: "1".repeat(100_000) };
    let too_large = UsercenterClient::new(channel).get_user_by_mobile(lookup).await.unwrap_err();
    assert_eq!(too_large.code(), Code::ResourceExhausted, "{too_large}");
    Ok(())
}
