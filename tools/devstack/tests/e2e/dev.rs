//! `cargo dev` as its users see it: the program starts everything, draws traces, and ends cleanly.

use anyhow::{Context, Result};
use harness::{
    PATIENCE,
    client::{Answer, Client, raw},
    poll,
    process::Process,
    stack::{KNOWN_MOBILE, PATIENT},
};
use http::Method;
use rustix::{
    fs::{Mode, OFlags, open},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize},
};
use serde_json::Value;
use std::{
    env,
    fs::{self, File},
    io::Write,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Output, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::{Child, Command},
    task::JoinHandle,
    time::timeout,
};

/// Each test that uses the usual ports holds this lock.
static USUAL_PORTS: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A running `cargo dev`.
struct Dev {
    child: Child,
    said: Arc<Mutex<String>>,
    reader: JoinHandle<()>,
    /// The other end of `cargo dev`'s terminal, if `cargo dev` runs in a terminal.
    terminal: Option<File>,
    /// An environment variable with a unique value, which all processes of this `cargo dev` inherit.
    mark: String,
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
        // This builds the services first, so that the time limit for the output does not include the build.
        Process::command("api", &[])?;
        let mut dev = Self::spawn(devstack(&["--free-ports"], variables))?;
        dev.get_ready().await?;
        Ok(dev)
    }

    /// Starts `cargo dev` in a terminal of this width.
    async fn start_in_terminal(width: u16) -> Result<Self> {
        Process::command("api", &[])?;
        let terminal = File::from(openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?);
        grantpt(&terminal)?;
        unlockpt(&terminal)?;
        let size = Winsize { ws_row: 50, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&terminal, size)?;
        let name = ptsname(&terminal, Vec::new())?;
        let other_end = File::from(open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty())?);

        let mut command = Command::new("setsid");
        command.args(["--ctty", env!("CARGO_BIN_EXE_devstack"), "--free-ports"]).env("NO_COLOR", "1");
        command.env_remove("AMQP_URL").env_remove("OTEL_EXPORTER_OTLP_ENDPOINT").envs(PATIENT);
        command.stdin(other_end.try_clone()?).stdout(other_end).stderr(Stdio::inherit()).kill_on_drop(true);
        let reader = tokio::fs::File::from_std(terminal.try_clone()?);
        let mut dev = Self::spawn_with(command, Some(Box::new(reader)))?;
        dev.terminal = Some(terminal);
        dev.get_ready().await?;
        Ok(dev)
    }

    fn spawn(command: Command) -> Result<Self> {
        Self::spawn_with(command, None)
    }

    /// Starts the command, and reads what it prints from `output`. If `output` is `None`, reads from the
    /// command's standard output.
    fn spawn_with(mut command: Command, output: Option<Box<dyn AsyncRead + Send + Unpin>>) -> Result<Self> {
        let mark = format!("DEV_TEST_MARK={}", uuid::Uuid::new_v4());
        let (variable, value) = mark.split_once('=').context("a variable")?;
        let mut child = command.env(variable, value).spawn()?;
        let output = match output {
            Some(output) => output,
            None => Box::new(child.stdout.take().context("stdout")?),
        };
        let mut lines = BufReader::new(output).lines();
        let said = Arc::new(Mutex::new(String::new()));
        let writer = said.clone();
        let reader = tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let mut said = writer.lock().unwrap_or_else(PoisonError::into_inner);
                said.push_str(&line);
                said.push('\n');
            }
        });
        Ok(Self { child, said, reader, terminal: None, mark, api: String::new(), page: String::new() })
    }

    async fn get_ready(&mut self) -> Result<()> {
        self.says("Ctrl-C stops everything").await?;
        self.api = self.after("curl -i ").context("no curl")?.replace("/usercenter/v1/user/login", "");
        self.page = self.after("traces ").context("no page")?;
        Ok(())
    }

    fn press(&mut self, key: &str) -> Result<()> {
        Ok(self.terminal.as_mut().context("a terminal")?.write_all(key.as_bytes())?)
    }

    /// Waits until `cargo dev` has printed `text` at least `times` times.
    async fn says_times(&self, text: &str, times: usize) -> Result<()> {
        let found = poll(PATIENCE, async || (self.said().matches(text).count() >= times).then_some(())).await;
        found.with_context(|| format!("{text:?} is not in the output {times} times:\n{}", self.said()))
    }

    /// Waits until `cargo dev` has ended and none of its processes is left. Checks the exit code.
    async fn ends(&mut self, code: Option<i32>) -> Result<()> {
        let exit = timeout(PATIENCE, self.child.wait()).await.with_context(|| self.said())??;
        assert_eq!(exit.code(), code, "{}", self.said());
        let mark = self.mark.clone();
        let gone = poll(PATIENCE, async || processes_with(&mark).ok()?.is_empty().then_some(())).await;
        gone.with_context(|| format!("left: {:?}", processes_with(&mark)))
    }

    fn said(&self) -> String {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the first word after `label` in the output.
    fn after(&self, label: &str) -> Option<String> {
        let said = self.said();
        let (_, rest) = said.split_once(label)?;
        rest.split_whitespace().next().map(str::to_owned)
    }

    async fn says(&self, text: &str) -> Result<()> {
        let found = poll(PATIENCE, async || self.said().contains(text).then_some(())).await;
        found.with_context(|| format!("{text:?} is not in the output:\n{}", self.said()))
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
        Ok(children
            .iter()
            .find(is_it)
            .with_context(|| format!("`cargo dev` has no child process {name}"))?
            .parse()?)
    }

    async fn verify(&self, patience: &str) -> Result<Output> {
        let arguments = ["verify", "--api", &self.api, "--jaeger", &self.page, "--patience", patience];
        Ok(devstack(&arguments, &[]).output().await?)
    }
}

/// Ends `cargo dev` as its user would, even after a failed assertion, so that no process is left.
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

/// Returns the command lines of all processes that have the environment variable `mark`.
fn processes_with(mark: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let process = entry?.path();
        // A process may belong to another user, or end in the meantime. An ended process has no variables.
        let variables = fs::read(process.join("environ")).unwrap_or_default();
        if variables.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes()) {
            found.push(fs::read_to_string(process.join("cmdline")).unwrap_or_default());
        }
    }
    Ok(found)
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
    dev.says("mq_consumer_msg").await?;
    let said = dev.said();
    let (_, drawings) = said.split_once(&url).context("the drawing")?;
    // The lines of late spans begin with a plus. The comparison leaves out this plus, the widths of the bars,
    // and the durations, because they vary.
    let lines = drawings.lines().skip(1).filter(|line| line.contains(['█', '▏']));
    let name = |line: &str| {
        let words = line.split_whitespace().filter(|word| *word != "+");
        let words = words.take_while(|word| !word.starts_with(|c: char| c.is_ascii_digit()));
        words.collect::<Vec<_>>().join(" ")
    };
    let mut names: Vec<String> = lines.map(name).collect();
    names.sort();
    names.dedup();
    assert_eq!(
        names,
        [
            "api POST /usercenter/v1/user/login SERVER",
            "api └─ send_msg_mq PRODUCER",
            "api ├─ local INTERNAL",
            "api ├─ usercenter.v1.Usercenter/GetUserByMobile CLIENT OK",
            "mq └─ mq_consumer_msg CONSUMER",
            "usercenter │ └─ usercenter.v1.Usercenter/GetUserByMobile SERVER OK",
        ],
        "{said}"
    );
    assert!(!said.contains('\x1b'), "{said}");

    signal("INT", dev.child.id().context("it has ended")?).await?;
    // The services have 4 s to end. Then `cargo dev` kills the services that are still running.
    dev.ends(Some(0)).await?;
    let address = dev.api.replace("http://localhost", "127.0.0.1");
    assert!(std::net::TcpListener::bind(&address).is_ok(), "{address} is in use");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_stop_and_start_the_parts_and_log_in() -> Result<()> {
    let mut dev = Dev::start_in_terminal(80).await?;
    dev.says("Keys: ").await?;
    dev.press("m")?;
    dev.says("mq has stopped; press m to start it").await?;
    dev.press("l")?;
    dev.says("login: 200 OK").await?;
    dev.says(", 5 spans").await?;
    dev.press("m")?;
    dev.says_times("mq is ready, after ", 2).await?;
    dev.says(", 6 spans (1 new)").await?;
    let late = dev.said();
    let (_, late) = late.split_once("(1 new)").context("the late span")?;
    assert_eq!(late.matches("\n+ ").count(), 1, "{late}");
    assert!(!late.contains(" local "), "`local` is drawn again, but no late span is below it: {late}");

    dev.press("u")?;
    dev.says("usercenter has stopped; press u to start it").await?;
    dev.press("l")?;
    dev.says("login: 503 Service Unavailable").await?;
    dev.says("UNAVAILABLE").await?;
    dev.press("u")?;
    dev.says_times("usercenter is ready, after ", 2).await?;

    for (key, part, stopped) in [
        ("b", "the broker", "the broker has stopped; press b to start it"),
        (
            "t",
            "the trace backend",
            "the trace backend has stopped, and its traces are gone; press t to start it",
        ),
    ] {
        dev.press(key)?;
        dev.says(stopped).await?;
        dev.press(key)?;
        dev.says_times(&format!("{part} is ready"), 2).await?;
    }

    signal("KILL", dev.service("api")?).await?;
    dev.says("api has ended by itself (signal: 9 (SIGKILL)). Its last lines:\n").await?;
    dev.says("\nPress a to start api again\n").await?;
    dev.press("l")?;
    dev.says("Connection refused (os error 111); if api is stopped, press a to start it").await?;
    dev.press("a")?;
    dev.says_times("api is ready, after ", 2).await?;

    dev.press("0")?;
    dev.says("load on").await?;
    let drawn = dev.said().matches(" spans  http").count();
    dev.says_times(" spans  http", drawn + 2).await?;
    dev.press("0")?;
    dev.says("load off; the answers: ").await?;
    assert!(dev.said().contains(" × 200 OK"), "{}", dev.said());

    let said = dev.said();
    for line in said.lines().filter(|line| line.contains(['█', '▏'])) {
        assert!(line.chars().count() <= 80, "{line}");
    }
    dev.press("q")?;
    dev.ends(Some(0)).await?;
    let modes = tcgetattr(dev.terminal.as_ref().context("a terminal")?)?.local_modes;
    assert!(modes.contains(LocalModes::ICANON | LocalModes::ECHO), "{modes:?}");
    Ok(())
}

/// Presses a button of the page. The request has the same `Host` and `Origin` as a request from the page.
async fn press(dev: &Dev, button: &str) -> Result<Value> {
    let client = Client::new();
    let url = format!("{}/controls/{button}", dev.page);
    let answer = client.send(Method::POST, &url, &[("origin", &dev.page)], "").await?;
    anyhow::ensure!(answer.status == 200, "{button}: {answer:?}");
    Ok(answer.json())
}

/// Returns the labels of the page's buttons.
async fn labels(dev: &Dev) -> Result<Vec<String>> {
    let answer = Client::new().get(&format!("{}/controls", dev.page)).await?.json();
    let buttons = answer["buttons"].as_array().context("no buttons")?.iter();
    Ok(buttons.map(|button| button["label"].as_str().unwrap_or_default().to_owned()).collect())
}

/// Waits until the page shows the trace that `press` names, and `is_it` holds for this trace. Returns the
/// trace. `press` is the answer to the press of a button.
async fn trace_of(dev: &Dev, press: &Value, is_it: impl Fn(&str) -> bool) -> Result<Value> {
    let id = press["traceID"].as_str().with_context(|| press.to_string())?;
    let url = format!("{}/api/traces/{id}", dev.page);
    let found = poll(PATIENCE, async || {
        let answer = Client::new().get(&url).await.ok()?.json();
        is_it(&answer.to_string()).then_some(answer)
    });
    found.await.with_context(|| format!("trace {id} is not as expected; the output:\n{}", dev.said()))
}

#[tokio::test(flavor = "multi_thread")]
async fn buttons_of_the_page_log_in_stop_and_start_parts_slow_usercenter_and_publish_poison() -> Result<()> {
    let mut dev = Dev::start(&[]).await?;
    for (button, said) in
        [("login", "200 OK"), ("unknown", "401 Unauthorized"), ("malformed", "400 Bad Request")]
    {
        let pressed = press(&dev, button).await?;
        assert_eq!(pressed["said"], format!("login: {said}"));
        trace_of(&dev, &pressed, |trace| trace.contains(&said[..3])).await?;
    }
    let poison = press(&dev, "poison").await?;
    trace_of(&dev, &poison, |trace| trace.contains("mq_consumer_msg") && trace.contains("\"error\"")).await?;

    press(&dev, "slow").await?;
    dev.says_times("usercenter is ready, after ", 2).await?;
    let slow = press(&dev, "login").await?;
    let trace = trace_of(&dev, &slow, |trace| trace.matches("operationName").count() == 6).await?;
    let spans = trace["data"][0]["spans"].as_array().context("spans")?.iter();
    let calls = spans.filter(|span| span["operationName"] == "usercenter.v1.Usercenter/GetUserByMobile");
    let mut durations: Vec<_> = calls.filter_map(|span| span["duration"].as_u64()).collect();
    durations.sort_unstable();
    assert!(durations.len() == 2 && durations[1] >= durations[0] + 300_000, "{durations:?}");
    press(&dev, "slow").await?;
    dev.says_times("usercenter is ready, after ", 3).await?;

    // Without a terminal, `cargo dev` continues to run even after the page has stopped all services.
    for part in ["usercenter", "mq", "api"] {
        press(&dev, part).await?;
        dev.says(&format!("{part} has stopped")).await?;
    }
    assert!(labels(&dev).await?.contains(&"Start api".to_owned()));
    for part in ["usercenter", "mq", "api"] {
        press(&dev, part).await?;
        dev.says_times(&format!("{part} is ready, after "), if part == "usercenter" { 4 } else { 2 }).await?;
    }
    press(&dev, "broker").await?;
    dev.says("the broker has stopped").await?;
    press(&dev, "broker").await?;
    dev.says_times("the broker is ready", 2).await?;
    press(&dev, "load").await?;
    dev.says("load on").await?;
    press(&dev, "load").await?;
    dev.says("load off").await?;
    press(&dev, "traces").await?;
    dev.says_times("the trace backend is ready", 2).await?;
    assert!(labels(&dev).await?.contains(&"Stop api".to_owned()));
    signal("INT", dev.child.id().context("it has ended")?).await?;
    dev.ends(Some(0)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_page_of_another_site_presses_a_button_and_the_backend_alone_has_none() -> Result<()> {
    let dev = Dev::start(&[]).await?;
    let port = dev.page.rsplit(':').next().context("a port")?.to_owned();
    let address: std::net::SocketAddr = format!("127.0.0.1:{port}").parse()?;
    let ask = async |line: &str, headers: &str| {
        let request = format!("{line} HTTP/1.1\r\n{headers}connection: close\r\ncontent-length: 0\r\n\r\n");
        raw(address, request.as_bytes(), |_| false).await
    };
    let own = format!("host: localhost:{port}\r\n");
    let refused = [
        // Pages of other sites send these requests.
        format!("{own}origin: http://evil.example\r\n"),
        format!("{own}origin: http://localhost:1\r\n"),
        format!("{own}origin: https://localhost:{port}\r\n"),
        format!("{own}origin: http://localhost:{port}.evil.example\r\n"),
        format!("{own}origin: http://127.0.0.1:{port}\r\n"),
        format!("{own}origin: null\r\n"),
        format!("{own}origin: http://localhost:{port}\r\norigin: http://evil.example\r\n"),
        // This request has no origin, but a browser sends the page's origin with every press of a button.
        own.clone(),
        // The host of these requests is not the page's. (The domain name of another site may resolve to
        // 127.0.0.1.)
        format!("host: evil.example:{port}\r\norigin: http://evil.example:{port}\r\n"),
        "host: evil.example\r\norigin: http://evil.example\r\n".to_owned(),
        "host: localhost\r\norigin: http://localhost\r\n".to_owned(),
        format!("host: localhost:{port}.evil.example\r\norigin: http://localhost:{port}.evil.example\r\n"),
    ];
    for headers in refused {
        let answer = ask("POST /controls/api", &headers).await?;
        assert!(answer.starts_with("HTTP/1.1 403 "), "{headers}: {answer}");
    }
    let other = format!("host: evil.example:{port}\r\n");
    assert!(ask("GET /controls", &other).await?.starts_with("HTTP/1.1 403 "));
    assert!(ask("GET /controls/api", &own).await?.starts_with("HTTP/1.1 405 "));
    let origin = format!("{own}origin: http://localhost:{port}\r\n");
    assert!(ask("POST /controls/no-such-button", &origin).await?.starts_with("HTTP/1.1 404 "));
    assert!(labels(&dev).await?.contains(&"Stop api".to_owned()), "{}", dev.said());
    assert!(ask("POST /controls/api", &origin).await?.starts_with("HTTP/1.1 200 "));
    dev.says("api is stopping").await?;
    assert!(ask("GET /", &own).await?.contains("controls.js"));

    let alone = backend::Backend::start().await?;
    let page = format!("http://{}", alone.addresses().query);
    let client = Client::new();
    assert_eq!(client.get(&format!("{page}/controls")).await?.status, 404);
    assert_eq!(client.get(&format!("{page}/page/controls.js")).await?.status, 404);
    assert!(!String::from_utf8_lossy(&client.get(&page).await?.body).contains("controls.js"));
    let everywhere = backend::Addresses { query: "0.0.0.0:0".parse()?, ..backend::Addresses::FREE };
    let refused = backend::Backend::start_with_controls(everywhere, axum::Router::new()).await;
    assert!(refused.is_err_and(|error| error.to_string().contains("other machines")));
    Ok(())
}

/// Writes a shell script that stands in for another program. Returns the path of the script.
fn script(directory: &Path, name: &str, lines: &str) -> Result<String> {
    let path = directory.join(name);
    fs::write(&path, format!("#!/bin/sh\n{lines}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path.display().to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_while_it_builds_ends_the_build_too() -> Result<()> {
    let directory = tempfile::TempDir::new()?;
    let built = directory.path().join("started");
    // This script stands in for cargo. It starts a process that stands in for a compiler, and that runs for
    // ten minutes.
    let cargo = script(directory.path(), "cargo", &format!("sleep 600 & : >{}; wait", built.display()))?;
    for end in ["INT", "TERM", "HUP", "KILL"] {
        let mut dev = Dev::spawn(devstack(&["--free-ports"], &[("CARGO", &cargo)]))?;
        poll(PATIENCE, async || built.exists().then_some(())).await.context("no build")?;
        fs::remove_file(&built)?;
        // The shell's child may not have become `sleep` yet.
        let compiles =
            async || processes_with(&dev.mark).ok()?.iter().any(|line| line.contains("600")).then_some(());
        poll(PATIENCE, compiles).await.context("no compiler")?;
        signal(end, dev.child.id().context("it has ended")?).await?;
        let code = if end == "KILL" { None } else { Some(0) };
        dev.ends(code).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_while_it_starts_leaves_no_process() -> Result<()> {
    Process::command("api", &[])?;
    // Without a broker, mq does not become ready.
    let variables = [("AMQP_URL", "amqp://guest:guest@127.0.0.1:1/%2f")];
    let mut dev = Dev::spawn(devstack(&["--free-ports"], &variables))?;
    dev.says("usercenter is ready, after ").await?;
    signal("INT", dev.child.id().context("it has ended")?).await?;
    dev.ends(Some(0)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_everything_at_once() -> Result<()> {
    let mut dev = Dev::start(&[]).await?;
    // A stopped process does not end on SIGTERM.
    signal("STOP", dev.service("mq")?).await?;
    signal("INT", dev.child.id().context("it has ended")?).await?;
    dev.says("stopping").await?;
    signal("INT", dev.child.id().context("it has ended")?).await?;
    dev.ends(Some(0)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_amqp_url_is_refused_in_one_line_without_its_password() -> Result<()> {
    let variables = [("AMQP_URL", "ampq://guest:secret@broker"), ("CARGO", "/it/must/not/build")];
    let output = devstack(&["--free-ports"], &variables).stderr(Stdio::piped()).output().await?;
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(said_by(&output), "error: AMQP_URL: expected amqp(s)://user:password@host:port/vhost\n");
    Ok(())
}

/// Runs the first step of `cargo dev` with these variables. Returns the exit code and the output of the first
/// step.
async fn first_step(arguments: &[&str], variables: &[(&str, &str)]) -> Result<(Option<i32>, String)> {
    let mut command = Command::new(harness::process::binary("dev")?);
    command.args(arguments).env_remove("CC").env_remove("RUSTC").envs(variables.iter().copied());
    let output = command.output().await?;
    Ok((output.status.code(), said_by(&output)))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_told_before_anything_is_built_with_the_command_that_installs_it() -> Result<()> {
    let directory = tempfile::TempDir::new()?;
    let cargo = script(directory.path(), "cargo", r#"echo "building: $*, ${CARGO_PKG_NAME-}""#)?;
    let old = script(directory.path(), "rustc", "echo 'rustc 1.94.1 (0123456789 2026-01-01)'")?;
    let tries = [
        (
            ("RUSTC", old.as_str()),
            "error: Rust 1.95 is needed, and this is 1.94.1: run `rustup update stable`\n",
        ),
        (
            ("CC", "/no/such/cc"),
            "error: a C compiler is needed: `/no/such/cc` can't be run (No such file or directory (os error 2)); \
             install one, for example by `sudo apt install build-essential`\n",
        ),
    ];
    for ((variable, value), expected) in tries {
        let (code, said) = first_step(&["--free-ports"], &[(variable, value), ("CARGO", &cargo)]).await?;
        assert_eq!((code, said.as_str()), (Some(1), expected));
    }
    let variables = [("CARGO", cargo.as_str()), ("CARGO_PKG_NAME", "dev")];
    let (code, said) = first_step(&["verify", "--api", "x"], &variables).await?;
    assert_eq!((code, said.as_str()), (Some(0), "building: run --bin devstack -- verify --api x, \n"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_cargo_dev_is_told_about_the_first() -> Result<()> {
    let _guard = USUAL_PORTS.lock().await;
    // This devstack uses the usual port of the trace page. The test does not use the usual ports of usercenter
    // and mq, because they lie in Linux's ephemeral range, so a connection in TIME_WAIT may occupy one of them.
    let arguments =
        ["backend", "--query", "127.0.0.1:16686", "--otlp-grpc", "127.0.0.1:0", "--otlp-http", "127.0.0.1:0"];
    let first = Dev::spawn(devstack(&arguments, &[]))?;
    first.says("listening").await?;
    let (code, said) = first_step(&[], &[("CARGO", "/it/must/not/build")]).await?;
    let process = first.child.id().context("it has ended")?;
    assert_eq!(
        (code, said),
        (
            Some(1),
            format!(
                "error: another `cargo dev` is running: devstack (process {process}) uses port 16686; stop it, or \
                 run `cargo dev --free-ports`\n"
            )
        )
    );
    Ok(())
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

/// Starts `cargo dev`, ends it by `end`, and waits until its services are gone.
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
    // With `both`, the link is the only reference to the parent that Jaeger returns.
    let dev = Dev::start(&[("MQ_RELATION", "both")]).await?;
    let verified = dev.verify("60").await?;
    let said = said_by(&verified);
    assert!(verified.status.success(), "{said}");
    assert!(said.ends_with("all as it should be\n"), "{said}");

    // Without mq, the consumer span is missing from the tree.
    signal("KILL", dev.service("mq")?).await?;
    dev.says("mq has ended by itself (signal: 9 (SIGKILL)). Its last lines:\n").await?;
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
    assert!(said.contains("`cargo dev` starts the system"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_named_with_the_remedy() -> Result<()> {
    let _guard = USUAL_PORTS.lock().await;
    // The test also works if another process already uses this port.
    let taken = std::net::TcpListener::bind("127.0.0.1:8888");
    let output = devstack(&[], &[]).stderr(Stdio::piped()).output().await?;
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("port 8888 (api) is in use by ") && said.contains("--free-ports"), "{said}");
    assert!(taken.is_err() || said.contains(&format!(" (process {})", std::process::id())), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
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
    assert!(said.contains(&format!("{}, from AMQP_URL", broker.address())), "{said}");
    assert!(!said.contains("guest"), "{said}");
    Ok(())
}
