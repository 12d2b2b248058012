//! A variant that is running: its services, its collector, and its queues and exchanges on the broker.

use super::{
    Variant, cpu_time,
    load::{self, Load, Report},
    sink::Sink,
};
use anyhow::{Context, Result, ensure};
use harness::{
    client::Client,
    database::Database,
    go_zero, poll,
    process::{self, Process},
    stack::{KNOWN_MOBILE, PATIENT, TestBroker},
};
use http::Method;
use lapin::options::QueueDeclareOptions;
use std::{
    net::TcpListener,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::try_join;

/// The directory and the broker that all variants use.
pub struct Place {
    /// The directory for the files of the services.
    pub directory: TempDir,
    /// The URL of the broker; `None` for the broker that `AMQP_URL` names, or RabbitMQ on localhost.
    pub amqp_url: Option<String>,
}

/// How long spans and deliveries may take to arrive after the load has ended. This is longer than the interval
/// between two exports.
const SETTLED: Duration = Duration::from_secs(10);

/// The costs of one variant in one round.
#[derive(Clone, Copy, Default)]
pub struct Costs {
    /// The CPU time per login of api, rpc and mq, measured after the warm-up. It includes the work that
    /// follows the answer to the login.
    pub cpu: [Duration; 3],
    /// The memory of api, rpc and mq at the end of the round, in megabytes.
    pub resident: [f64; 3],
    /// The time from the start of the first process to the answer to the first login. The harness checks
    /// every ten milliseconds whether the services have started.
    pub ready: Duration,
    /// How many logins were answered with 200 but are not in the history.
    pub lost_messages: u64,
    /// How many spans did not arrive.
    pub lost_spans: u64,
    /// How many log records should have been exported but did not arrive. The SDK drops log records when its
    /// queue is full.
    pub lost_records: u64,
}

impl Costs {
    /// Returns the CPU time of the three services for each login.
    pub fn cpu_per_login(&self) -> Duration {
        self.cpu.iter().sum()
    }
}

/// The services after their warm-up.
pub struct Running {
    /// api, rpc and mq, in this order.
    services: [Process; 3],
    variant: &'static Variant,
    sink: Sink,
    /// A listener that accepts connections and never answers.
    _black_hole: TcpListener,
    broker: TestBroker,
    /// The directory of the services' files.
    _data: TempDir,
    logins: u64,
    /// The number of logins up to the end of the warm-up.
    warm_up: u64,
    cpu_of_warm_up: [Duration; 3],
    ready: Duration,
}

impl Running {
    /// Starts a variant, and runs one turn of the load as its warm-up.
    ///
    /// # Errors
    /// If a process doesn't start, or if a login fails.
    pub async fn start(variant: &'static Variant, load: &Load, place: &Place) -> Result<Self> {
        let sink = Sink::start().await?;
        let mut broker = match &place.amqp_url {
            Some(url) => TestBroker::at(url.clone()).await?,
            None => TestBroker::rabbitmq().await?,
        };
        let data = TempDir::new_in(&place.directory)?;
        let data_dir = data.path().to_str().context("the name of the directory is not UTF-8")?;
        broker.database = Database::new_in(data.path())?;
        let black_hole = TcpListener::bind("127.0.0.1:0")?;
        let collector = if variant.has_collector { sink.address } else { black_hole.local_addr()? };
        let endpoint = format!("http://{collector}");
        let mut variables = vec![
            ("AMQP_URL", broker.url.as_str()),
            ("AMQP_PREFIX", &broker.prefix),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
            ("API_DATA_DIR", data_dir),
            ("MQ_DATABASE_URL", &broker.database.url),
        ];
        // A stalling disk makes a login slow, but it must not make a login fail.
        variables.extend(PATIENT);
        if !variant.has_collector {
            // By default, a stopping service would wait longer for this silent collector.
            variables.push(("SHUTDOWN_TIMEOUT", "2s"));
        }
        variables.extend(variant.variables);
        let start = async |name, variables: &[(&str, &str)]| match variant.in_go {
            true => go_zero::start(name, variables).await,
            false => Process::start(name, variables).await,
        };
        // Builds the binaries before the measured time begins.
        if variant.in_go {
            go_zero::binaries()?;
        } else {
            process::binary("rpc")?;
        }
        let started = Instant::now();
        let rpc = start("rpc", &variables).await?;
        let usercenter = format!("http://{}", rpc.address);
        let for_api = [&variables[..], &[("USERCENTER_URL", &usercenter)]].concat();
        let (api, mq) = try_join!(start("api", &for_api), start("mq", &variables))?;
        if !variant.in_go {
            try_join!(api.said("connected to the broker"), mq.said("consuming"))?;
        }
        let url = format!("http://{}/usercenter/v1/user/login", api.address);
        let headers = [("content-type", "application/json")];
        let first = Client::new().send(Method::POST, &url, &headers, load::BODY).await?;
        ensure!(first.status == 200, "the first login was answered {}:\n{}", first.status, api.output());
        let ready = started.elapsed();

        let mut running = Self {
            services: [api, rpc, mq],
            variant,
            sink,
            _black_hole: black_hole,
            broker,
            _data: data,
            logins: 1,
            warm_up: 0,
            cpu_of_warm_up: <[Duration; 3]>::default(),
            ready,
        };
        running.turn(load).await?;
        running.warm_up = running.logins;
        running.cpu_of_warm_up = running.cpu_time()?;
        Ok(running)
    }

    /// Runs one turn of the load, and waits until mq has consumed its messages, because the next turn belongs
    /// to another variant.
    ///
    /// # Errors
    /// If a login fails, or if mq doesn't keep up.
    pub async fn turn(&mut self, load: &Load) -> Result<Report> {
        let api = &self.services[0];
        let report = load.run(api.address).await?;
        ensure!(report.failed == 0, "{} logins failed:\n{}", report.failed, api.output());
        self.logins += report.logins;
        let queue = self.broker.topology.queue.as_str();
        let waiting = async || {
            let passive = QueueDeclareOptions { passive: true, durable: true, ..Default::default() };
            let declared = self.broker.channel.queue_declare(queue.into(), passive, Default::default()).await;
            declared.ok().filter(|queue| queue.message_count() == 0)
        };
        poll(Duration::from_secs(60), waiting).await.context("mq does not keep up")?;
        Ok(report)
    }

    /// Stops the services, and checks that every span arrived or was reported as dropped.
    ///
    /// # Errors
    /// If a service can't be stopped, if the number of missing spans differs from the number reported as
    /// dropped, or if metrics are missing or unexpected.
    pub async fn stop(mut self) -> Result<Costs> {
        let (cpu, logins) = (self.cpu_time()?, u32::try_from(self.logins - self.warm_up)?);
        let mut resident = [0.0; 3];
        for (resident, service) in resident.iter_mut().zip(&self.services) {
            *resident = super::resident(service.id())?;
        }
        let &Variant { spans, records, has_collector, in_go, .. } = self.variant;
        let recorded = async || Some(self.broker.database.logins(KNOWN_MOBILE).await.ok()?.0.cast_unsigned());
        let all = async || recorded().await.filter(|recorded| *recorded == self.logins);
        // mq may still be processing deliveries.
        let recorded = match poll(SETTLED, all).await {
            Some(all) => all,
            None => recorded().await.context("reading the history")?,
        };
        if in_go {
            // go-zero exports every five seconds. A process that stops may end before its last export.
            let _ =
                poll(SETTLED, async || (self.sink.received()[0] == self.logins * spans).then_some(())).await;
        }
        let mut dropped = 0;
        for service in &mut self.services {
            service.stop().await?;
            if spans > 0 && !in_go {
                dropped += dropped_spans(&service.output()).with_context(|| service.last_lines(20))?;
            }
        }
        let [received_spans, received_metrics, received_records] = self.sink.received();
        let missing = (self.logins * spans).saturating_sub(received_spans);
        // go-zero doesn't say how many spans it dropped.
        ensure!(
            in_go || missing == dropped,
            "{missing} spans did not arrive, but {dropped} were reported as dropped"
        );
        let has_metrics = records > 0 && has_collector;
        ensure!(
            has_metrics == (received_metrics > 0),
            "metrics expected: {has_metrics}, metrics received: {received_metrics}"
        );
        Ok(Costs {
            cpu: std::array::from_fn(|i| (cpu[i] - self.cpu_of_warm_up[i]) / logins),
            resident,
            ready: self.ready,
            lost_messages: self.logins.saturating_sub(recorded),
            lost_spans: missing,
            lost_records: (self.logins * records).saturating_sub(received_records),
        })
    }

    /// Returns the CPU time of api, rpc and mq so far.
    fn cpu_time(&self) -> Result<[Duration; 3]> {
        let mut times = <[Duration; 3]>::default();
        for (time, service) in times.iter_mut().zip(&self.services) {
            *time = cpu_time(service.id())?;
        }
        Ok(times)
    }
}

fn dropped_spans(output: &str) -> Option<u64> {
    let line = output.lines().rfind(|line| line.contains("exported="))?;
    line.split_once("dropped=")?.1.split(' ').next()?.parse().ok()
}
