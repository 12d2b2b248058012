//! A rolling update: under load, one instance after another is stopped and started again, and no login fails.

use anyhow::{Context, Result, ensure};
use harness::{
    PATIENCE,
    balancer::{Balancer, Check},
    client::Client,
    poll,
    process::Process,
    receiver::Receiver,
    stack::{KNOWN_MOBILE, LOGIN_TREE, PATIENT, Stack, TestBroker},
    trace::{dedent, tree},
};
use http::Method;
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep},
};

const RESTARTS: usize = 12;

/// The delay is longer than the balancer needs to notice that an instance is not ready. The balancer checks
/// each instance twenty times per second, and waits at most one second for an answer.
const SHUTDOWN_DELAY: (&str, &str) = ("SHUTDOWN_DELAY", "2s");

/// The number of callers.
const CALLERS: usize = 8;
/// The interval between two logins of one caller.
const BEAT: Duration = Duration::from_millis(100);

/// An instance of a service, which can be restarted at the same address.
struct Instance {
    process: Process,
    variables: BTreeMap<&'static str, String>,
}

impl Instance {
    async fn start(name: &'static str, variables: &BTreeMap<&'static str, String>) -> Result<Self> {
        let mut variables = variables.clone();
        // mq needs no delay, because it is not behind a balancer.
        if name != "mq" {
            variables.insert(SHUTDOWN_DELAY.0, SHUTDOWN_DELAY.1.to_owned());
        }
        let mut instance = Self { process: launch(name, &variables).await?, variables };
        let listen = match name {
            "api" => "API_LISTEN",
            "rpc" => "USERCENTER_LISTEN",
            _ => "MQ_LISTEN",
        };
        instance.variables.insert(listen, instance.address().to_string());
        Ok(instance)
    }

    fn address(&self) -> SocketAddr {
        self.process.address
    }

    /// Stops the instance, which must exit successfully, and starts it again.
    async fn restart(&mut self) -> Result<()> {
        let name = self.process.name;
        let exit = self.process.stop().await?;
        let said = self.process.output();
        ensure!(
            exit.success() && !said.contains("cut off") && !said.contains("lost"),
            "{name}: {exit}\n{said}"
        );
        self.process = launch(name, &self.variables).await?;
        Ok(())
    }
}

async fn launch(name: &'static str, variables: &BTreeMap<&'static str, String>) -> Result<Process> {
    let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Process::start(name, &variables).await
}

/// Callers that log in at a steady rate until told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    callers: JoinSet<(Vec<String>, Vec<String>)>,
}

impl Load {
    fn start(address: SocketAddr) -> Self {
        let url = format!("http://{address}/usercenter/v1/user/login");
        let stop = Arc::new(AtomicBool::new(false));
        let mut callers = JoinSet::new();
        for _ in 0..CALLERS {
            let (stop, url, client) = (stop.clone(), url.clone(), Client::new());
            callers.spawn(async move {
                let (mut answered, mut failed) = (Vec::new(), Vec::new());
                let mut beat = interval(BEAT);
                beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
                while !stop.load(Relaxed) {
                    beat.tick().await;
                    let json = [("content-type", "application/json")];
                    let body = format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#);
                    match client.send(Method::POST, &url, &json, body).await {
                        Ok(answer) if answer.status == 200 => answered.push(answer.trace_id()),
                        Ok(answer) => failed.push(format!("{} {:?}", answer.status, answer.body)),
                        Err(error) => failed.push(format!("{error:#}")),
                    }
                }
                (answered, failed)
            });
        }
        Self { stop, callers }
    }

    /// Returns the trace ids of the logins that were answered with 200, and the outcomes of all other logins.
    async fn finish(self) -> (Vec<String>, Vec<String>) {
        self.stop.store(true, Relaxed);
        let (answered, failed): (Vec<_>, Vec<_>) = self.callers.join_all().await.into_iter().unzip();
        (answered.concat(), failed.concat())
    }
}

async fn all_ready(balancer: &Balancer) -> Result<()> {
    let ready = poll(PATIENCE, async || balancer.ready().iter().all(|ready| *ready).then_some(()));
    ready.await.with_context(|| format!("not ready: {:?}", balancer.ready()))
}

#[tokio::test(flavor = "multi_thread")]
async fn rolling_restarts_under_load_fail_no_request_and_lose_no_event_and_no_span() -> Result<()> {
    let receiver = Receiver::start().await?;
    let broker = TestBroker::connect().await?;
    let mut variables = BTreeMap::from([
        ("AMQP_URL", broker.url.clone()),
        ("AMQP_PREFIX", broker.prefix.clone()),
        ("MQ_DATABASE_URL", broker.database.url.clone()),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{}", receiver.grpc)),
        ("OTEL_BSP_SCHEDULE_DELAY", "20".to_owned()),
        ("SHUTDOWN_TIMEOUT", "50s".to_owned()),
        ("RUST_LOG", "info,api::login=warn,mq::processing=warn".to_owned()),
    ]);
    variables.extend(PATIENT.map(|(name, value)| (name, value.to_owned())));
    let mut instances = Vec::new();
    for name in ["rpc", "rpc", "mq", "mq"] {
        instances.push(Instance::start(name, &variables).await?);
    }
    let usercenter = Balancer::start(Check::Grpc, &[instances[0].address(), instances[1].address()])?;
    all_ready(&usercenter).await?;
    variables.insert("USERCENTER_URL", format!("http://{}", usercenter.address));
    for _ in 0..2 {
        instances.push(Instance::start("api", &variables).await?);
    }
    let api = Balancer::start(Check::Http, &[instances[4].address(), instances[5].address()])?;
    all_ready(&api).await?;
    for mq in &instances[2..4] {
        mq.process.said("consuming").await?;
    }

    let load = Load::start(api.address);
    // First one instance of each service is restarted, then the other instance of each service.
    let turns = [0, 4, 2, 1, 5, 3];
    for turn in turns.iter().cycle().take(RESTARTS) {
        let instance = &mut instances[*turn];
        instance.restart().await?;
        // Like a deployment, the test continues only when the new instance is ready.
        if instance.process.name == "mq" {
            instance.process.said("consuming").await?;
        } else {
            all_ready(&usercenter).await?;
            all_ready(&api).await?;
        }
    }
    let (answered, failed) = load.finish().await;
    let said =
        instances.iter().map(|instance| instance.process.last_lines(20)).collect::<Vec<_>>().join("\n");
    let all = failed.len() + answered.len();
    assert!(failed.is_empty(), "{} of {all} failed: {failed:#?}\n{said}", failed.len());
    assert!(answered.len() > RESTARTS * 10, "{} logins", answered.len());
    assert!(api.connections().iter().chain(&usercenter.connections()).all(|given| *given > 1));

    for trace in &answered {
        receiver.expect_tree(trace, LOGIN_TREE).await;
    }
    // The services stop in the order in which a request passes through them. After that, all spans have been
    // sent, so a message that was processed twice would have one more span in its tree.
    for index in [4, 5, 0, 1, 2, 3] {
        let exit = instances[index].process.stop().await?;
        assert!(exit.success(), "{exit}");
    }
    for trace in &answered {
        assert_eq!(tree(&receiver.trace(trace), ""), dedent(LOGIN_TREE));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_has_reached_its_age_costs_no_login() -> Result<()> {
    let variables = [("rpc", "USERCENTER_MAX_CONNECTION_AGE", "200ms"), ("api", "USERCENTER_ATTEMPTS", "5")];
    let stack = Stack::start(&variables).await?;
    let load = Load::start(stack.api.address);
    // With this maximum age, five connections are opened and closed every second.
    sleep(Duration::from_secs(15)).await;
    let (answered, failed) = load.finish().await;
    assert!(failed.is_empty(), "{} of {}: {failed:#?}", failed.len(), failed.len() + answered.len());
    assert!(!answered.is_empty());
    Ok(())
}
