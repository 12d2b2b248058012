//! A RabbitMQ node that belongs to this program. It has its own name, ports and directory, so that killing it
//! does no harm to another node on this machine. Several such nodes can form a cluster.

use crate::{free_port, poll};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    io::Write,
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

/// A RabbitMQ node. When this value is dropped, the node is killed and its data are deleted.
pub struct Node {
    /// The address that the node listens on for AMQP while it is up.
    pub address: SocketAddr,
    /// The node's name in its cluster.
    pub name: String,
    directory: TempDir,
    distribution_port: u16,
    /// The start script. It leads a process group, to which all processes of the node belong.
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
        let mut node = Self::prepare(parent)?;
        node.up().await?;
        Ok(node)
    }

    /// Starts an empty node that forms a cluster with this node.
    ///
    /// # Errors
    /// As for [`Node::start_in`].
    pub async fn start_beside(&self) -> Result<Self> {
        let here = self.directory.path();
        let mut node = Self::prepare(here.parent().context("the directory has no parent")?)?;
        let there = node.directory.path();
        // All nodes of a cluster need the same cookie.
        fs::copy(here.join(".erlang.cookie"), there.join(".erlang.cookie"))?;
        let peers = format!(
            "cluster_formation.peer_discovery_backend = classic_config\n\
             cluster_formation.classic_config.nodes.1 = {}\n\
             cluster_formation.classic_config.nodes.2 = {}\n",
            self.name, node.name
        );
        fs::File::options().append(true).open(there.join("rabbitmq.conf"))?.write_all(peers.as_bytes())?;
        node.up().await?;
        node.control(&["await_online_nodes", "2"]).await?;
        Ok(node)
    }

    fn prepare(parent: &Path) -> Result<Self> {
        let directory = TempDir::new_in(parent)?;
        fs::write(directory.path().join("rabbitmq.conf"), "log.console = false\n")?;
        fs::write(directory.path().join("enabled_plugins"), "[].\n")?;
        fs::write(directory.path().join("rabbitmq-env.conf"), "")?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let name = format!("throughline-{}@localhost", address.port());
        Ok(Self { address, name, directory, distribution_port: free_port()?, process: None })
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
        if self.process.is_none() {
            return Ok(());
        }
        let killed = self.signal("KILL");
        if let Some(mut process) = self.process.take() {
            process.wait()?;
        }
        killed
    }

    /// Stops the node as an operator does, and waits until it has ended.
    ///
    /// # Errors
    /// If the node does not end.
    pub async fn stop(&mut self) -> Result<()> {
        self.signal("TERM")?;
        let ended = poll(PATIENCE, async || self.process.as_mut()?.try_wait().ok().flatten()).await;
        ended.with_context(|| format!("rabbitmq-server does not end:\n{}", self.output()))?;
        self.process = None;
        Ok(())
    }

    /// Freezes the node, so that it keeps its connections but does nothing, or lets it continue.
    ///
    /// # Errors
    /// If the node does not run.
    pub fn set_frozen(&self, frozen: bool) -> Result<()> {
        self.signal(if frozen { "STOP" } else { "CONT" })
    }

    fn signal(&self, signal: &str) -> Result<()> {
        let process = self.process.as_ref().context("the node does not run")?;
        let (signal, group) = (format!("-{signal}"), format!("-{}", process.id()));
        let sent = Command::new("kill").args([&signal, "--", &group]).stderr(Stdio::null()).status()?;
        ensure!(sent.success(), "kill {signal} {group}");
        Ok(())
    }

    /// Raises the memory alarm, by a threshold that is always exceeded, or clears the alarm.
    ///
    /// # Errors
    /// If the node refuses the threshold.
    pub async fn set_alarm(&self, alarm: bool) -> Result<()> {
        let watermark = if alarm { "0.000001" } else { "0.8" };
        self.control(&["set_vm_memory_high_watermark", watermark]).await.map(drop)
    }

    /// Sets the default queue type of the virtual host `/`.
    ///
    /// # Errors
    /// If the node refuses the queue type.
    pub async fn set_default_queue_type(&self, queue_type: &str) -> Result<()> {
        let option = ["--default-queue-type", queue_type];
        if self.control(&[&["update_vhost_metadata", "/"], &option[..]].concat()).await.is_err() {
            // RabbitMQ 3.10 does not have this command.
            let change = format!("fun(Old) -> Old#{{default_queue_type => <<\"{queue_type}\">>}} end");
            let update = format!("fun() -> rabbit_vhost:update_metadata(<<\"/\">>, {change}) end");
            self.control(&["eval", &format!("rabbit_misc:execute_mnesia_transaction({update}).")]).await?;
        }
        let listed = self.control(&["list_vhosts", "default_queue_type"]).await?;
        ensure!(listed.contains(queue_type), "the default queue type is not {queue_type}: {listed}");
        Ok(())
    }

    /// Returns the name of the node that has the leader of a queue.
    ///
    /// # Errors
    /// If there is no such queue.
    pub async fn leader(&self, queue: &str) -> Result<String> {
        let listed = self.control(&["list_queues", "name", "leader"]).await?;
        let mut leaders = listed.lines().filter_map(|line| line.split_once('\t'));
        let leader = leaders.find(|(name, _)| *name == queue).map(|(_, leader)| leader.to_owned());
        leader.with_context(|| format!("{queue} has no leader: {listed}"))
    }

    /// Runs a command of `rabbitmqctl`; returns its output.
    async fn control(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.command("rabbitmqctl");
        command.arg("--quiet").args(arguments);
        let output = tokio::process::Command::from(command).output().await?;
        ensure!(output.status.success(), "rabbitmqctl: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn command(&self, script: &str) -> Command {
        let at = |name: &str| self.directory.path().join(name);
        let mut command = Command::new(PathBuf::from(SCRIPTS).join(script));
        command
            // This directory has the node's Erlang cookie.
            .env("HOME", self.directory.path())
            .env("RABBITMQ_NODENAME", &self.name)
            // If the queue for a dead letter was missing, RabbitMQ tries again after five seconds instead of
            // three minutes.
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "-rabbit dead_letter_worker_publisher_confirm_timeout 5000",
            )
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
