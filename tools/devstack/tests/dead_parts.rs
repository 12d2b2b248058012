//! If a part of a service panics in the background, the service ends with an error that names the part.

use anyhow::{Context, Result};
use clap::Parser;
use harness::{
    PATIENCE,
    client::Client,
    stack::KNOWN_MOBILE,
    stand_in::{Reply, StandIn},
};
use serving::shutdown::Shutdown;
use std::{
    net::SocketAddr,
    sync::{Mutex, PoisonError},
};
use tempfile::TempDir;
use tokio::{net::TcpListener, select, time::timeout};
use tracing::{Event, Subscriber};
use tracing_subscriber::{Layer, layer, prelude::*};

/// The module that panics when it logs something. A service has no hook that makes a part panic, but every
/// part logs.
static FAULTY: Mutex<&str> = Mutex::new("");

struct PanicWhenFaulty;

impl<S: Subscriber> Layer<S> for PanicWhenFaulty {
    fn on_event(&self, event: &Event<'_>, _: layer::Context<'_, S>) {
        let faulty = *FAULTY.lock().unwrap_or_else(PoisonError::into_inner);
        assert_ne!(event.metadata().target(), faulty, "on purpose");
    }
}

const NO_BROKER: &str = "--amqp-url=amqp://guest:guest@127.0.0.1:1/%2f";

async fn listen() -> Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Returns the error with which `service` ends when `module` panics.
async fn error(module: &'static str, service: impl Future<Output = Result<()>>) -> Result<String> {
    *FAULTY.lock().unwrap_or_else(PoisonError::into_inner) = module;
    let ended = timeout(PATIENCE, service).await.context("the service does not end")?;
    Ok(ended.err().context("no error")?.to_string())
}

#[tokio::test]
async fn each_part_that_panics_ends_its_service_with_an_error_that_names_it() -> Result<()> {
    tracing_subscriber::registry().with(PanicWhenFaulty).init();
    let directory = TempDir::new()?;

    let usercenter = StandIn::start(|_| Reply::User).await?;
    let usercenter_url = format!("--usercenter-url={}", usercenter.url);
    let config = |data: &str| {
        let data_dir = format!("--data-dir={}", directory.path().join(data).display());
        let arguments = ["api", NO_BROKER, &usercenter_url, &data_dir, "--spool-max-bytes=1"];
        api::config::Config::try_parse_from(arguments)
    };
    let (first, second) = (config("first")?, config("second")?);
    let shutdown = Shutdown::on_signal(first.shutdown)?;

    // The dispatcher panics when the crate amqp logs that there is no broker.
    let service = api::run(&first, listen().await?.0, &shutdown);
    assert_eq!(error("amqp::opening", service).await?, "the dispatcher panicked");

    // The thread of the spool panics when it logs that the spool is full.
    let (listener, address) = listen().await?;
    let url = format!("http://{address}/usercenter/v1/user/login");
    let body = format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#);
    let client = Client::new();
    let service = async {
        let service = api::run(&second, listener, &shutdown);
        let json = [("content-type", "application/json")];
        let login = client.send(http::Method::POST, &url, &json, body);
        tokio::pin!(service);
        select! {
            ended = &mut service => ended,
            _ = login => service.await,
        }
    };
    assert_eq!(error("api::outbox::spool", service).await?, "the spool's thread panicked");

    // The task that keeps the login history panics when it logs that the database is available.
    let database = format!("--database-url=sqlite://{}", directory.path().join("mq.db").display());
    let config = mq::config::Config::try_parse_from(["mq", NO_BROKER, &database])?;
    let service = mq::run(&config, listen().await?.0, &shutdown);
    assert_eq!(error("mq::history", service).await?, "the task of the login history panicked");
    Ok(())
}
