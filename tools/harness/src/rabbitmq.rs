//! A RabbitMQ node that belongs to this program. It has its own name, ports and directory, so that killing it
//! does no harm to another node on this machine.

use crate::{free_port, poll};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};
use tempfile::TempDir;
use tokio::net::TcpStream;

/// The Debian package's script directory. The scripts in `PATH` are wrappers that switch to another user.
const SCRIPTS: &str = "/usr/lib/rabbitmq/bin";

/// How long a node may take to start. Even without load, Erlang and RabbitMQ need seconds.
const PATIENCE: Duration = Duration::from_secs(90);

/// A RabbitMQ node. When it is dropped, the node is killed and its data deleted.
pub struct Node {
    /// The address that the node listens on for AMQP while it is up.
    pub address: SocketAddr,
    name: String,
    directory: TempDir,
    distribution_port: u16,
    /// The leader of a process group, to which the script and the processes that it starts belong.
    process: Option<Child>,
}

/// Returns whether a node can be started on this machine.
pub fn is_installed() -> bool {
    PathBuf::from(SCRIPTS).join("rabbitmq-server").exists()
}

impl Node {
    /// Starts an empty node, in a new directory in `parent`.
    ///
    /// # Errors
    /// If the node doesn't come up; the error contains its output.
    pub async fn start_in(parent: &Path) -> Result<Self> {
        let directory = TempDir::new_in(parent)?;
        fs::write(directory.path().join("rabbitmq.conf"), "log.console = false\n")?;
        fs::write(directory.path().join("enabled_plugins"), "[].\n")?;
        fs::write(directory.path().join("rabbitmq-env.conf"), "")?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let name = format!("throughline-{}@localhost", address.port());
        let mut node = Self { address, name, directory, distribution_port: free_port()?, process: None };
        node.up().await?;
        Ok(node)
    }

    /// Returns the node's URL.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@{}/%2f", self.address)
    }

    /// Starts the node again, with the data on its disk.
    ///
    /// # Errors
    /// If the node doesn't come up; the error contains its output.
    pub async fn up(&mut self) -> Result<()> {
        let output =
            fs::File::options().create(true).append(true).open(self.directory.path().join("output"))?;
        let mut command = self.command("rabbitmq-server");
        // Ctrl-C in the terminal must end only this program, which then ends the node.
        command.stdout(output.try_clone()?).stderr(output).process_group(0);
        self.process = Some(command.spawn().context("starting rabbitmq-server")?);
        let up = poll(PATIENCE, async || {
            if let Some(Ok(Some(exit))) = self.process.as_mut().map(Child::try_wait) {
                return Some(Err(exit));
            }
            TcpStream::connect(self.address).await.ok().map(Ok)
        });
        match up.await {
            Some(Ok(_)) => Ok(()),
            Some(Err(exit)) => bail!("rabbitmq-server ended ({exit}):\n{}", self.output()),
            None => bail!("rabbitmq-server does not listen:\n{}", self.output()),
        }
    }

    /// Kills the node, as a power cut would end it.
    ///
    /// # Errors
    /// If the node can't be killed.
    pub fn kill(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else {
            return Ok(());
        };
        let group = format!("-{}", process.id());
        let killed = Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status();
        process.wait()?;
        ensure!(killed?.success(), "kill -KILL {group}");
        Ok(())
    }

    /// Raises the memory alarm, by a threshold that is always exceeded, or clears it.
    ///
    /// # Errors
    /// If the node refuses the threshold.
    pub async fn set_alarm(&self, alarm: bool) -> Result<()> {
        let watermark = if alarm { "0.000001" } else { "0.8" };
        let mut command = self.command("rabbitmqctl");
        command.args(["--quiet", "set_vm_memory_high_watermark", watermark]);
        let output = tokio::process::Command::from(command).output().await?;
        ensure!(output.status.success(), "rabbitmqctl: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn command(&self, script: &str) -> Command {
        let at = |name: &str| self.directory.path().join(name);
        let mut command = Command::new(PathBuf::from(SCRIPTS).join(script));
        command
            // This directory has the node's Erlang cookie.
            .env("HOME", self.directory.path())
            .env("RABBITMQ_NODENAME", &self.name)
            .env("RABBITMQ_NODE_IP_ADDRESS", self.address.ip().to_string())
            .env("RABBITMQ_NODE_PORT", self.address.port().to_string())
            .env("RABBITMQ_DIST_PORT", self.distribution_port.to_string())
            .env("RABBITMQ_MNESIA_BASE", at("mnesia"))
            .env("RABBITMQ_LOG_BASE", at("log"))
            .env("RABBITMQ_CONFIG_FILE", at("rabbitmq.conf"))
            .env("RABBITMQ_CONF_ENV_FILE", at("rabbitmq-env.conf"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", at("enabled_plugins"))
            .stdin(Stdio::null());
        command
    }

    fn output(&self) -> String {
        fs::read_to_string(self.directory.path().join("output")).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
