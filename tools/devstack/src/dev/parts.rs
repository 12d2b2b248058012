//! The parts of the system: how they start, how they end (by a key or by themselves), and what they log. The
//! module `service` starts and ends a single service.

use super::{
    Options, TICK,
    controls::{Press, controls},
    say,
    service::{LAST_LINES, Service},
};
use anyhow::{Result, bail};
use axum::Router;
use backend::{Addresses, Backend};
use broker::Broker;
use futures_util::future::join_all;
use harness::{
    free_port,
    process::{self, Process},
};
use std::{
    env,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::{
    sync::mpsc::Receiver,
    time::{sleep, timeout},
};

/// The time from SIGTERM until a service that is still running is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(4);

/// The folder of the services' data if an external broker is used.
const FOR_GOOD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/dev");

/// How much longer usercenter's answers take while usercenter is slowed down.
const DELAY: Duration = Duration::from_millis(300);

/// The time from a press of the trace backend's button until the backend starts again.
const OUTAGE: Duration = Duration::from_secs(10);

/// The running parts of the system.
pub struct Parts {
    services: Vec<Service>,
    /// The trace backend, or `None` if it is stopped, or if the spans are sent elsewhere.
    pub backend: Option<Backend>,
    /// Where the trace backend listens, unless the spans are sent elsewhere.
    addresses: Option<Addresses>,
    /// The embedded broker and whether it is up, or `None` if another broker is used.
    broker: Option<(Broker, bool)>,
    /// The routes of the page's buttons.
    routes: Router,
    /// The presses that arrive at `routes`.
    pub presses: Receiver<Press>,
    /// The time at which the trace backend's button was pressed, or `None` if the outage from that press is
    /// over.
    outage: Option<Instant>,
    variables: Vec<(&'static str, String)>,
    /// The services' data, which are deleted when this value is dropped.
    _data: Option<TempDir>,
}

impl Parts {
    /// Starts every part that doesn't run elsewhere, and waits until a login would succeed.
    ///
    /// # Errors
    /// If a part doesn't start. The error names the part, the reason and a remedy.
    pub async fn start(options: &Options) -> Result<Self> {
        let elsewhere = |variable| env::var(variable).ok().filter(|url| !url.is_empty());
        let (amqp_url, endpoint) = (elsewhere("AMQP_URL"), elsewhere("OTEL_EXPORTER_OTLP_ENDPOINT"));
        // An unusable port or a wrong variable must be reported before anything is built or started.
        if let Some(url) = &amqp_url {
            amqp::connection::parse_url(url).map_err(|error| anyhow::anyhow!("AMQP_URL: {error}"))?;
        }
        if !options.free_ports {
            dev::check_ports().map_err(anyhow::Error::msg)?;
        }
        let address = |usual| {
            let port = if options.free_ports { free_port()? } else { usual };
            anyhow::Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
        };
        let query = address(16686)?;
        let (routes, presses) = controls(query.port());
        let (api, usercenter, mq) = (address(8888)?, address(50051)?, address(50052)?);
        let (broker, amqp_url) = match amqp_url {
            Some(url) => (None, url),
            None => {
                let broker = Broker::start_at(address(5672)?).await?;
                let url = broker.url();
                say("the broker is ready");
                (Some((broker, true)), url)
            }
        };
        let (backend, endpoint) = match endpoint {
            Some(url) => (None, url),
            None => {
                let addresses = Addresses { otlp_grpc: address(4317)?, otlp_http: address(4318)?, query };
                let url = format!("http://{}", addresses.otlp_grpc);
                let backend = Backend::start_with_controls(addresses, routes.clone()).await?;
                say("the trace backend is ready");
                (Some(backend), url)
            }
        };

        say("building the services");
        tokio::task::spawn_blocking(|| process::binary("api")).await??;
        let mut variables = vec![
            ("USERCENTER_URL", format!("http://{usercenter}")),
            ("AMQP_URL", amqp_url),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint),
            ("SHUTDOWN_TIMEOUT", "3s".to_owned()),
        ];
        // A restarted service uses its earlier data. With an external broker, the data are kept permanently,
        // because the broker's queue belongs to one history.
        let data = if broker.is_some() { Some(TempDir::new()?) } else { None };
        let folder = data.as_ref().map_or(Path::new(FOR_GOOD), TempDir::path);
        variables.push(("MQ_DATABASE_URL", format!("sqlite://{}", folder.join("mq.db").display())));
        variables.push(("API_DATA_DIR", folder.display().to_string()));
        // By default, spans wait up to five seconds for their export, which is too long for a person who tries
        // a login and wants to see its trace.
        let mut defaults = vec![("OTEL_BSP_SCHEDULE_DELAY", "200")];
        if backend.is_some() {
            // Unlike Jaeger, this backend accepts log records.
            defaults.extend([("OTEL_LOGS_EXPORTER", "otlp"), ("OTEL_BLRP_SCHEDULE_DELAY", "200")]);
        }
        let defaults = defaults.into_iter().filter(|(variable, _)| env::var_os(variable).is_none());
        variables.extend(defaults.map(|(variable, value)| (variable, value.to_owned())));
        let services = vec![
            Service::new('u', "usercenter", "rpc", "USERCENTER_LISTEN", usercenter),
            Service::new('m', "mq", "mq", "MQ_LISTEN", mq),
            Service::new('a', "api", "api", "API_LISTEN", api),
        ];
        let addresses = backend.as_ref().map(Backend::addresses).copied();
        let mut parts = Self {
            services,
            backend,
            addresses,
            broker,
            routes,
            presses,
            outage: None,
            variables,
            _data: data,
        };
        for service in &mut parts.services {
            service.start(&parts.variables)?;
        }
        parts.ready().await?;
        Ok(parts)
    }

    /// Waits until all services are ready.
    async fn ready(&mut self) -> Result<()> {
        let is_waiting = |service: &Service| service.start.as_ref().is_some_and(|start| !start.is_finished());
        while self.services.iter().any(is_waiting) {
            if let Some(end) = self.services.iter_mut().find_map(Service::end) {
                bail!(end);
            }
            sleep(TICK).await;
        }
        for service in &mut self.services {
            let is_ready = match service.start.take() {
                Some(start) => start.await?,
                None => false,
            };
            if !is_ready && let Some(process) = &service.process {
                bail!(
                    "{} does not become ready. Its last lines:\n{}",
                    service.name,
                    process.last_lines(LAST_LINES)
                );
            }
        }
        Ok(())
    }

    /// Returns the URL of api.
    pub fn api_url(&self) -> String {
        format!("http://localhost:{}", self.address("api").port())
    }

    /// Returns the URL of the trace page, unless the spans are sent elsewhere.
    pub fn page_url(&self) -> Option<String> {
        self.addresses.map(|addresses| format!("http://localhost:{}", addresses.query.port()))
    }

    fn address(&self, name: &str) -> SocketAddr {
        let service = self.services.iter().find(|service| service.name == name);
        service.expect("one of the three names").address
    }

    pub fn variable(&self, name: &str) -> &str {
        self.variables
            .iter()
            .find(|(variable, _)| *variable == name)
            .map(|(_, value)| value.as_str())
            .unwrap_or_default()
    }

    /// Returns a text with the address of every part, and with a command to log in.
    pub fn summary(&self) -> String {
        let broker = match &self.broker {
            Some((broker, _)) => format!("{}, embedded (guest, guest)", broker.address()),
            // The URL may contain a password.
            None => match amqp::connection::parse_url(self.variable("AMQP_URL")) {
                Ok(server) => format!("{server}, from AMQP_URL"),
                Err(_) => "from AMQP_URL".to_owned(),
            },
        };
        let (traces, otlp) = match (self.page_url(), self.addresses) {
            (Some(page), Some(Addresses { otlp_grpc, otlp_http, .. })) => {
                (page, format!("http://{otlp_grpc} (gRPC), http://{otlp_http} (HTTP)"))
            }
            _ => {
                let endpoint = self.variable("OTEL_EXPORTER_OTLP_ENDPOINT");
                ("sent to OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), endpoint.to_owned())
            }
        };
        format!(
            "
Ready. Log in:

  curl -i {url}/usercenter/v1/user/login \\
    -H 'content-type: application/json' -d '{{\"mobile\":\"13800138000\"}}'

  traces      {traces}
  api         http://{api} (HTTP)
  usercenter  {usercenter} (gRPC)
  mq          {mq} (gRPC health checks)
  broker      {broker}
  OTLP        {otlp}

Each trace is drawn here when it is complete. Ctrl-C stops everything.
",
            url = self.api_url(),
            api = self.address("api"),
            usercenter = self.address("usercenter"),
            mq = self.address("mq"),
        )
    }

    /// Stops or starts the part with this key, and says so. Returns whether there is such a part.
    pub async fn toggle(&mut self, key: char) -> bool {
        match key {
            'b' => self.toggle_broker().await,
            't' => {
                self.outage = None;
                self.toggle_backend().await;
            }
            _ => {
                let Some(service) = self.services.iter_mut().find(|service| service.key == key) else {
                    return false;
                };
                service.toggle(&self.variables).await;
            }
        }
        true
    }

    async fn toggle_broker(&mut self) {
        match &mut self.broker {
            None => drop(say("cargo dev can't stop the broker that AMQP_URL names")),
            Some((broker, is_up @ true)) => {
                broker.crash().await;
                *is_up = false;
                say("the broker has stopped; press b to start it");
            }
            Some((broker, is_up)) => {
                broker.restart();
                *is_up = true;
                say("the broker is ready");
            }
        }
    }

    async fn toggle_backend(&mut self) {
        match self.addresses {
            None => drop(say("cargo dev can't stop the backend that OTEL_EXPORTER_OTLP_ENDPOINT names")),
            Some(_) if self.backend.take().is_some() => {
                say("the trace backend has stopped, and its traces are gone; press t to start it");
            }
            Some(addresses) => match Backend::start_with_controls(addresses, self.routes.clone()).await {
                Ok(backend) => {
                    self.backend = Some(backend);
                    say("the trace backend is ready");
                }
                Err(error) => drop(say(&format!("the trace backend does not start: {error:#}"))),
            },
        }
    }

    /// Returns each part's key and name, and whether it runs.
    pub fn all(&self) -> Vec<(char, &'static str, bool)> {
        let services = self.services.iter();
        let services = services.map(|service| {
            (service.key, service.name, service.process.is_some() && service.stopping.is_none())
        });
        let broker = self.broker.iter().map(|(_, is_up)| ('b', "broker", *is_up));
        services.chain(broker).collect()
    }

    /// Returns whether usercenter is slow.
    pub fn is_slow(&self) -> bool {
        self.services.iter().any(|service| !service.delay.is_zero())
    }

    /// Switches the delay of usercenter's answers on or off, and restarts usercenter.
    pub async fn toggle_delay(&mut self) {
        let Some(service) = self.services.iter_mut().find(|service| service.name == "usercenter") else {
            return;
        };
        service.delay = if service.delay.is_zero() { DELAY } else { Duration::ZERO };
        match (&service.process, service.stopping) {
            (None, _) => service.toggle(&self.variables).await,
            (Some(_), None) => {
                service.toggle(&self.variables).await;
                service.restarts = true;
            }
            (Some(_), Some(_)) => service.restarts = true,
        }
    }

    /// Begins an outage of the trace backend, which [`Parts::go_on`] carries out. The backend stops after a
    /// moment, so that it can still answer the press. It starts by itself some seconds later, because its
    /// page can't start it while it is stopped.
    pub fn interrupt_backend(&mut self) {
        self.outage.get_or_insert_with(Instant::now);
    }

    /// Stops or starts the trace backend if its outage begins or ends now. Returns whether the backend has
    /// started.
    pub async fn go_on(&mut self) -> bool {
        let Some(since) = self.outage.map(|outage| outage.elapsed()) else { return false };
        if self.backend.is_some() && since > TICK * 3 && since < OUTAGE {
            self.toggle_backend().await;
        } else if since > OUTAGE {
            self.outage = None;
            if self.backend.is_none() {
                self.toggle_backend().await;
                return self.backend.is_some();
            }
        }
        false
    }

    /// Returns the log lines since the last call: all of them, or only warnings and errors.
    pub fn new_log_lines(&mut self, all: bool) -> Vec<String> {
        let mut lines = Vec::new();
        for service in &mut self.services {
            let new = service.process.as_mut().map(Process::new_lines).unwrap_or_default();
            let new = new.into_iter().filter(|line| all || is_warning(line));
            lines.extend(new.map(|line| format!("{:>10} │ {line}", service.name)));
        }
        lines
    }

    /// Returns a text about each service that has ended since the last call. With `keys`, the text names the
    /// key that starts the service. Kills services that are still running `STOP_TIMEOUT` after they were told
    /// to stop.
    pub async fn ends(&mut self, keys: bool) -> Vec<String> {
        let mut ends = Vec::new();
        for service in &mut self.services {
            if service.stopping.is_some_and(|since| since.elapsed() > STOP_TIMEOUT)
                && let Some(process) = &mut service.process
            {
                // The process may have ended in the meantime.
                let _ = process.kill().await;
            }
            let is_stopping = service.stopping.is_some();
            let Some(end) = service.end() else { continue };
            service.is_stopped = is_stopping;
            if is_stopping && service.restarts {
                service.toggle(&self.variables).await;
                continue;
            }
            let Service { key, name, .. } = service;
            ends.push(match (is_stopping, keys) {
                (true, _) => format!("{name} has stopped; press {key} to start it"),
                (false, true) => format!("{end}\nPress {key} to start {name} again"),
                (false, false) => {
                    format!("{end}\nIf `cargo dev` runs in a terminal, a key starts {name} again")
                }
            });
        }
        ends
    }

    /// Returns whether all services have ended by themselves.
    pub fn have_all_ended(&self) -> bool {
        self.services.iter().all(|service| service.process.is_none() && !service.is_stopped)
    }

    /// Stops the services, all at once. The other parts stop when they are dropped.
    pub async fn stop(&mut self) {
        let processes = self.services.iter_mut().filter_map(|service| service.process.as_mut());
        let ends = join_all(processes.map(Process::stop));
        // A service that has not ended after this time is killed when it is dropped.
        let _ = timeout(STOP_TIMEOUT, ends).await;
        self.services.clear();
    }
}

fn is_warning(line: &str) -> bool {
    [" WARN ", " ERROR ", "\"level\":\"WARN\"", "\"level\":\"ERROR\"", "panicked"]
        .iter()
        .any(|mark| line.contains(mark))
}
