//! SIGTERM and SIGINT: no answered request loses a span, nothing in hand is dropped, exit code 0.

use anyhow::{Context, Result};
use devstack::{
    client::Client,
    process::Process,
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack},
    trace::{dedent, tree},
};
use proto::usercenter::v1::{
    GetUserByMobileRequest, GetUserByMobileResponse, User,
    usercenter_server::{Usercenter, UsercenterServer},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::{net::TcpListener, task::JoinSet, time::sleep};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

/// Logins from eight callers until told to stop: the trace ids of those that were answered with 200.
struct Load {
    stop: Arc<AtomicBool>,
    callers: JoinSet<Vec<String>>,
}

impl Load {
    fn start(url: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut callers = JoinSet::new();
        for _ in 0..8 {
            let (stop, url, client) = (stop.clone(), url.to_owned(), Client::new());
            callers.spawn(async move {
                let mut answered = Vec::new();
                while !stop.load(Relaxed) {
                    let json = [("content-type", "application/json")];
                    let body = format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#);
                    match client.send(http::Method::POST, &url, &json, body).await {
                        Ok(answer) if answer.status == 200 => answered.push(answer.trace_id()),
                        // The service is gone: don't spin.
                        _ => sleep(Duration::from_millis(5)).await,
                    }
                }
                answered
            });
        }
        Self { stop, callers }
    }

    async fn finish(self) -> Vec<String> {
        self.stop.store(true, Relaxed);
        self.callers.join_all().await.concat()
    }
}

/// Under load, a second in, stops what `service` picks; then all answered logins must be whole.
async fn stop_under_load(signal: &str, service: impl Fn(&mut Stack) -> &mut Process) -> Result<()> {
    let mut stack = Stack::start(&[("*", "RUST_LOG", "info,api::login=warn,mq::processing=warn")]).await?;
    let load = Load::start(&stack.login_url());
    sleep(Duration::from_secs(1)).await;
    let stopped = service(&mut stack);
    stopped.signal(signal).await?;
    let exit = stopped.exit().await?;
    assert!(exit.success(), "{exit}: {}", stopped.output());
    assert!(!stopped.output().contains("cut off"), "{}", stopped.output());
    assert!(!stopped.output().contains("lost"), "{}", stopped.output());
    let name = stopped.name;
    let answered = load.finish().await;
    assert!(answered.len() > 50, "{} logins", answered.len());

    // A consumer that was stopped left messages behind: the next one takes them.
    let variables = [
        ("AMQP_URL", stack.broker.url.clone()),
        ("AMQP_PREFIX", stack.broker.prefix.clone()),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{}", stack.receiver.grpc)),
        ("OTEL_BSP_SCHEDULE_DELAY", "20".to_owned()),
    ];
    let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let next = if name == "mq" { Some(Process::start("mq", &variables).await?) } else { None };
    for trace in &answered {
        stack.receiver.expect_tree(trace, LOGIN_TREE).await;
    }
    if let Some(mut next) = next {
        // Once more when it has sent all: what was processed twice shows.
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

/// A usercenter that takes its time.
struct Slow(Duration);

#[tonic::async_trait]
impl Usercenter for Slow {
    async fn get_user_by_mobile(
        &self,
        _: Request<GetUserByMobileRequest>,
    ) -> Result<Response<GetUserByMobileResponse>, Status> {
        sleep(self.0).await;
        let user = User { id: 1, nickname: String::new() };
        Ok(Response::new(GetUserByMobileResponse { user: Some(user) }))
    }
}

async fn slow(delay: Duration) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let server = tonic::transport::Server::builder().add_service(UsercenterServer::new(Slow(delay)));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    Ok(url)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_in_flight_is_answered_and_a_new_connection_refused() -> Result<()> {
    let url = slow(Duration::from_millis(800)).await?;
    let mut stack = Stack::start(&[("api", "USERCENTER_URL", &url)]).await?;
    let (login_url, client) = (stack.login_url(), Client::new());
    let in_flight = tokio::spawn(async move {
        let json = [("content-type", "application/json")];
        client.send(http::Method::POST, &login_url, &json, format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#)).await
    });
    // It is in flight once its message would be next: long before the stub answers.
    sleep(Duration::from_millis(300)).await;
    stack.api.signal("TERM").await?;
    stack.api.said("finishing requests in flight").await?;
    assert!(Client::new().get(&format!("http://{}/healthz", stack.api.address)).await.is_err());
    assert_eq!(in_flight.await??.status, 200);
    assert!(stack.api.exit().await?.success());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_takes_too_long_is_cut_off_and_its_span_says_so() -> Result<()> {
    let url = slow(Duration::from_secs(3600)).await?;
    let variables = [
        ("api", "USERCENTER_URL", url.as_str()),
        ("api", "USERCENTER_TIMEOUT", "1h"),
        ("*", "SHUTDOWN_TIMEOUT", "1s"),
    ];
    let mut stack = Stack::start(&variables).await?;
    let (login_url, client) = (stack.login_url(), Client::new());
    let in_flight = tokio::spawn(async move {
        let json = [("content-type", "application/json")];
        client.send(http::Method::POST, &login_url, &json, format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#)).await
    });
    sleep(Duration::from_millis(300)).await;
    let start = Instant::now();
    let exit = stack.api.stop().await?;
    assert!(exit.success() && start.elapsed() < Duration::from_secs(3), "{exit} after {:?}", start.elapsed());
    assert!(in_flight.await?.is_err());
    let span = stack.receiver.expect_span(|span| span.service == "api" && span.kind == "SERVER").await;
    assert_eq!(span.attributes["error.type"], "cancelled");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn services_that_wait_for_a_broker_end_at_once() -> Result<()> {
    for name in ["api", "mq"] {
        let variables = [("AMQP_URL", "amqp://127.0.0.1:1"), ("OTEL_TRACES_EXPORTER", "none")];
        let mut service = Process::start(name, &variables).await?;
        service.said("can't connect to the broker").await?;
        let start = Instant::now();
        assert!(service.stop().await?.success());
        assert!(start.elapsed() < Duration::from_secs(2), "{name}: {:?}", start.elapsed());
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
    let mut stack = Stack::start(&[("*", "SHUTDOWN_DELAY", "2s")]).await?;
    let (client, readyz) = (Client::new(), format!("http://{}/readyz", stack.api.address));
    assert_eq!(client.get(&readyz).await?.status, 200);
    let health =
        devstack::process::Process::command("rpc", &[("USERCENTER_LISTEN", &stack.rpc.address.to_string())]);
    assert!(health?.arg("health").status().await?.success());

    // usercenter first: that one of its instances goes must not make api unready, which has others.
    stack.rpc.signal("TERM").await?;
    let unready = devstack::poll(Duration::from_secs(1), async || {
        proto::health::probe(stack.rpc.address).await.is_err().then_some(())
    });
    unready.await.context("usercenter says that it is ready")?;
    assert_eq!(client.get(&readyz).await?.status, 200);
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);

    stack.api.signal("TERM").await?;
    let unready = devstack::poll(Duration::from_secs(1), async || {
        client.get(&readyz).await.ok().filter(|answer| answer.status == 503)
    });
    let answer = unready.await.context("api says that it is ready")?;
    assert_eq!(answer.json()["stopping"], true);
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

#[tokio::test(flavor = "multi_thread")]
async fn one_deadline_bounds_everything_even_if_nothing_ends_by_itself() -> Result<()> {
    // A usercenter that never answers, a collector that never answers, a caller that never finishes.
    let usercenter = slow(Duration::from_secs(60)).await?;
    let black_hole = TcpListener::bind("127.0.0.1:0").await?;
    let collector = format!("http://{}", black_hole.local_addr()?);
    let mut stack = Stack::start(&[
        ("api", "USERCENTER_URL", &usercenter),
        ("api", "USERCENTER_TIMEOUT", "60s"),
        ("*", "OTEL_EXPORTER_OTLP_ENDPOINT", &collector),
        ("*", "SHUTDOWN_TIMEOUT", "2s"),
        ("*", "SHUTDOWN_DELAY", "500ms"),
    ])
    .await?;
    let (login_url, client) = (stack.login_url(), Client::new());
    let json = [("content-type", "application/json")];
    let in_flight = tokio::spawn(async move {
        client.send(http::Method::POST, &login_url, &json, format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#)).await
    });
    sleep(Duration::from_millis(300)).await;
    for service in [&mut stack.api, &mut stack.rpc, &mut stack.mq] {
        let start = Instant::now();
        let exit = service.stop().await?;
        let took = start.elapsed();
        assert!(exit.success(), "{}: {exit}", service.name);
        // The time-out, and a generous moment for a busy machine.
        assert!(took < Duration::from_secs(4), "{}: {took:?}", service.name);
        assert!(took >= Duration::from_millis(500), "{}: {took:?}", service.name);
    }
    assert!(stack.api.output().contains("cut off at the deadline"), "{}", stack.api.output());
    assert!(in_flight.await?.is_err());
    Ok(())
}
