//! Export over OTLP. The tests cover each protocol with each compression, TLS, and servers that are not OTLP
//! collectors.

use anyhow::{Result, ensure};
use harness::{
    certificates::{Certificates, Files, Kind},
    process::Process,
    proxy::Proxy,
    receiver::Receiver,
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack},
    tls_front::TlsFront,
};
use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy, sink},
    net::TcpListener,
};

type Variable<'a> = (&'a str, &'a str);

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const PROTOCOL: &str = "OTEL_EXPORTER_OTLP_PROTOCOL";

/// Each warning about an export contains one of these texts.
const WARNINGS: [&str; 2] = ["spans can't be exported", "spans were rejected"];

#[tokio::test(flavor = "multi_thread")]
async fn a_login_arrives_by_each_protocol_with_each_compression() -> Result<()> {
    for (protocol, content_type, encoding) in [
        ("grpc", "application/grpc", "grpc-encoding"),
        ("http/protobuf", "application/x-protobuf", "content-encoding"),
        ("http/json", "application/json", "content-encoding"),
    ] {
        let receiver = Receiver::start().await?;
        let address = if protocol == "grpc" { receiver.grpc } else { receiver.http };
        let stack = Stack::start(&[
            ("*", ENDPOINT, &format!("http://{address}")),
            ("*", PROTOCOL, protocol),
            ("api", "OTEL_EXPORTER_OTLP_COMPRESSION", "none"),
            ("rpc", "OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("mq", "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "zstd"),
            ("api", "OTEL_EXPORTER_OTLP_HEADERS", "api-key=k%20v,user-agent=mine"),
            ("rpc", "OTEL_EXPORTER_OTLP_HEADERS", "api-key=k%20v"),
            ("mq", "OTEL_EXPORTER_OTLP_TRACES_HEADERS", "api-key=k%20v"),
        ])
        .await?;
        let answer = stack.login(KNOWN_MOBILE, &[]).await?;
        receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
        let (mut encodings, mut agents) = (BTreeSet::new(), BTreeSet::new());
        for headers in receiver.requests() {
            assert_eq!(headers["content-type"], content_type);
            assert_eq!(headers["api-key"], "k v");
            // Over gRPC, tonic's own name follows the exporter's name.
            let agent = headers["user-agent"].to_str()?.split(['/', ' ']).next().unwrap_or_default();
            agents.insert(agent.to_owned());
            encodings.insert(headers.get(encoding).map_or("none", |name| name.to_str().unwrap()).to_owned());
        }
        assert_eq!(encodings, BTreeSet::from(["gzip", "none", "zstd"].map(String::from)), "{protocol}");
        assert_eq!(
            agents,
            BTreeSet::from(["OTel-OTLP-Exporter-Rust", "mine"].map(String::from)),
            "{protocol}"
        );
    }
    Ok(())
}

/// Starts a TLS front for the receiver. Returns the front and its URL. If there is a `client_ca`, clients
/// must have a certificate from this authority.
fn front(
    receiver: &Receiver,
    protocol: &str,
    files: &Files,
    client_ca: Option<&str>,
) -> Result<(TlsFront, String)> {
    let target = if protocol == "grpc" { receiver.grpc } else { receiver.http };
    let front = TlsFront::start(target, files, client_ca)?;
    let url = format!("https://{}", front.address);
    Ok((front, url))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_arrives_by_tls_on_both_sides() -> Result<()> {
    let certificates = Certificates::new()?;
    let (ca, good) = (certificates.ca(), certificates.issue(Kind::Good)?);
    let bad = certificates.issue(Kind::UnknownIssuer)?;
    for protocol in ["grpc", "http/protobuf"] {
        let receiver = Receiver::start().await?;
        let (_front, url) = front(&receiver, protocol, &good, Some(&ca))?;
        let stack = Stack::start(&[
            ("*", ENDPOINT, &url),
            ("*", PROTOCOL, protocol),
            ("*", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", &good.certificate),
            ("*", "OTEL_EXPORTER_OTLP_CLIENT_KEY", &good.key),
            ("api", "OTEL_EXPORTER_OTLP_CERTIFICATE", &ca),
            // The variable of a signal takes precedence over the general variable.
            ("rpc", "OTEL_EXPORTER_OTLP_CERTIFICATE", &bad.certificate),
            ("rpc", "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", &ca),
            ("rpc", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", &bad.certificate),
            ("rpc", "OTEL_EXPORTER_OTLP_CLIENT_KEY", &bad.key),
            ("rpc", "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE", &good.certificate),
            ("rpc", "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY", &good.key),
            // mq trusts the system's authorities, which SSL_CERT_FILE replaces.
            ("mq", "SSL_CERT_FILE", &ca),
        ])
        .await?;
        let answer = stack.login(KNOWN_MOBILE, &[]).await?;
        receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    }
    Ok(())
}

/// Logs in several times while each service exports to a collector that accepts no spans. The elements of
/// `expected` are for api, rpc and mq, in this order. Each element has the collector's address and some
/// texts, and the service's warning must contain all of them. Logins must be as fast as usual. Each service
/// must warn once and count its spans exactly.
async fn each_warns_once(mut stack: Stack, expected: [(SocketAddr, &[&str]); 3]) -> Result<()> {
    const LOGINS: u64 = 5;

    for _ in 0..LOGINS {
        let start = Instant::now();
        ensure!(stack.login(KNOWN_MOBILE, &[]).await?.status == 200);
        ensure!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
    for (service, (address, texts)) in [&stack.api, &stack.rpc, &stack.mq].into_iter().zip(expected) {
        let line = service.said(&format!("{address}/")).await?;
        ensure!(WARNINGS.iter().any(|warning| line.contains(warning)), "{line}");
        ensure!(texts.iter().all(|text| line.contains(text)), "{line}");
    }
    stack.stop().await?;
    for (service, spans) in [(&stack.api, 4), (&stack.rpc, 1), (&stack.mq, 1)] {
        let output = service.output();
        let count: usize = WARNINGS.iter().map(|warning| output.matches(warning).count()).sum();
        ensure!(count == 1, "{count} warnings:\n{output}");
        let ended = spans * LOGINS;
        let account = format!("ended={ended} exported=0 dropped={ended}");
        ensure!(output.lines().filter(|line| line.contains(&account)).count() == 1, "{account}:\n{output}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_whose_certificate_is_not_good_is_refused_with_one_warning_that_says_why() -> Result<()> {
    let certificates = Certificates::new()?;
    let ca = certificates.ca();
    let [wrong, expired, unknown] =
        [Kind::WrongName, Kind::Expired, Kind::UnknownIssuer].map(|kind| certificates.issue(kind));
    let (wrong, expired, unknown) = (wrong?, expired?, unknown?);
    for protocol in ["grpc", "http/protobuf"] {
        let receiver = Receiver::start().await?;
        let (wrong, wrong_url) = front(&receiver, protocol, &wrong, None)?;
        let (expired, expired_url) = front(&receiver, protocol, &expired, None)?;
        let (unknown, unknown_url) = front(&receiver, protocol, &unknown, None)?;
        let stack = Stack::start(&[
            ("*", PROTOCOL, protocol),
            ("*", "OTEL_EXPORTER_OTLP_CERTIFICATE", &ca),
            ("api", ENDPOINT, &wrong_url),
            ("rpc", ENDPOINT, &expired_url),
            ("mq", ENDPOINT, &unknown_url),
        ])
        .await?;
        let whys = [
            (wrong.address, ["certificate not valid for name"].as_slice()),
            (expired.address, &["certificate expired"]),
            (unknown.address, &["UnknownIssuer"]),
        ];
        each_warns_once(stack, whys).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_wants_another_client_certificate_is_told_of_in_one_warning() -> Result<()> {
    let certificates = Certificates::new()?;
    let (ca, good) = (certificates.ca(), certificates.issue(Kind::Good)?);
    let (unknown, expired) = (certificates.issue(Kind::UnknownIssuer)?, certificates.issue(Kind::Expired)?);
    for protocol in ["grpc", "http/protobuf"] {
        let receiver = Receiver::start().await?;
        let (front, url) = front(&receiver, protocol, &good, Some(&ca))?;
        let stack = Stack::start(&[
            ("*", ENDPOINT, &url),
            ("*", PROTOCOL, protocol),
            ("*", "OTEL_EXPORTER_OTLP_CERTIFICATE", &ca),
            ("rpc", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", &unknown.certificate),
            ("rpc", "OTEL_EXPORTER_OTLP_CLIENT_KEY", &unknown.key),
            ("mq", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", &expired.certificate),
            ("mq", "OTEL_EXPORTER_OTLP_CLIENT_KEY", &expired.key),
        ])
        .await?;
        let whys = [
            (front.address, ["CertificateRequired"].as_slice()),
            (front.address, &["UnknownCA"]),
            (front.address, &["CertificateExpired"]),
        ];
        each_warns_once(stack, whys).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_used_ends_a_service_with_2_and_a_line_that_names_it() -> Result<()> {
    let certificates = Certificates::new()?;
    let (ca, good) = (certificates.ca(), certificates.issue(Kind::Good)?);
    let other = certificates.issue(Kind::WrongName)?;
    let (missing, rubbish) = (certificates.path("missing.pem"), certificates.path("rubbish.pem"));
    fs::write(&rubbish, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")?;
    let empty = certificates.path("empty.pem");
    fs::write(&empty, "")?;
    let authority = "OTEL_EXPORTER_OTLP_CERTIFICATE";
    let own = "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE";
    let (certificate, key) = ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "OTEL_EXPORTER_OTLP_CLIENT_KEY");
    let cases: [(&[Variable], &str, &str); 9] = [
        (&[(authority, &missing)], authority, "missing.pem: No such file"),
        (&[(authority, &empty)], authority, "empty.pem: there is no certificate in it"),
        (&[(authority, &ca), (own, &rubbish)], own, "rubbish.pem: invalid peer certificate"),
        (&[(certificate, &good.certificate)], certificate, "OTEL_EXPORTER_OTLP_CLIENT_KEY is not set"),
        (&[(key, &good.key)], key, "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE is not set"),
        (&[(certificate, &empty), (key, &good.key)], certificate, "empty.pem: there is no certificate in it"),
        (&[(certificate, &good.certificate), (key, &empty)], key, "empty.pem: no items found"),
        (&[(certificate, &good.certificate), (key, &other.key)], certificate, "Good.pem: keys may not be"),
        (
            &[("SSL_CERT_FILE", &empty), ("SSL_CERT_DIR", "/nowhere")],
            authority,
            "not set, and the system's authorities",
        ),
    ];
    for (files, variable, problem) in cases {
        for protocol in ["grpc", "http/json"] {
            let variables = [&[(PROTOCOL, protocol), (ENDPOINT, "https://localhost:1")], files].concat();
            let output = Process::command("rpc", &variables)?.output().await?;
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{variables:?}: {said}");
            let names = |line: &&str| line.contains(&format!("{variable}: ")) && line.contains(problem);
            assert_eq!(said.lines().filter(names).count(), 1, "{variables:?}: {said}");
        }
    }
    Ok(())
}

/// Starts a server that answers every connection with `answer`, whatever the client sends.
async fn parrot(answer: &'static str) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            tokio::spawn(async move {
                connection.read_u8().await?;
                connection.write_all(answer.as_bytes()).await?;
                connection.shutdown().await?;
                copy(&mut connection, &mut sink()).await
            });
        }
    });
    Ok(address)
}

#[tokio::test(flavor = "multi_thread")]
async fn when_ports_of_grpc_and_http_are_mixed_up_one_warning_guesses_so() -> Result<()> {
    let receiver = Receiver::start().await?;
    // This stand-in for a gRPC server sends only a SETTINGS frame, which is the first frame of such a server.
    // A real server sends this frame before it reads the request, and then resets the connection. On a busy
    // machine, about one request in a hundred of hyper's client would then wait until its time-out.
    let http2 = parrot("\0\0\0\u{4}\0\0\0\0\0").await?;
    // The receiver's HTTP port also accepts HTTP/2, but most collectors' HTTP ports do not.
    let http1 = parrot("HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n").await?;
    let stack = Stack::start(&[
        ("api", ENDPOINT, &format!("http://{http2}")),
        ("api", PROTOCOL, "http/protobuf"),
        ("rpc", ENDPOINT, &format!("http://{}", receiver.http)),
        ("mq", ENDPOINT, &format!("http://{http1}")),
    ])
    .await?;
    let whys = [
        (http2, ["client error", "is this the port of OTLP/gRPC?"].as_slice()),
        (receiver.http, &["Unimplemented", "is this the port of OTLP/HTTP"]),
        (http1, &["http2 error", "is this the port of OTLP/HTTP"]),
    ];
    each_warns_once(stack, whys).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_answers_nonsense_or_a_page_or_elsewhere_loses_no_account() -> Result<()> {
    let nonsense = parrot("SSH-2.0-OpenSSH_9.6\r\n").await?;
    let page = "HTTP/1.1 200 OK\r\ncontent-type: text/html; charset=utf-8\r\ncontent-length: 6\r\n\r\n<html>";
    let page = parrot(page).await?;
    // A client that followed this redirect would loop for ever.
    let elsewhere = parrot("HTTP/1.1 302 Found\r\nlocation: /v1/traces\r\ncontent-length: 0\r\n\r\n").await?;
    let stack = Stack::start(&[
        ("*", PROTOCOL, "http/protobuf"),
        ("api", ENDPOINT, &format!("http://{nonsense}")),
        ("rpc", ENDPOINT, &format!("http://{page}")),
        ("mq", ENDPOINT, &format!("http://{elsewhere}")),
    ])
    .await?;
    let whys = [
        (nonsense, ["can't be exported", "invalid HTTP version"].as_slice()),
        (page, &["can't be exported", "the answer is a web page"]),
        (elsewhere, &["were rejected", "status code: 302"]),
    ];
    each_warns_once(stack, whys).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_resets_connections_loses_no_account() -> Result<()> {
    let receiver = Receiver::start().await?;
    let reset = Proxy::start(receiver.grpc)?;
    reset.refuse();
    let nonsense = parrot("SSH-2.0-OpenSSH_9.6\r\n").await?;
    let stack = Stack::start(&[
        ("*", ENDPOINT, &format!("http://{}", reset.address)),
        ("rpc", PROTOCOL, "http/protobuf"),
        ("mq", ENDPOINT, &format!("http://{nonsense}")),
    ])
    .await?;
    let whys = [
        (reset.address, ["can't be exported"].as_slice()),
        (reset.address, &["can't be exported"]),
        (nonsense, &["can't be exported", "http2 error"]),
    ];
    each_warns_once(stack, whys).await
}
