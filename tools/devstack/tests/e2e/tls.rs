//! TLS between api and usercenter, and between the services and the broker. With good certificates, a login
//! works as it does without TLS. With bad certificates, the log says what is wrong.

use anyhow::{Context, Result, ensure};
use harness::{
    PATIENCE,
    certificates::{Certificates, Files, Kind},
    client::Client,
    process::Process,
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack, TestBroker},
};
use http::Method;
use std::{fs, net::SocketAddr};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

type Variable<'a> = (&'a str, &'a str);
type Pairs<'a> = Vec<Variable<'a>>;

/// Returns the TLS variables of usercenter.
fn usercenter<'a>(files: &'a Files, client_ca: &'a str) -> Pairs<'a> {
    vec![
        ("USERCENTER_TLS_CERTIFICATE", &files.certificate),
        ("USERCENTER_TLS_KEY", &files.key),
        ("USERCENTER_TLS_CLIENT_CA", client_ca),
    ]
}

/// Returns the variables for the certificate that api shows to usercenter.
fn to_usercenter(files: &Files) -> Pairs<'_> {
    vec![("USERCENTER_CLIENT_CERTIFICATE", &files.certificate), ("USERCENTER_CLIENT_KEY", &files.key)]
}

/// Returns the variables for the certificate that api and mq show to the broker.
fn to_broker(files: &Files) -> Pairs<'_> {
    vec![("AMQP_CLIENT_CERTIFICATE", &files.certificate), ("AMQP_CLIENT_KEY", &files.key)]
}

#[tokio::test(flavor = "multi_thread")]
async fn with_tls_on_both_sides_of_everything_a_login_is_one_trace_as_ever() -> Result<()> {
    let certificates = Certificates::new()?;
    let (ca, good) = (certificates.ca(), certificates.issue(Kind::Good)?);
    let broker = TestBroker::connect().await?;
    let (_front, amqp_url) = broker.tls_front(&good, Some(&ca))?;
    let mut variables: Vec<_> = usercenter(&good, &ca).into_iter().map(|(n, v)| ("rpc", n, v)).collect();
    variables.extend(to_usercenter(&good).into_iter().map(|(name, value)| ("api", name, value)));
    variables.extend(to_broker(&good).into_iter().map(|(name, value)| ("*", name, value)));
    variables.extend([("*", "AMQP_URL", amqp_url.as_str()), ("api", "USERCENTER_CA", &ca)]);
    // To verify the broker's certificate, api uses the system's authorities, which SSL_CERT_FILE replaces,
    // and mq uses the authorities in AMQP_CA.
    variables.extend([("api", "SSL_CERT_FILE", ca.as_str()), ("mq", "AMQP_CA", &ca)]);

    let mut stack = Stack::start_on(broker, &variables).await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_eq!(answer.status, 200);
    let spans = stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    let served = spans.iter().find(|span| span.service == "usercenter").context("no span of usercenter")?;
    assert_eq!(served.attributes["network.peer.address"], "127.0.0.1");
    stack.stop().await
}

/// The log lines about failed TLS connections: api's line about usercenter, and the lines of api and mq about
/// the broker. `Said::with` checks the address in each line.
struct Said {
    api_of_usercenter: String,
    usercenter: Process,
    api_of_broker: String,
    mq_of_broker: String,
}

impl Said {
    /// Starts usercenter and the broker with the certificate `servers`. If there is a `client_ca`, usercenter
    /// and the broker ask for a client certificate. api and mq show the certificate `client`, if there is
    /// one. A login must fail.
    async fn with(
        certificates: &Certificates,
        servers: &Files,
        client_ca: Option<&str>,
        client: Option<&Files>,
    ) -> Result<Self> {
        let broker = TestBroker::embedded().await?;
        let (front, amqp_url) = broker.tls_front(servers, client_ca)?;
        let rpc = Process::start("rpc", &usercenter(servers, client_ca.unwrap_or_default())).await?;
        let (ca, url) = (certificates.ca(), format!("https://{}", rpc.address));
        let mut variables = vec![("AMQP_URL", amqp_url.as_str()), ("AMQP_CA", &ca)];
        variables.extend(client.into_iter().flat_map(to_broker));
        let mq = Process::start("mq", &variables).await?;
        variables.extend([("USERCENTER_URL", url.as_str()), ("USERCENTER_CA", &ca)]);
        variables.extend(client.into_iter().flat_map(to_usercenter));
        let api = Process::start("api", &variables).await?;

        let login = format!("http://{}/usercenter/v1/user/login", api.address);
        let body = format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#);
        let json = [("content-type", "application/json")];
        let answer = Client::new().send(Method::POST, &login, &json, body).await?;
        ensure!(answer.status == 503, "{}", answer.status);
        let said = Self {
            api_of_usercenter: api.said("can't reach usercenter").await?,
            api_of_broker: api.said("can't connect to the broker").await?,
            mq_of_broker: mq.said("can't connect to the broker").await?,
            usercenter: rpc,
        };
        let (usercenter, broker) = (said.usercenter.address.to_string(), front.address.to_string());
        assert!(said.api_of_usercenter.contains(&usercenter), "{}", said.api_of_usercenter);
        for line in [&said.api_of_broker, &said.mq_of_broker] {
            assert!(line.contains(&broker), "{line}");
        }
        Ok(said)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_certificate_is_not_good_is_refused_with_a_line_that_says_why() -> Result<()> {
    let certificates = Certificates::new()?;
    for (kind, why) in [
        (Kind::WrongName, "certificate not valid for name"),
        (Kind::Expired, "certificate expired"),
        (Kind::UnknownIssuer, "UnknownIssuer"),
    ] {
        let said = Said::with(&certificates, &certificates.issue(kind)?, None, None).await?;
        for line in [&said.api_of_usercenter, &said.api_of_broker, &said.mq_of_broker] {
            assert!(line.contains(why), "{kind:?}: {line}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_a_good_certificate_is_refused_with_a_line_on_both_sides() -> Result<()> {
    let certificates = Certificates::new()?;
    let (ca, good) = (certificates.ca(), certificates.issue(Kind::Good)?);
    let unknown = certificates.issue(Kind::UnknownIssuer)?;
    let expired = certificates.issue(Kind::Expired)?;
    for (client, why_to_client, why) in [
        (None, "CertificateRequired", "peer sent no certificates"),
        (Some(&unknown), "UnknownCA", "UnknownIssuer"),
        (Some(&expired), "CertificateExpired", "certificate expired"),
    ] {
        let said = Said::with(&certificates, &good, Some(&ca), client).await?;
        for line in [&said.api_of_usercenter, &said.api_of_broker, &said.mq_of_broker] {
            assert!(line.contains(why_to_client), "{line}");
        }
        let line = said.usercenter.said("refused a connection").await?;
        assert!(line.contains(why) && line.contains("127.0.0.1:"), "{line}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn usercenter_asks_itself_for_its_health_by_tls_whatever_the_certificate() -> Result<()> {
    let certificates = Certificates::new()?;
    let (ca, other) = (certificates.ca(), certificates.issue(Kind::Good)?);
    for (kind, client_ca) in [(Kind::WrongName, ""), (Kind::UnknownIssuer, &ca)] {
        let files = certificates.issue(kind)?;
        let rpc = Process::start("rpc", &usercenter(&files, client_ca)).await?;
        let listen = rpc.address.to_string();
        let asks = async |files| {
            let mut variables = usercenter(files, client_ca);
            variables.push(("USERCENTER_LISTEN", &listen));
            anyhow::Ok(Process::command("rpc", &variables)?.arg("health").output().await?)
        };
        let output = asks(&files).await?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        // A probe that is configured with another certificate refuses this server.
        assert_eq!(asks(&other).await?.status.code(), Some(1));
        assert!(serving::health::probe(rpc.address).await.is_err(), "without TLS");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_do_not_finish_the_handshake_are_cut_off_and_hold_up_nobody() -> Result<()> {
    /// The first bytes of a handshake. Their length fields announce more bytes.
    const BEGUN: &[u8] = &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];

    let certificates = Certificates::new()?;
    let files = certificates.issue(Kind::Good)?;
    let rpc = Process::start("rpc", &usercenter(&files, "")).await?;
    let mut connections = Vec::new();
    for i in 0..200 {
        let mut connection = TcpStream::connect(rpc.address).await?;
        connection.write_all(if i % 2 == 0 { BEGUN } else { &[] }).await?;
        connections.push(connection);
    }
    assert!(healthy(rpc.address, &files).await?, "a health check was held up");
    for mut connection in connections {
        let closed =
            timeout(PATIENCE, connection.read(&mut [0; 64])).await.context("the connection is still open")?;
        assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
    }
    Ok(())
}

async fn healthy(address: SocketAddr, files: &Files) -> Result<bool> {
    let listen = address.to_string();
    let mut variables = usercenter(files, "");
    variables.push(("USERCENTER_LISTEN", &listen));
    Ok(Process::command("rpc", &variables)?.arg("health").output().await?.status.success())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_used_ends_the_service_with_2_and_a_line_that_names_it() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let taken = listener.local_addr()?.to_string();
    let certificates = Certificates::new()?;
    let (ca, good) = (certificates.ca(), certificates.issue(Kind::Good)?);
    let other = certificates.issue(Kind::WrongName)?;
    let (missing, rubbish) = (certificates.path("missing.pem"), certificates.path("rubbish.pem"));
    fs::write(&rubbish, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")?;
    let empty = certificates.path("empty.pem");
    fs::write(&empty, "")?;
    let amqps = ("AMQP_URL", "amqps://localhost");
    let https = ("USERCENTER_URL", "https://localhost:1");
    let (certificate, key) = (good.certificate.as_str(), good.key.as_str());
    let of_usercenter = ("USERCENTER_TLS_CERTIFICATE", certificate);
    let with_certificate = ("AMQP_CLIENT_CERTIFICATE", certificate);
    let cases: [(&str, &[Variable], &str); 15] = [
        ("rpc", &[of_usercenter], "USERCENTER_TLS_CERTIFICATE: USERCENTER_TLS_KEY is not set"),
        ("rpc", &[("USERCENTER_TLS_KEY", key)], "USERCENTER_TLS_KEY: USERCENTER_TLS_CERTIFICATE is not set"),
        ("rpc", &[("USERCENTER_TLS_CLIENT_CA", &ca)], "USERCENTER_TLS_CERTIFICATE is not set"),
        ("rpc", &[of_usercenter, ("USERCENTER_TLS_KEY", &missing)], "missing.pem: No such file"),
        ("rpc", &[of_usercenter, ("USERCENTER_TLS_KEY", &empty)], "empty.pem: no items found"),
        ("rpc", &[of_usercenter, ("USERCENTER_TLS_KEY", &other.key)], "Good.pem: keys may not be consistent"),
        ("api", &[https, ("USERCENTER_CA", &missing)], "USERCENTER_CA: "),
        ("api", &[https, ("USERCENTER_CA", &rubbish)], "rubbish.pem: invalid peer certificate: BadEncoding"),
        (
            "api",
            &[https, ("SSL_CERT_FILE", &empty), ("SSL_CERT_DIR", "/nowhere")],
            "USERCENTER_CA: not set, and",
        ),
        ("api", &[("USERCENTER_CA", &ca)], "USERCENTER_CA: USERCENTER_URL is not https"),
        ("api", &[amqps, ("AMQP_CA", &empty)], "empty.pem: there is no certificate in it"),
        ("mq", &[amqps, ("AMQP_CA", &rubbish)], "AMQP_CA: "),
        ("mq", &[amqps, ("AMQP_CA", &ca), with_certificate], "AMQP_CLIENT_KEY is not set"),
        ("mq", &[("AMQP_CA", &ca)], "AMQP_CA: AMQP_URL is not amqps"),
        ("mq", &[("AMQP_URL", "amqps://user:s3cr3t@a..b"), ("AMQP_CA", &ca)], "AMQP_URL: "),
    ];
    for (service, variables, expected) in cases {
        let mut command = Process::command(service, variables)?;
        // This port is in use. A service that tried to listen on it would exit with 1.
        for listen in ["API_LISTEN", "USERCENTER_LISTEN", "MQ_LISTEN"] {
            command.env(listen, &taken);
        }
        let output = command.output().await?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{service} {variables:?}: {said}");
        let lines: Vec<_> = said.lines().filter(|line| line.contains(expected)).collect();
        assert_eq!(lines.len(), 1, "{service} {variables:?}: {said}");
        assert!(!said.contains("s3cr3t"), "{said}");
    }
    Ok(())
}
