//! `cargo dev` as its users see it: the program starts everything, draws traces, and ends cleanly.

use anyhow::{Context, Result};
use harness::{
    PATIENCE,
    client::{Answer, Client},
    poll,
    process::Process,
    stack::{KNOWN_MOBILE, PATIENT},
};
use http::Method;
use std::{
    fs,
    path::Path,
    process::{Output, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    task::JoinHandle,
    time::timeout,
};

/// A running `cargo dev`.
struct Dev {
    child: Child,
    said: Arc<Mutex<String>>,
    reader: JoinHandle<()>,
    api: String,
    page: String,
}

fn devstack(arguments: &[&str], variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_devstack"));
    for variable in ["AMQP_URL", "OTEL_EXPORTER_OTLP_ENDPOINT"] {
        command.env_remove(variable);
    }
    command.args(arguments).envs(PATIENT).envs(variables.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).kill_on_drop(true);
    command
}

impl Dev {
    async fn start(variables: &[(&str, &str)]) -> Result<Self> {
        // This builds the services first, so that the build does not count as time to wait for output.
        Process::command("api", &[])?;
        let mut child = devstack(&["--free-ports"], variables).spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
        let said = Arc::new(Mutex::new(String::new()));
        let writer = said.clone();
        let reader = tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let mut said = writer.lock().unwrap_or_else(PoisonError::into_inner);
                said.push_str(&line);
                said.push('\n');
            }
        });
        let mut dev = Self { child, said, reader, api: String::new(), page: String::new() };
        dev.says("Ctrl-C stops everything").await?;
        dev.api = dev.after("curl -i ").context("no curl")?.replace("/usercenter/v1/user/login", "");
        dev.page = dev.after("traces ").context("no page")?;
        Ok(dev)
    }

    fn said(&self) -> String {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the first word after `label`.
    fn after(&self, label: &str) -> Option<String> {
        let said = self.said();
        let (_, rest) = said.split_once(label)?;
        rest.split_whitespace().next().map(str::to_owned)
    }

    async fn says(&self, text: &str) -> Result<()> {
        let found = poll(PATIENCE, async || self.said().contains(text).then_some(())).await;
        found.with_context(|| format!("it did not say {text:?}, but:\n{}", self.said()))
    }

    async fn login(&self) -> Result<Answer> {
        let body = format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#);
        let url = format!("{}/usercenter/v1/user/login", self.api);
        Client::new().send(Method::POST, &url, &[("content-type", "application/json")], body).await
    }

    /// Returns the process id of the service whose binary is called `name`.
    fn service(&self, name: &str) -> Result<u32> {
        let pid = self.child.id().context("it has ended")?;
        let mut children = Vec::new();
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            // The thread may have ended since its directory was listed.
            let list = fs::read_to_string(task?.path().join("children")).unwrap_or_default();
            children.extend(list.split_whitespace().map(str::to_owned));
        }
        let is_it = |pid: &&String| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name)
        };
        Ok(children.iter().find(is_it).with_context(|| format!("there is no {name}"))?.parse()?)
    }

    async fn verify(&self, patience: &str) -> Result<Output> {
        let arguments = ["verify", "--api", &self.api, "--jaeger", &self.page, "--patience", patience];
        Ok(devstack(&arguments, &[]).output().await?)
    }
}

/// Even after a failed assertion, `cargo dev` ends as its user would end it, and leaves nothing behind.
impl Drop for Dev {
    fn drop(&mut self) {
        let Some(pid) = self.child.id() else { return };
        let _ = std::process::Command::new("kill").args(["-INT", &pid.to_string()]).status();
        let deadline = Instant::now() + Duration::from_secs(10);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

async fn signal(signal: &str, pid: u32) -> Result<()> {
    let kill = Command::new("kill").args([format!("-{signal}"), pid.to_string()]).status().await?;
    anyhow::ensure!(kill.success(), "kill -{signal} {pid}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_runs_everything_draws_the_trace_and_leaves_no_process() -> Result<()> {
    let mut dev = Dev::start(&[]).await?;
    let answer = dev.login().await?;
    assert_eq!(answer.status, 200);

    // The trace is drawn without colours, because the output is not a terminal.
    let url = format!("{}/trace/{}", dev.page, answer.trace_id());
    dev.says(&url).await?;
    // A trace is drawn again when late spans arrive, so its last drawing is complete.
    dev.says("mq_consumer_msg").await?;
    let said = dev.said();
    let (_, drawing) = said.rsplit_once(&url).context("the drawing")?;
    let lines = drawing.lines().skip(1).take_while(|line| line.starts_with("  "));
    // The comparison leaves out the bars' widths, which don't matter, and the durations, which vary.
    let names: Vec<String> = lines
        .map(|line| {
            let words =
                line.split_whitespace().take_while(|word| !word.starts_with(|c: char| c.is_ascii_digit()));
            words.collect::<Vec<_>>().join(" ")
        })
        .collect();
    assert_eq!(
        names,
        [
            "api POST /usercenter/v1/user/login SERVER",
            "api ├─ usercenter.v1.Usercenter/GetUserByMobile CLIENT",
            "usercenter │ └─ usercenter.v1.Usercenter/GetUserByMobile SERVER",
            "api ├─ local INTERNAL",
            "api └─ send_msg_mq PRODUCER",
            "mq └─ mq_consumer_msg CONSUMER",
        ],
        "{said}"
    );
    assert!(!said.contains('\x1b'), "{said}");

    let services = [dev.service("api")?, dev.service("rpc")?, dev.service("mq")?];
    signal("INT", dev.child.id().context("it has ended")?).await?;
    // The services have 4 s; then `cargo dev` kills those that still run.
    let exit = timeout(Duration::from_secs(20), dev.child.wait()).await??;
    assert!(exit.success(), "{exit}: {}", dev.said());
    are_gone(services).await
}

/// Waits until none of these processes exists.
async fn are_gone(pids: [u32; 3]) -> Result<()> {
    for pid in pids {
        let gone =
            poll(PATIENCE, async || (!Path::new(&format!("/proc/{pid}")).exists()).then_some(())).await;
        gone.with_context(|| format!("{pid} is left"))?;
    }
    Ok(())
}

/// Ends `cargo dev` by `end`; then its services must be gone.
async fn nothing_is_left_after(end: impl AsyncFnOnce(&mut Dev) -> Result<()>) -> Result<()> {
    let mut dev = Dev::start(&[]).await?;
    let services = [dev.service("api")?, dev.service("rpc")?, dev.service("mq")?];
    end(&mut dev).await?;
    are_gone(services).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_that_is_closed_ends_everything() -> Result<()> {
    nothing_is_left_after(async |dev| {
        signal("HUP", dev.child.id().context("it has ended")?).await?;
        assert!(timeout(PATIENCE, dev.child.wait()).await??.success());
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_it_still_leaves_no_process() -> Result<()> {
    nothing_is_left_after(async |dev| Ok(dev.child.kill().await?)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_when_nobody_reads_what_it_says() -> Result<()> {
    nothing_is_left_after(async |dev| {
        dev.reader.abort();
        // The next output is the drawing of a trace, which nobody reads.
        dev.login().await?;
        assert!(timeout(PATIENCE, dev.child.wait()).await??.success());
        Ok(())
    })
    .await
}

/// Returns the command's standard error, followed by its standard output.
fn said_by(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stderr.as_slice(), &output.stdout].concat()).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_tells_whether_a_system_keeps_the_contract() -> Result<()> {
    let dev = Dev::start(&[]).await?;
    let verified = dev.verify("60").await?;
    let said = said_by(&verified);
    assert!(verified.status.success(), "{said}");
    assert!(said.ends_with("all as it should be\n"), "{said}");

    // Without the consumer, its span is missing from the tree.
    signal("KILL", dev.service("mq")?).await?;
    dev.says("mq has ended (signal: 9 (SIGKILL)). Its last lines:\n").await?;
    dev.says("consuming").await?;
    let verified = dev.verify("12").await?;
    let said = said_by(&verified);
    assert_eq!(verified.status.code(), Some(1), "{said}");
    assert!(said.contains("\n-     mq mq_consumer_msg CONSUMER\n"), "{said}");
    assert!(said.ends_with("1 failed\n"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_says_what_does_not_answer() -> Result<()> {
    let arguments = ["verify", "--api", "http://127.0.0.1:1", "--patience", "1"];
    let output = devstack(&arguments, &[]).stderr(Stdio::piped()).output().await?;
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.starts_with("error: ") && said.contains("127.0.0.1:1"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_named_with_the_remedy() -> Result<()> {
    // If another process has this port already, the test works as well.
    let _taken = std::net::TcpListener::bind("127.0.0.1:8888");
    let output = devstack(&[], &[]).stderr(Stdio::piped()).output().await?;
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("port 8888 (api) is in use") && said.contains("--free-ports"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_and_a_collector_elsewhere_are_used_and_their_secrets_not_shown() -> Result<()> {
    let broker = broker::Broker::start().await?;
    let receiver = harness::receiver::Receiver::start().await?;
    let amqp_url = broker.url();
    let endpoint = format!("http://{}", receiver.grpc);
    let variables = [("AMQP_URL", amqp_url.as_str()), ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)];
    let dev = Dev::start(&variables).await?;
    let answer = dev.login().await?;
    receiver.expect_tree(&answer.trace_id(), harness::stack::LOGIN_TREE).await;
    let said = dev.said();
    assert!(said.contains(&format!("{}, by AMQP_URL", broker.address())), "{said}");
    assert!(!said.contains("guest"), "{said}");
    Ok(())
}
