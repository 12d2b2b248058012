//! The parts of the system: how they start, what they log, and how they end.

use super::{Options, say};
use anyhow::{Context, Result, bail};
use backend::{Addresses, Backend};
use broker::Broker;
use futures_util::future::join_all;
use harness::{
    client::Client,
    free_port, poll,
    process::{self, Process},
};
use std::{
    env,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    time::Duration,
};
use tokio::time::timeout;

/// The time from SIGTERM until services that have not ended are killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(4);

/// When a service has ended, this many of its last lines are printed.
const LAST_LINES: usize = 10;

/// The running parts of the system.
pub struct Parts {
    pub services: Vec<Process>,
    /// The trace backend, or `None` if the spans are sent elsewhere.
    pub backend: Option<Backend>,
    /// The embedded broker, or `None` if another broker is used.
    broker: Option<Broker>,
    amqp_url: String,
    otlp_endpoint: String,
}

impl Parts {
    /// Starts every part that doesn't run elsewhere, and waits until a login would succeed.
    ///
    /// # Errors
    /// If a part doesn't start. The error names the part, the reason and a remedy.
    pub async fn start(options: &Options) -> Result<Self> {
        let address = |port, part| if options.free_ports { free_address() } else { usual(port, part) };
        // A port in use must be reported before anything is built or started.
        let api = address(8888, "api")?;
        let usercenter = address(50051, "usercenter")?;
        let mq = address(50052, "mq")?;
        let elsewhere = |variable| env::var(variable).ok().filter(|url| !url.is_empty());
        let (broker, amqp_url) = match elsewhere("AMQP_URL") {
            Some(url) => (None, url),
            None => {
                let broker = Broker::start_at(address(5672, "the broker")?).await?;
                let url = broker.url();
                (Some(broker), url)
            }
        };
        let (backend, otlp_endpoint) = match elsewhere("OTEL_EXPORTER_OTLP_ENDPOINT") {
            Some(url) => (None, url),
            None => {
                let addresses = Addresses {
                    otlp_grpc: address(4317, "OTLP/gRPC")?,
                    otlp_http: address(4318, "OTLP/HTTP")?,
                    query: address(16686, "the trace page")?,
                };
                let url = format!("http://{}", addresses.otlp_grpc);
                (Some(backend(options, addresses).await?), url)
            }
        };

        say("building the services");
        tokio::task::spawn_blocking(|| process::binary("api")).await??;
        say("starting");
        let [api, usercenter, mq] = [api, usercenter, mq].map(|address| address.to_string());
        let usercenter_url = format!("http://{usercenter}");
        let mut variables = vec![
            ("API_LISTEN", api.as_str()),
            ("USERCENTER_LISTEN", &usercenter),
            ("MQ_LISTEN", &mq),
            ("USERCENTER_URL", &usercenter_url),
            ("AMQP_URL", &amqp_url),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &otlp_endpoint),
            ("SHUTDOWN_TIMEOUT", "3s"),
        ];
        if broker.is_none() {
            // The queue on that broker belongs to one history.
            variables.push(("MQ_DATABASE_URL", "sqlite://target/dev/mq.db"));
        }
        // By default, spans wait for five seconds, which is too long for a person who tries a login and wants
        // to see its trace.
        let mut defaults = vec![("OTEL_BSP_SCHEDULE_DELAY", "200")];
        if backend.is_some() {
            // Unlike Jaeger, this backend accepts log records.
            defaults.extend([("OTEL_LOGS_EXPORTER", "otlp"), ("OTEL_BLRP_SCHEDULE_DELAY", "200")]);
        }
        variables.extend(defaults.into_iter().filter(|(variable, _)| env::var_os(variable).is_none()));
        let services = [("rpc", &usercenter), ("mq", &mq), ("api", &api)]
            .into_iter()
            .map(|(name, address)| Process::start_beside(name, address.parse()?, &variables))
            .collect::<Result<_>>()?;
        let mut parts = Self { services, backend, broker, amqp_url, otlp_endpoint };
        parts.ready(&format!("http://{api}/readyz")).await?;
        Ok(parts)
    }

    async fn ready(&mut self, url: &str) -> Result<()> {
        let client = Client::new();
        let ready = poll(Duration::from_secs(30), async || {
            if let Some(death) = self.deaths().into_iter().next() {
                return Some(Err(anyhow::anyhow!(death)));
            }
            client.get(url).await.ok().filter(|answer| answer.status == 200).map(|_| Ok(()))
        });
        match ready.await {
            Some(ready) => ready,
            None => {
                let said =
                    self.services.iter().map(|s| format!("{}:\n{}\n", s.name, s.last_lines(LAST_LINES)));
                bail!("the services do not get ready; what they said:\n{}", said.collect::<String>())
            }
        }
    }

    /// Returns a text with the address of every part, and with what to do next.
    pub fn summary(&self) -> String {
        let of = |name| self.services.iter().find(|service| service.name == name).map(|s| s.address);
        let address = |name| of(name).map(|address| address.to_string()).unwrap_or_default();
        let port = of("api").map(|address| address.port()).unwrap_or_default();
        let broker = match &self.broker {
            Some(broker) => format!("{}, embedded (guest, guest)", broker.address()),
            // The URL may contain a password.
            None => match amqp::connection::parse_url(&self.amqp_url) {
                Ok(server) => {
                    let authority = server.uri.authority;
                    format!("{}:{}, by AMQP_URL", authority.host, authority.port)
                }
                Err(_) => "by AMQP_URL".to_owned(),
            },
        };
        let (traces, otlp) = match self.backend.as_ref().map(Backend::addresses) {
            Some(Addresses { otlp_grpc, otlp_http, query }) => (
                format!("http://localhost:{}", query.port()),
                format!("http://{otlp_grpc} (gRPC), http://{otlp_http} (HTTP)"),
            ),
            None => ("where OTEL_EXPORTER_OTLP_ENDPOINT leads".to_owned(), self.otlp_endpoint.clone()),
        };
        format!(
            "
Ready. Log in:

  curl -i http://localhost:{port}/usercenter/v1/user/login \\
    -H 'content-type: application/json' -d '{{\"mobile\":\"13800138000\"}}'

  traces      {traces}
  api         http://{api} (HTTP)
  usercenter  {usercenter} (gRPC)
  mq          {mq} (gRPC health checks)
  broker      {broker}
  OTLP        {otlp}

Each trace is drawn here when it is complete. Ctrl-C stops everything.
",
            api = address("api"),
            usercenter = address("rpc"),
            mq = address("mq"),
        )
    }

    /// Returns the log lines since the last call: all of them, or only warnings and errors.
    pub fn new_log_lines(&mut self, all: bool) -> Vec<String> {
        let mut lines = Vec::new();
        for service in &mut self.services {
            let name = service.name;
            let new = service.new_lines().into_iter().filter(|line| all || is_warning(line));
            lines.extend(new.map(|line| format!("{name:>4} │ {line}")));
        }
        lines
    }

    /// Removes the services that have ended; returns their exit statuses and their last lines.
    pub fn deaths(&mut self) -> Vec<String> {
        let mut deaths = Vec::new();
        self.services.retain_mut(|service| {
            let Some(exit) = service.exited() else {
                return true;
            };
            let (name, words) = (service.name, service.last_lines(LAST_LINES));
            deaths.push(format!("{name} has ended ({exit}). Its last lines:\n{words}"));
            false
        });
        deaths
    }

    /// Stops the services, all at once. The other parts stop when they are dropped.
    pub async fn stop(&mut self) {
        let ends = join_all(self.services.iter_mut().map(Process::stop));
        // A service that has not ended after this time is killed when it is dropped.
        let _ = timeout(STOP_TIMEOUT, ends).await;
        self.services.clear();
    }
}

#[cfg(feature = "jaeger-ui")]
async fn backend(options: &Options, addresses: Addresses) -> Result<Backend> {
    match options.jaeger_ui {
        true => Backend::start_with_jaeger_ui(addresses).await,
        false => Backend::start_at(addresses).await,
    }
}

#[cfg(not(feature = "jaeger-ui"))]
async fn backend(_: &Options, addresses: Addresses) -> Result<Backend> {
    Backend::start_at(addresses).await
}

fn is_warning(line: &str) -> bool {
    [" WARN ", " ERROR ", "\"level\":\"WARN\"", "\"level\":\"ERROR\"", "panicked"]
        .iter()
        .any(|mark| line.contains(mark))
}

/// Returns the usual port of a part, if it is free.
fn usual(port: u16, part: &str) -> Result<SocketAddr> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    TcpListener::bind(address).with_context(|| {
        format!("port {port} ({part}) is in use: stop what uses it, or run `cargo dev --free-ports`")
    })?;
    Ok(address)
}

/// Returns a free port.
fn free_address() -> Result<SocketAddr> {
    Ok((Ipv4Addr::LOCALHOST, free_port()?).into())
}
