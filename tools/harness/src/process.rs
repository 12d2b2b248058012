//! Runs the services as real processes.

use crate::{PATIENCE, orphans, poll};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::{
    collections::{HashMap, VecDeque},
    env,
    net::SocketAddr,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::{Child, Command},
    task::JoinSet,
    time::timeout,
};

/// The prefixes of the variables that services read.
const THEIRS: [&str; 11] = [
    "ACCESS_",
    "AMQP_",
    "API_",
    "BAGGAGE_",
    "LOG_FORMAT",
    "MQ_",
    "OTEL_",
    "PUBLISH_",
    "RUST_LOG",
    "SHUTDOWN_",
    "USERCENTER_",
];

/// A running service. It is killed when this value is dropped.
pub struct Process {
    /// The service's name, which is also the name of its binary.
    pub name: &'static str,
    /// The address that the service listens on.
    pub address: SocketAddr,
    child: Child,
    output: Output,
    /// The number of lines of output up to the last call of [`Process::new_lines`].
    told: usize,
    readers: JoinSet<()>,
    /// The directory of the service's data, unless the variables name another directory.
    _data: Option<TempDir>,
}

/// How many lines of a service's output are kept. Older lines are dropped.
const MAX_LINES: usize = 20_000;

/// The lines of standard output and standard error, in the order of their arrival.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<Lines>>);

#[derive(Default)]
struct Lines {
    kept: VecDeque<String>,
    /// The number of all lines so far, including dropped lines.
    count: usize,
}

impl Process {
    /// Starts a service on a free port, with these variables. All other variables that services read, such as
    /// `OTEL_*`, are unset. Returns once the service listens.
    ///
    /// # Errors
    /// If the service doesn't listen; the error contains its output.
    pub async fn start(name: &'static str, variables: &[(&str, &str)]) -> Result<Self> {
        Self::start_with_data(name, Self::command(name, variables)?, variables).await
    }

    /// Starts a service as [`Process::start`] does, but through a shell that runs this script. In the script,
    /// `$0` is the service's binary.
    ///
    /// # Errors
    /// As for [`Process::start`].
    pub async fn start_by(script: &str, name: &'static str, variables: &[(&str, &str)]) -> Result<Self> {
        Self::start_with_data(name, Self::by_shell(script, name, variables)?, variables).await
    }

    async fn start_with_data(
        name: &'static str,
        mut command: Command,
        variables: &[(&str, &str)],
    ) -> Result<Self> {
        command.env("API_LISTEN", "127.0.0.1:0").env("USERCENTER_LISTEN", "127.0.0.1:0");
        command.env("MQ_LISTEN", "127.0.0.1:0");
        let data = data_of(&mut command)?;
        // The caller's variables take precedence.
        command.envs(variables.iter().copied());
        Ok(Self { _data: Some(data), ..Self::start_command(name, command).await? })
    }

    /// Starts a command from [`Process::command`] or [`Process::by_shell`], to which the caller may have added
    /// variables or arguments. Returns once the service listens.
    ///
    /// # Errors
    /// If the service doesn't listen; the error contains its output.
    pub async fn start_command(name: &'static str, command: Command) -> Result<Self> {
        let mut process = Self::spawn(name, ([127, 0, 0, 1], 0).into(), command)?;
        let output = process.output.clone();
        let address = poll(PATIENCE, async || {
            let said = output.find("listening");
            let address = said.and_then(|line| address(&line));
            address.map(Ok).or_else(|| process.exited().map(Err))
        });
        match address.await {
            Some(Ok(address)) => Ok(Self { address, ..process }),
            Some(Err(exit)) => bail!("{name} ended ({exit}):\n{}", output.text()),
            None => bail!("{name} does not listen:\n{}", output.text()),
        }
    }

    /// Starts a service that will listen on `address`, with this process's environment and these variables. A
    /// signal from the terminal to this process doesn't reach the service.
    ///
    /// # Errors
    /// If the service can't be started.
    pub fn start_beside(name: &'static str, address: SocketAddr, variables: &[(&str, &str)]) -> Result<Self> {
        let mut command = Command::new(binary(name)?);
        let data = data_of(&mut command)?;
        command.envs(variables.iter().copied());
        Ok(Self { _data: Some(data), ..Self::spawn(name, address, command)? })
    }

    pub(crate) fn spawn(name: &'static str, address: SocketAddr, mut command: Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command.process_group(orphans::group());
        let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
        let output = Output::default();
        let mut readers = JoinSet::new();
        readers.spawn(output.clone().follow(child.stdout.take()));
        readers.spawn(output.clone().follow(child.stderr.take()));
        Ok(Self { name, address, child, output, told: 0, readers, _data: None })
    }

    /// Returns the command of a service, with its output piped.
    ///
    /// # Errors
    /// If the services can't be built.
    pub fn command(name: &'static str, variables: &[(&str, &str)]) -> Result<Command> {
        Ok(Self::isolated(binary(name)?, variables))
    }

    /// Returns the command of a shell that runs this script. In the script, `$0` is the service's binary.
    ///
    /// # Errors
    /// If the services can't be built.
    pub fn by_shell(script: &str, name: &'static str, variables: &[(&str, &str)]) -> Result<Command> {
        let mut command = Self::isolated("sh".into(), variables);
        command.arg("-c").arg(script).arg(binary(name)?);
        Ok(command)
    }

    pub(crate) fn isolated(binary: PathBuf, variables: &[(&str, &str)]) -> Command {
        let mut command = Command::new(binary);
        for (variable, _) in env::vars_os() {
            let variable = variable.to_string_lossy();
            if THEIRS.iter().any(|prefix| variable.starts_with(prefix)) {
                command.env_remove(&*variable);
            }
        }
        command
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Returns the service's process id.
    pub fn id(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    /// Returns all output that is kept.
    pub fn output(&self) -> String {
        self.output.text()
    }

    /// Returns the lines of output since the last call.
    pub fn new_lines(&mut self) -> Vec<String> {
        let lines = self.output.lock();
        let new = lines.kept.iter().skip(lines.kept.len() - (lines.count - self.told).min(lines.kept.len()));
        let new = new.cloned().collect();
        self.told = lines.count;
        new
    }

    /// Returns the last `count` lines of output.
    pub fn last_lines(&self, count: usize) -> String {
        let lines = self.output.lock();
        let last: Vec<_> = lines.kept.iter().skip(lines.kept.len().saturating_sub(count)).cloned().collect();
        last.join("\n")
    }

    /// Returns the exit status, if the process has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits until a line of output contains `text`; returns the line.
    ///
    /// # Errors
    /// If no such line comes in time.
    pub async fn said(&self, text: &str) -> Result<String> {
        let line = poll(PATIENCE, async || self.output.find(text)).await;
        line.with_context(|| format!("{} did not say {text:?}:\n{}", self.name, self.output()))
    }

    /// Asks the service for its health, by the command `health` of the service's binary.
    ///
    /// # Errors
    /// If the command can't be run.
    pub async fn is_healthy(&self) -> Result<bool> {
        let address = self.address.to_string();
        let probe = Self::command(self.name, &[])?.args(["health", "--listen", &address]).output().await?;
        Ok(probe.status.success())
    }

    /// Waits until the service is healthy or, if `healthy` is `false`, until it is not healthy.
    ///
    /// # Errors
    /// If the service's health does not change in time.
    pub async fn becomes(&self, healthy: bool) -> Result<()> {
        let reached = poll(PATIENCE, async || (self.is_healthy().await.ok()? == healthy).then_some(())).await;
        reached.with_context(|| format!("is_healthy does not become {healthy}:\n{}", self.output()))
    }

    /// Sends the signal with this name, as the command `kill` does.
    ///
    /// # Errors
    /// If the process has ended.
    pub async fn signal(&self, signal: &str) -> Result<()> {
        let kill = Command::new("kill").arg(format!("-{signal}")).arg(self.id().to_string()).status().await?;
        ensure!(kill.success(), "kill -{signal} {}", self.name);
        Ok(())
    }

    /// Sends SIGTERM and waits until the process has ended.
    ///
    /// # Errors
    /// If the process doesn't end in time.
    pub async fn stop(&mut self) -> Result<ExitStatus> {
        self.signal("TERM").await?;
        self.exit().await
    }

    /// Waits until the process has ended and all of its output is read.
    ///
    /// # Errors
    /// If the process doesn't end in time.
    pub async fn exit(&mut self) -> Result<ExitStatus> {
        let exit = timeout(PATIENCE, self.child.wait()).await;
        let exit = exit.with_context(|| format!("{} does not end:\n{}", self.name, self.output.text()))?;
        while self.readers.join_next().await.is_some() {}
        Ok(exit?)
    }

    /// Kills the process, as a crash would end it.
    ///
    /// # Errors
    /// If the process has ended already.
    pub async fn kill(&mut self) -> Result<()> {
        Ok(self.child.kill().await?)
    }
}

impl Output {
    async fn follow(self, stream: Option<impl AsyncRead + Unpin>) {
        let Some(stream) = stream else {
            return;
        };
        let mut stream = BufReader::new(stream).lines();
        while let Ok(Some(line)) = stream.next_line().await {
            let mut lines = self.lock();
            lines.count += 1;
            lines.kept.push_back(line);
            if lines.kept.len() > MAX_LINES {
                lines.kept.pop_front();
            }
        }
    }

    fn find(&self, text: &str) -> Option<String> {
        self.lock().kept.iter().find(|line| line.contains(text)).cloned()
    }

    fn text(&self) -> String {
        self.lock().kept.make_contiguous().join("\n")
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a directory for the service's data, and puts the directory's path into the command's variables.
fn data_of(command: &mut Command) -> Result<TempDir> {
    let data = TempDir::new()?;
    command.env("API_DATA_DIR", data.path());
    command.env("MQ_DATABASE_URL", format!("sqlite://{}", data.path().join("mq.db").display()));
    Ok(data)
}

/// Reads the address from a line such as `listening address=127.0.0.1:1234`, or from the same line as JSON.
fn address(line: &str) -> Option<SocketAddr> {
    let (_, rest) = line.split_once("\"address\":\"").or_else(|| line.split_once("address="))?;
    rest.split([' ', '"', '\x1b']).next()?.parse().ok()
}

/// Returns the command of an example of the crate `telemetry`, with its output piped.
///
/// # Errors
/// If the example can't be built.
pub fn example(name: &str, variables: &[(&str, &str)]) -> Result<Command> {
    let built = build(&["--example", name])?;
    let binary = built.get(name).cloned().with_context(|| format!("there is no example {name}"))?;
    Ok(Process::isolated(binary, variables))
}

/// Returns the path of a service's binary. The first call builds all three services.
///
/// # Errors
/// If the services can't be built.
pub fn binary(name: &str) -> Result<PathBuf> {
    static BINARIES: OnceLock<Result<HashMap<String, PathBuf>, String>> = OnceLock::new();

    let binaries = BINARIES.get_or_init(|| build(&["--bins"]).map_err(|error| format!("{error:#}")));
    let binaries = binaries.as_ref().map_err(|error| anyhow::anyhow!(error.clone()))?;
    binaries.get(name).cloned().with_context(|| format!("there is no binary {name}"))
}

/// Builds with the profile of this program; returns the paths of the binaries by name.
fn build(what: &[&str]) -> Result<HashMap<String, PathBuf>> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = std::process::Command::new(cargo);
    // Builds the whole workspace, so that cargo enables the same features as for `cargo build` and rebuilds
    // little.
    build.args(["build", "--workspace", "--message-format=json-render-diagnostics"]).args(what);
    if !cfg!(debug_assertions) {
        build.arg("--release");
    }
    // The variables that cargo sets for a test's package would make cargo rebuild ring and all that depends
    // on it.
    for (variable, _) in env::vars_os() {
        if variable.to_string_lossy().starts_with("CARGO_PKG_") {
            build.env_remove(variable);
        }
    }
    build.env_remove("CARGO_MANIFEST_DIR").env_remove("CARGO_MANIFEST_LINKS");
    // When this process ends, cargo and its compilers end too.
    build.process_group(orphans::group()).current_dir(env!("CARGO_MANIFEST_DIR"));
    let build = build.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("starting cargo")?;
    let output = build.wait_with_output()?;
    ensure!(output.status.success(), "cargo build failed");
    let artifacts = output.stdout.split(|byte| *byte == b'\n').filter_map(|line| {
        let artifact: Value = serde_json::from_slice(line).ok()?;
        let path = artifact["executable"].as_str()?;
        Some((artifact["target"]["name"].as_str()?.to_owned(), path.into()))
    });
    Ok(artifacts.collect())
}
