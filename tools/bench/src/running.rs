//! One variant while it runs: its services, its collector, and its names on the broker.

use super::{
    Variant, cpu_time,
    load::{Load, Report},
    resident,
    sink::Sink,
};
use anyhow::{Context, Result, ensure};
use harness::{
    poll,
    process::Process,
    stack::{PATIENT, TestBroker},
};
use lapin::options::QueueDeclareOptions;
use std::{net::TcpListener, time::Duration};
use tempfile::TempDir;
use tokio::try_join;

/// The directory and the broker that all variants use.
pub struct Place {
    /// The directory for the files of the services.
    pub directory: TempDir,
    /// The URL of the broker; `None` for the broker that `AMQP_URL` names, or the RabbitMQ of this machine.
    pub amqp_url: Option<String>,
}

/// The costs of one variant in one round.
#[derive(Clone, Copy, Default)]
pub struct Costs {
    /// The CPU time of the three services for each login after the warm-up, including the work after the login
    /// is answered.
    pub cpu_per_login: Duration,
    /// The memory of the largest service at the end of the round, in megabytes.
    pub resident: f64,
    /// How many spans the services dropped.
    pub dropped: u64,
    /// How many log records should have been exported but did not arrive. The SDK drops log records when its
    /// queue is full.
    pub lost_records: u64,
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
    /// The logins of the warm-up.
    warm_up: u64,
    cpu_of_warm_up: Duration,
}

impl Running {
    /// Starts a variant, and runs one turn of the load as its warm-up.
    ///
    /// # Errors
    /// If a process doesn't start, or if a login fails.
    pub async fn start(variant: &'static Variant, load: &Load, place: &Place) -> Result<Self> {
        let sink = Sink::start().await?;
        let broker = match &place.amqp_url {
            Some(url) => TestBroker::at(url.clone()).await?,
            None => TestBroker::rabbitmq().await?,
        };
        let data = TempDir::new_in(&place.directory)?;
        let data_dir = data.path().to_str().context("the name of the directory")?;
        let database = format!("sqlite://{data_dir}/mq.db");
        let black_hole = TcpListener::bind("127.0.0.1:0")?;
        let collector = if variant.has_collector { sink.address } else { black_hole.local_addr()? };
        let endpoint = format!("http://{collector}");
        let mut variables = vec![
            ("AMQP_URL", broker.url.as_str()),
            ("AMQP_PREFIX", &broker.prefix),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
            ("API_DATA_DIR", data_dir),
            ("MQ_DATABASE_URL", &database),
        ];
        // A stalling disk makes a login slow, but it must not make a login fail.
        variables.extend(PATIENT);
        if !variant.has_collector {
            // By default, a service that stops would wait longer for this silent collector.
            variables.push(("SHUTDOWN_TIMEOUT", "2s"));
        }
        variables.extend(variant.variables);
        let rpc = Process::start("rpc", &variables).await?;
        let usercenter = format!("http://{}", rpc.address);
        let for_api = [&variables[..], &[("USERCENTER_URL", &usercenter)]].concat();
        let (api, mq) = try_join!(Process::start("api", &for_api), Process::start("mq", &variables))?;
        try_join!(api.said("connected to the broker"), mq.said("consuming"))?;

        let mut running = Self {
            services: [api, rpc, mq],
            variant,
            sink,
            _black_hole: black_hole,
            broker,
            _data: data,
            logins: 0,
            warm_up: 0,
            cpu_of_warm_up: Duration::ZERO,
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
    /// If a service doesn't stop cleanly, if the number of missing spans differs from the number reported as
    /// dropped, or if metrics are missing or unexpected.
    pub async fn stop(mut self) -> Result<Costs> {
        let cpu = self.cpu_time()? - self.cpu_of_warm_up;
        let resident =
            self.services.iter().map(|service| resident(service.id())).collect::<Result<Vec<_>>>()?;
        let &Variant { spans, records, has_collector, .. } = self.variant;
        let mut dropped = 0;
        for service in &mut self.services {
            service.stop().await?;
            if spans > 0 {
                dropped += dropped_spans(&service.output()).with_context(|| service.last_lines(20))?;
            }
        }
        let [received_spans, received_metrics, received_records] = self.sink.received();
        let missing = (self.logins * spans).saturating_sub(received_spans);
        ensure!(missing == dropped, "{missing} spans did not arrive, but {dropped} were reported as dropped");
        let has_metrics = records > 0 && has_collector;
        ensure!(has_metrics == (received_metrics > 0), "{received_metrics} metrics arrived");
        Ok(Costs {
            cpu_per_login: cpu / u32::try_from(self.logins - self.warm_up)?,
            resident: resident.into_iter().fold(0.0, f64::max),
            dropped,
            lost_records: (self.logins * records).saturating_sub(received_records),
        })
    }

    fn cpu_time(&self) -> Result<Duration> {
        cpu_time(self.services.iter().map(Process::id))
    }
}

fn dropped_spans(output: &str) -> Option<u64> {
    let line = output.lines().rfind(|line| line.contains("exported="))?;
    line.split_once("dropped=")?.1.split(' ').next()?.parse().ok()
}
