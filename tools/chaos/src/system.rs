//! The system under test: three services, a broker, a collector, and a proxy on each link between them. A
//! service can be killed, and started again with its data.

use super::{
    broker::{Broker, Kind},
    spans::Collector,
};
use amqp::{QueueType, Topology};
use anyhow::{Context, Result, ensure};
use harness::{process::Process, proxy::Proxy, rabbitmq::Node};
use proto::topology::{EXCHANGE, QUEUE, ROUTING_KEY};
use std::{
    fs::{self, File},
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};
use tempfile::TempDir;
use tokio::{sync::watch, time::sleep};

/// How long a message waits in the last retry queue, before its last attempt.
pub const LAST_RETRY_DELAY: Duration = Duration::from_secs(1);

/// A service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// The HTTP service.
    Api,
    /// The gRPC service.
    Usercenter,
    /// The consumer.
    Mq,
}

/// The running system.
pub struct System {
    /// The broker.
    pub broker: Broker,
    /// The names of the exchange and the queues.
    pub topology: Topology,
    /// The proxy from api to the broker.
    pub api_broker: Proxy,
    /// The proxy from mq to the broker.
    pub mq_broker: Proxy,
    /// The proxy from api to usercenter.
    pub api_usercenter: Proxy,
    /// The proxy from all services to the collector.
    pub collector_link: Proxy,
    /// The collector.
    pub collector: Collector,
    /// api's current address.
    pub api_address: watch::Sender<SocketAddr>,
    services: [Option<Process>; 3],
    /// The number of the current api instance. An instance that replaces another has a new number and its own
    /// spool.
    api: usize,
    directory: TempDir,
    /// Whether the control replaces api and mq.
    pub is_control: bool,
}

impl Service {
    /// All services, in the order in which they start.
    pub const ALL: [Self; 3] = [Self::Usercenter, Self::Mq, Self::Api];

    /// Returns the name of the service's binary.
    pub fn name(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Usercenter => "rpc",
            Self::Mq => "mq",
        }
    }
}

impl System {
    /// Starts all parts, and waits until a login would succeed.
    ///
    /// # Errors
    /// If a part doesn't start.
    pub async fn start(kind: Kind, is_control: bool) -> Result<Self> {
        let directory = TempDir::new()?;
        for folder in ["logs", "mq"] {
            fs::create_dir(directory.path().join(folder))?;
        }
        let broker = Broker::start(kind).await?;
        let collector = Collector::start()?;
        // Until a service runs, this address takes the place of the service's address.
        let nowhere = collector.address;
        let mut system = Self {
            api_broker: Proxy::start_amqp(broker.address())?,
            mq_broker: Proxy::start_amqp(broker.address())?,
            api_usercenter: Proxy::start(nowhere)?,
            collector_link: Proxy::start(collector.address)?,
            topology: Topology::new("", EXCHANGE, ROUTING_KEY, QUEUE, QueueType::Quorum),
            broker,
            collector,
            api_address: watch::Sender::new(nowhere),
            services: [None, None, None],
            api: 0,
            directory,
            is_control,
        };
        for service in Service::ALL {
            system.start_service(service, None).await?;
        }
        system.said(Service::Mq, "consuming").await?;
        if !is_control {
            system.said(Service::Mq, "the database is available").await?;
        }
        system.said(Service::Api, "connected to the broker").await?;
        Ok(system)
    }

    /// Starts a service. `limit` is the largest size of each file that the service writes, in kilobytes.
    ///
    /// # Errors
    /// If the service doesn't start.
    pub async fn start_service(&mut self, service: Service, limit: Option<u64>) -> Result<()> {
        let amqp_url = |link: &Proxy| {
            // A frozen link is detected within two heartbeats, so within 4 seconds. With this `frame_max`,
            // frames are too short for the largest context.
            format!("amqp://guest:guest@{}/%2f?heartbeat=2&frame_max=8192", link.address)
        };
        let link = if service == Service::Api { &self.api_broker } else { &self.mq_broker };
        let variables = [
            ("AMQP_URL", amqp_url(link)),
            ("USERCENTER_URL", format!("http://{}", self.api_usercenter.address)),
            ("API_DATA_DIR", self.spool().display().to_string()),
            ("MQ_DATABASE_URL", format!("sqlite://{}", self.database().display())),
            // Publishing may take 2.5 times this long, so that a login without a confirm can still go to the
            // disk. With the default of 1 s, api would refuse logins if the disk stalled while the broker is
            // away.
            ("PUBLISH_TIMEOUT", "2s".to_owned()),
            ("API_DEADLINE", "9s".to_owned()),
            // A message that always fails must soon become a dead letter.
            ("MQ_RETRY_DELAYS", format!("200ms,{}s", LAST_RETRY_DELAY.as_secs())),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{}", self.collector_link.address)),
            // A killed process loses the spans that it has not sent yet. With this delay, they are few.
            ("OTEL_BSP_SCHEDULE_DELAY", "100".to_owned()),
            // A log line for each login would be of no use.
            ("RUST_LOG", "info,api::login=warn,mq::processing=warn".to_owned()),
            ("API_LISTEN", "127.0.0.1:0".to_owned()),
            ("USERCENTER_LISTEN", "127.0.0.1:0".to_owned()),
            ("MQ_LISTEN", "127.0.0.1:0".to_owned()),
        ];
        let variables: Vec<(&str, &str)> =
            variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let name = service.name();
        let binary = if self.is_control && service != Service::Usercenter { "devstack" } else { name };
        let mut command = match limit {
            // `ulimit -f` counts blocks of 512 bytes. Without the trap, SIGXFSZ would end the service.
            Some(limit) => {
                let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", limit * 2);
                Process::by_shell(&script, binary, &variables)?
            }
            None => Process::command(binary, &variables)?,
        };
        if binary != name {
            command.arg("control").arg(name);
        }
        let process = Process::start_command(name, command).await?;
        match service {
            Service::Api => drop(self.api_address.send_replace(process.address)),
            Service::Usercenter => self.api_usercenter.lead_to(process.address),
            Service::Mq => {}
        }
        self.services[service as usize] = Some(process);
        Ok(())
    }

    /// Kills a service with SIGKILL, if it still runs.
    ///
    /// # Errors
    /// If the service's log can't be kept.
    pub async fn kill(&mut self, service: Service) -> Result<()> {
        if let Some(mut process) = self.services[service as usize].take() {
            // The service may have ended by itself. Only `revive` checks for that.
            let _ = process.kill().await;
            let _ = process.exit().await;
            self.keep_log(&process, "killed")?;
        }
        Ok(())
    }

    /// Starts a second instance of a service, lets both instances run for `hold`, and kills the first. If the
    /// service is api, neither instance can reach the broker until the first is killed. Afterwards, the
    /// logins in the first instance's spool are published.
    ///
    /// # Errors
    /// If the second instance does not start, or the spool can't be drained.
    pub async fn replace(&mut self, service: Service, hold: Duration) -> Result<()> {
        let (first, spool) = (self.services[service as usize].take(), self.spool());
        if service == Service::Api {
            self.api += 1;
            self.api_broker.refuse();
            sleep(hold).await;
        }
        self.start_service(service, None).await?;
        sleep(hold).await;
        if let Some(mut first) = first {
            let _ = first.kill().await;
            let _ = first.exit().await;
            self.keep_log(&first, "killed")?;
        }
        self.api_broker.restore();
        if service == Service::Api && !self.is_control {
            let url = format!("amqp://guest:guest@{}/%2f", self.broker.address());
            let spool = spool.display().to_string();
            let variables = [("AMQP_URL", &*url), ("API_DATA_DIR", &spool), ("OTEL_TRACES_EXPORTER", "none")];
            let drained = Process::command("api", &variables)?.args(["spool", "drain"]).output().await?;
            ensure!(drained.status.success(), "draining: {}", String::from_utf8_lossy(&drained.stderr));
        }
        Ok(())
    }

    /// Connects the services to the next node of a cluster, and returns the previous node.
    ///
    /// # Errors
    /// If the broker is embedded.
    pub fn next_node(&mut self) -> Result<&mut Node> {
        let (address, before) = self.broker.move_on()?;
        for link in [&self.api_broker, &self.mq_broker] {
            link.lead_to(address);
            link.cut();
        }
        Ok(before)
    }

    /// Waits until a line of a service's output contains `text`.
    ///
    /// # Errors
    /// If no such line comes in time.
    pub async fn said(&self, service: Service, text: &str) -> Result<()> {
        let process = self.services[service as usize].as_ref();
        process.with_context(|| format!("{} does not run", service.name()))?.said(text).await?;
        Ok(())
    }

    /// Restarts the services that ended without being killed; returns which services ended, and how.
    ///
    /// # Errors
    /// If a service can't be started again.
    pub async fn revive(&mut self) -> Result<Vec<String>> {
        let mut ended = Vec::new();
        for service in Service::ALL {
            let exit = self.services[service as usize].as_mut().and_then(Process::exited);
            if let Some(exit) = exit {
                ended.push(format!("{} ended by itself ({exit})", service.name()));
                self.kill(service).await?;
                self.start_service(service, None).await?;
            }
        }
        Ok(ended)
    }

    /// Stops all services with SIGTERM. Returns a message about each service that did not end successfully.
    ///
    /// # Errors
    /// If a log can't be kept.
    pub async fn stop(&mut self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        if self.is_control {
            // The control doesn't handle SIGTERM.
            for service in Service::ALL {
                self.kill(service).await?;
            }
        }
        for service in [Service::Api, Service::Usercenter, Service::Mq] {
            let Some(mut process) = self.services[service as usize].take() else { continue };
            match process.stop().await {
                Ok(exit) if exit.success() => {}
                Ok(exit) => wrong.push(format!("{} ended with {exit}", service.name())),
                Err(error) => wrong.push(format!("{} can't be stopped: {error:#}", service.name())),
            }
            self.keep_log(&process, "stopped")?;
        }
        Ok(wrong)
    }

    /// Returns the resident memory of a service, in KiB.
    ///
    /// # Errors
    /// If the service does not run.
    pub fn memory(&self, service: Service) -> Result<usize> {
        let process = self.services[service as usize].as_ref().context("the service does not run")?;
        let status = fs::read_to_string(format!("/proc/{}/status", process.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    /// Returns the path of mq's database.
    pub fn database(&self) -> PathBuf {
        self.directory.path().join("mq/mq.db")
    }

    /// Returns the directory of api's spool.
    fn spool(&self) -> PathBuf {
        self.directory.path().join(format!("api{}", self.api))
    }

    /// Returns the size of api's largest file, in kilobytes.
    pub fn spool_size(&self) -> u64 {
        let files = fs::read_dir(self.spool()).into_iter().flatten().flatten();
        files.filter_map(|file| Some(file.metadata().ok()?.len() / 1024)).max().unwrap_or_default()
    }

    /// Keeps the directory of logs and data; returns its path.
    pub fn keep(self) -> PathBuf {
        self.directory.keep()
    }

    fn keep_log(&self, process: &Process, how: &str) -> Result<()> {
        let file = self.directory.path().join("logs").join(format!("{}.log", process.name));
        let mut file = append(&file)?;
        writeln!(file, "{}\n-- {how}", process.output())?;
        Ok(())
    }
}

fn append(file: &Path) -> Result<File> {
    File::options()
        .create(true)
        .append(true)
        .open(file)
        .with_context(|| format!("writing {}", file.display()))
}
