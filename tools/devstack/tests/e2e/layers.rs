//! A custom layer in each place that can have one. `docs/layers.md` quotes this file.

use anyhow::Result;
use api::{
    outbox::{Capacity, PublishOptions, Spool},
    publisher::{LoginEvent, Publisher},
    router, usercenter,
};
use axum::{Router, body::Body, routing::get};
use futures_util::future::BoxFuture;
use harness::{
    PATIENCE,
    stack::{KNOWN_MOBILE, TestBroker},
};
use mq::{
    history::{self, History, Login, Processed},
    processing::record,
};
use proto::{
    login::{MobileNumber, NotAMobileNumber},
    usercenter::v1::{
        GetUserByMobileRequest, GetUserByMobileResponse,
        usercenter_client::UsercenterClient,
        usercenter_server::{Usercenter, UsercenterServer},
    },
};
use resilience::InFlight;
use std::{
    sync::mpsc::{self, Receiver, Sender},
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::net::TcpListener;
use tonic::{
    Code, Request, Response, Status,
    transport::{Endpoint, Server, server::TcpIncoming},
};
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

fn known_mobile() -> Result<MobileNumber, NotAMobileNumber> {
    KNOWN_MOBILE.to_owned().try_into()
}

/// Tells how long each request took.
#[derive(Clone)]
struct TimedLayer {
    name: &'static str,
    times: Sender<(&'static str, Duration)>,
}

impl<S> Layer<S> for TimedLayer {
    type Service = Timed<S>;

    fn layer(&self, inner: S) -> Timed<S> {
        Timed { inner, layer: self.clone() }
    }
}

/// A service in the [`TimedLayer`].
#[derive(Clone)]
struct Timed<S> {
    inner: S,
    layer: TimedLayer,
}

impl<S, Request> Service<Request> for Timed<S>
where
    S: Service<Request, Future: Send + 'static>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let TimedLayer { name, times } = self.layer.clone();
        let began = Instant::now();
        let outcome = self.inner.call(request);
        Box::pin(async move {
            let outcome = outcome.await;
            // Sending fails if the receiver of the times is gone.
            let _ = times.send((name, began.elapsed()));
            outcome
        })
    }
}

/// Makes a layer for each name, and the receiver of the times from all these layers.
fn timed<const N: usize>(names: [&'static str; N]) -> ([TimedLayer; N], Receiver<(&'static str, Duration)>) {
    let (times, received) = mpsc::channel();
    (names.map(|name| TimedLayer { name, times: times.clone() }), received)
}

/// Checks that requests ended in the layers with these names, in this order. A request ends in the inner
/// layer before it ends in the outer layer.
fn assert_ended(times: &Receiver<(&'static str, Duration)>, names: &[&str]) {
    let ended: Vec<_> = times.try_iter().collect();
    assert_eq!(ended.iter().map(|(name, _)| *name).collect::<Vec<_>>(), names);
}

#[tokio::test]
async fn around_the_http_service() -> Result<()> {
    let ([outer, inner], times) = timed(["outer", "inner"]);
    let limits = router::RequestLimits { max_in_flight: 10, deadline: PATIENCE };
    let routes: Router = Router::new().route("/hello", get(async || "hello"));

    let app = router::in_layers(routes.layer(ServiceBuilder::new().layer(outer).layer(inner)), limits);

    app.oneshot(http::Request::get("/hello").header("host", "api").body(Body::empty())?).await?;
    assert_ended(&times, &["inner", "outer"]);
    Ok(())
}

/// A usercenter that always fails.
struct Unwell;

#[tonic::async_trait]
impl Usercenter for Unwell {
    async fn get_user_by_mobile(
        &self,
        _: Request<GetUserByMobileRequest>,
    ) -> Result<Response<GetUserByMobileResponse>, Status> {
        Err(Status::unavailable("not well"))
    }
}

#[tokio::test]
async fn around_the_grpc_server_and_the_grpc_client() -> Result<()> {
    let ([outer, inner], served) = timed(["outer", "inner"]);
    let limits = rpc::layers::RequestLimits { in_flight: InFlight::at_most(10), deadline: PATIENCE };
    let service = UsercenterServer::new(Unwell);

    let server =
        rpc::layers::in_layers(Server::builder(), limits).layer(outer).layer(inner).add_service(service);

    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));

    let ([call, attempt], called) = timed(["call", "attempt"]);
    let endpoint = Endpoint::from_shared(url)?;
    let limits =
        usercenter::CallLimits { timeout: PATIENCE, attempts: 2, circuit_pause: Duration::from_secs(1) };

    let channel = attempt.layer(endpoint.connect_lazy());
    let client = call.layer(usercenter::in_layers(endpoint.uri(), limits, channel));

    let lookup = GetUserByMobileRequest { mobile: KNOWN_MOBILE.to_owned() };
    let outcome = UsercenterClient::new(client).get_user_by_mobile(lookup).await;
    assert_eq!(outcome.expect_err("a failure").code(), Code::Unavailable);
    assert_ended(&called, &["attempt", "attempt", "call"]);
    assert_ended(&served, &["inner", "outer", "inner", "outer"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn around_the_publisher() -> Result<()> {
    let ([outer, inner], times) = timed(["outer", "inner"]);
    let (broker, data) = (TestBroker::connect().await?, tempfile::tempdir()?);
    let server = amqp::connection::parse_url(&broker.url).map_err(anyhow::Error::msg)?;
    let spool = Spool::open(data.path(), Capacity { entries: 10, bytes: 10_000 })?;
    let options = PublishOptions { timeout: PATIENCE, copies: false };
    let (publisher, publishing) = Publisher::start(server, broker.topology.clone(), options, spool);

    let publisher = ServiceBuilder::new().layer(outer).layer(inner).service(publisher);

    publisher.oneshot(LoginEvent { mobile: known_mobile()? }).await?;
    assert_ended(&times, &["inner", "outer"]);
    publishing.close(tokio::time::Instant::now() + PATIENCE).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn around_the_processing_of_a_message() -> Result<()> {
    let ([outer, inner], times) = timed(["outer", "inner"]);
    let data = tempfile::tempdir()?;
    let url = format!("sqlite://{}", data.path().join("mq.db").display());
    let (history, _) = History::start(history::parse_url(&url).map_err(anyhow::Error::msg)?);

    let processing = ServiceBuilder::new()
        .layer(outer)
        .layer(inner)
        .service_fn(move |login| record(history.clone(), login));

    let login = Login { message_id: "1".to_owned(), trace_id: None, mobile: known_mobile()?, attempt: 1 };
    for processed in [Processed::Applied, Processed::Duplicate] {
        assert_eq!(processing.clone().oneshot(login.clone()).await?, processed);
    }
    assert_ended(&times, &["inner", "outer", "inner", "outer"]);
    Ok(())
}
