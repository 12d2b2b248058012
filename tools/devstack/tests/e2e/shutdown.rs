//! When a service gets SIGTERM or SIGINT, no answered request loses a span, no work in progress is dropped,
//! and the exit code is 0.

use anyhow::{Context, Result};
use harness::{
    PATIENCE,
    client::{Answer, Client},
    poll,
    process::Process,
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack},
    stand_in::{Reply, StandIn},
    trace::{dedent, tree},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::{JoinHandle, JoinSet},
    time::sleep,
};
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

/// Eight callers that log in until told to stop. The load returns the trace ids of the logins answered with
/// 200.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    callers: JoinSet<Vec<String>>,
}

impl Load {
    fn start(url: &str) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut callers = JoinSet::new();
        for _ in 0..8 {
            let (stop, count) = (stop.clone(), count.clone());
            let (url, client) = (url.to_owned(), Client::new());
            callers.spawn(async move {
                let mut answered = Vec::new();
                while !stop.load(Relaxed) {
                    let json = [("content-type", "application/json")];
                    let body = format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#);
                    match client.send(http::Method::POST, &url, &json, body).await {
                        Ok(answer) if answer.status == 200 => {
                            answered.push(answer.trace_id());
                            count.fetch_add(1, Relaxed);
                        }
                        // The service is gone, and the pause keeps this loop from spinning.
                        _ => sleep(Duration::from_millis(5)).await,
                    }
                }
                answered
            });
        }
        Self { stop, answered: count, callers }
    }

    /// Waits until at least this many logins are answered.
    async fn answered(&self, at_least: usize) -> Result<()> {
        let enough = poll(PATIENCE, async || (self.answered.load(Relaxed) >= at_least).then_some(()));
        enough.await.with_context(|| format!("{} logins", self.answered.load(Relaxed)))
    }

    async fn finish(self) -> Vec<String> {
        self.stop.store(true, Relaxed);
        self.callers.join_all().await.concat()
    }
}

/// Under load, stops the process that `service` picks. Then the traces of all answered logins must be
/// complete.
async fn stop_under_load(signal: &str, service: impl Fn(&mut Stack) -> &mut Process) -> Result<()> {
    let variables =
        [("*", "RUST_LOG", "info,api::login=warn,mq::processing=warn"), ("*", "SHUTDOWN_TIMEOUT", "50s")];
    let mut stack = Stack::start(&variables).await?;
    let load = Load::start(&stack.login_url());
    load.answered(500).await?;
    let stopped = service(&mut stack);
    stopped.signal(signal).await?;
    let exit = stopped.exit().await?;
    assert!(exit.success(), "{exit}: {}", stopped.output());
    assert!(!stopped.output().contains("cut off"), "{}", stopped.output());
    assert!(!stopped.output().contains("lost"), "{}", stopped.output());
    let name = stopped.name;
    let answered = load.finish().await;

    // A stopped consumer leaves messages behind, so another consumer is started for them.
    let next = if name == "mq" { Some(stack.another("mq", &[]).await?) } else { None };
    for trace in &answered {
        stack.receiver.expect_tree(trace, LOGIN_TREE).await;
    }
    if let Some(mut next) = next {
        // The trees are checked again after mq has sent all spans, because a message that was processed twice
        // would have one more span.
        next.stop().await?;
        for trace in &answered {
            assert_eq!(tree(&stack.receiver.trace(trace), ""), dedent(LOGIN_TREE));
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn api_stopped_under_load_loses_no_span() -> Result<()> {
    stop_under_load("TERM", |stack| &mut stack.api).await
}

#[tokio::test(flavor = "multi_thread")]
async fn usercenter_stopped_under_load_loses_no_span() -> Result<()> {
    stop_under_load("TERM", |stack| &mut stack.rpc).await
}

#[tokio::test(flavor = "multi_thread")]
async fn mq_stopped_under_load_loses_no_span_and_processes_nothing_twice() -> Result<()> {
    stop_under_load("INT", |stack| &mut stack.mq).await
}

/// Starts a login, and waits until `usercenter` has received its call.
async fn in_hand(stack: &Stack, usercenter: &StandIn) -> Result<JoinHandle<Result<Answer>>> {
    let (url, client) = (stack.login_url(), Client::new());
    let json = [("content-type", "application/json")];
    let body = format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#);
    let login = tokio::spawn(async move { client.send(http::Method::POST, &url, &json, body).await });
    usercenter.called(1).await?;
    Ok(login)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_in_flight_is_answered_and_a_new_connection_refused() -> Result<()> {
    let permits = Arc::new(Semaphore::new(0));
    let gate = permits.clone();
    let usercenter = StandIn::start(move |_| Reply::After(gate.clone())).await?;
    let variables = [("api", "USERCENTER_URL", usercenter.url.as_str()), ("*", "SHUTDOWN_TIMEOUT", "50s")];
    let mut stack = Stack::start(&variables).await?;
    let in_flight = in_hand(&stack, &usercenter).await?;
    stack.api.signal("TERM").await?;
    stack.api.said("finishing requests in flight").await?;
    assert!(Client::new().get(&format!("http://{}/healthz", stack.api.address)).await.is_err());
    // There are permits for several attempts, because api retries a call if this process is too busy to
    // answer api's ping.
    permits.add_permits(10);
    assert_eq!(in_flight.await??.status, 200);
    assert!(stack.api.exit().await?.success());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_takes_too_long_is_cut_off_and_its_span_says_so() -> Result<()> {
    let usercenter = StandIn::start(|_| Reply::Never).await?;
    let variables = [
        ("api", "USERCENTER_URL", usercenter.url.as_str()),
        ("api", "API_DEADLINE", "1h"),
        ("api", "USERCENTER_TIMEOUT", "1h"),
        ("*", "SHUTDOWN_TIMEOUT", "5s"),
    ];
    let mut stack = Stack::start(&variables).await?;
    let in_flight = in_hand(&stack, &usercenter).await?;
    assert!(stack.api.stop().await?.success(), "{}", stack.api.output());
    assert!(in_flight.await?.is_err());
    let span = stack.receiver.expect_span(|span| span.service == "api" && span.kind == "SERVER").await;
    assert_eq!(span.attributes["error.type"], "cancelled");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn services_that_wait_for_a_broker_end_at_once() -> Result<()> {
    for name in ["api", "mq"] {
        let variables = [
            ("AMQP_URL", "amqp://127.0.0.1:1"),
            ("OTEL_TRACES_EXPORTER", "none"),
            // This time-out is longer than `stop` waits, so the test fails if the service ends only at the
            // time-out.
            ("SHUTDOWN_TIMEOUT", "1h"),
        ];
        let mut service = Process::start(name, &variables).await?;
        service.said("can't connect to the broker").await?;
        assert!(service.stop().await?.success());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_in_use_is_a_failure_that_says_so() -> Result<()> {
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let listen = taken.local_addr()?.to_string();
    for name in ["api", "rpc", "mq"] {
        let variables = [
            ("API_LISTEN", &*listen),
            ("USERCENTER_LISTEN", &listen),
            ("MQ_LISTEN", &listen),
            ("OTEL_TRACES_EXPORTER", "none"),
        ];
        let output = Process::command(name, &variables)?.output().await.context(name)?;
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(&format!("listening on {listen}: Address already in use")), "{said}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn in_the_delay_a_service_serves_on_and_says_that_it_is_not_ready() -> Result<()> {
    let mut stack = Stack::start(&[("*", "SHUTDOWN_DELAY", "12s"), ("*", "SHUTDOWN_TIMEOUT", "50s")]).await?;
    let (client, readyz) = (Client::new(), format!("http://{}/readyz", stack.api.address));
    let ready = async |status: u16| {
        // A single try may fail, because usercenter has only one second to answer api.
        let told =
            poll(PATIENCE, async || client.get(&readyz).await.ok().filter(|answer| answer.status == status));
        told.await.with_context(|| format!("/readyz does not answer {status}"))
    };
    let rpc = stack.rpc.address;
    ready(200).await?;
    poll(PATIENCE, async || serving::health::probe(rpc).await.ok())
        .await
        .context("usercenter is not ready")?;

    // usercenter is told to stop first. An instance of usercenter that is stopping must not make api unready,
    // because there may be other instances.
    stack.rpc.signal("TERM").await?;
    let unready = poll(PATIENCE, async || serving::health::probe(rpc).await.is_err().then_some(()));
    unready.await.context("usercenter says that it is ready")?;
    ready(200).await?;
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);

    stack.api.signal("TERM").await?;
    assert_eq!(ready(503).await?.json()["stopping"], true);
    let answer = Client::new()
        .send(
            http::Method::POST,
            &stack.login_url(),
            &[("content-type", "application/json")],
            format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#),
        )
        .await?;
    assert_eq!((answer.status.as_u16(), answer.header("connection")), (200, "close"));
    for service in [&mut stack.api, &mut stack.rpc] {
        assert!(service.exit().await?.success());
    }
    Ok(())
}

/// These peers would delay the shutdown if a service waited until their connections end. One sends nothing.
/// Two have sent half of a request's headers. One never reads, so it answers no HTTP/2 ping. One has an open
/// `Watch` call of the health service.
#[tokio::test(flavor = "multi_thread")]
async fn peers_that_wait_for_nothing_hold_no_service_up() -> Result<()> {
    let mut stack = Stack::start(&[("*", "SHUTDOWN_TIMEOUT", "2m")]).await?;
    let _silent = TcpStream::connect(stack.api.address).await?;
    let mut half_sent = TcpStream::connect(stack.api.address).await?;
    half_sent.write_all(b"POST /usercenter/v1/user/login HTTP/1.1\r\nhost: ").await?;
    let mut kept = TcpStream::connect(stack.api.address).await?;
    kept.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await?;
    kept.read_exact(&mut [0; 15]).await?;
    kept.write_all(b"GET /healthz HTTP/1.1\r\nhost: ").await?;
    let start = Instant::now();
    assert!(stack.api.stop().await?.success());
    // If api waited for the headers of these requests, it would wait for up to 10 s.
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    assert!(!stack.api.output().contains("cut off"), "{}", stack.api.output());

    for service in [&mut stack.rpc, &mut stack.mq] {
        let _silent = TcpStream::connect(service.address).await?;
        let mut deaf = TcpStream::connect(service.address).await?;
        deaf.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await?;
        let channel = Endpoint::from_shared(format!("http://{}", service.address))?.connect().await?;
        let watched = HealthClient::new(channel).watch(HealthCheckRequest::default()).await?;
        assert!(watched.into_inner().message().await?.is_some());

        let start = Instant::now();
        assert!(service.stop().await?.success());
        // HTTP/2 pings need 40 s to detect that a peer doesn't read, and work in progress may take 72 s.
        assert!(start.elapsed() < Duration::from_secs(20), "{}: {:?}", service.name, start.elapsed());
        assert!(!service.output().contains("cut off"), "{}", service.output());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_deadline_bounds_everything_even_if_nothing_ends_by_itself() -> Result<()> {
    // usercenter and the collector never answer, and a caller never finishes its request.
    let usercenter = StandIn::start(|_| Reply::Never).await?;
    let black_hole = TcpListener::bind("127.0.0.1:0").await?;
    let collector = format!("http://{}", black_hole.local_addr()?);
    let mut stack = Stack::start(&[
        ("api", "USERCENTER_URL", &usercenter.url),
        ("api", "API_DEADLINE", "1h"),
        ("api", "USERCENTER_TIMEOUT", "1h"),
        ("*", "OTEL_EXPORTER_OTLP_ENDPOINT", &collector),
        ("*", "OTEL_EXPORTER_OTLP_TIMEOUT", "3600000"),
        ("*", "OTEL_BSP_EXPORT_TIMEOUT", "3600000"),
        ("*", "SHUTDOWN_TIMEOUT", "2s"),
        ("*", "SHUTDOWN_DELAY", "500ms"),
    ])
    .await?;
    let in_flight = in_hand(&stack, &usercenter).await?;
    for service in [&mut stack.api, &mut stack.rpc, &mut stack.mq] {
        let start = Instant::now();
        // Every other time-out is one hour, so only `SHUTDOWN_TIMEOUT` can end the service in time.
        let exit = service.stop().await?;
        let took = start.elapsed();
        assert!(exit.success(), "{}: {exit}", service.name);
        assert!(took >= Duration::from_millis(500), "{}: {took:?}", service.name);
        // The service used the time-out of 2 s that is set, and not the default of 8 s.
        assert!(took < Duration::from_secs(7), "{}: {took:?}", service.name);
    }
    assert!(stack.api.output().contains("cut off at the deadline"), "{}", stack.api.output());
    assert!(in_flight.await?.is_err());
    Ok(())
}
