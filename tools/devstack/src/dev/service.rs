//! A service of the system, as a process that starts and ends.

use super::{TICK, say};
use anyhow::Result;
use harness::{client::Client, free_port, process::Process, proxy::Proxy};
use serving::health;
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::{task::JoinHandle, time::sleep};

/// How long a service may take to become ready.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// When a service has ended, this many of its last lines are printed.
pub const LAST_LINES: usize = 10;

/// One of the three services.
pub struct Service {
    pub key: char,
    pub name: &'static str,
    binary: &'static str,
    /// The environment variable with the address at which the service listens.
    listen: &'static str,
    pub address: SocketAddr,
    pub process: Option<Process>,
    /// The task that waits until the service is ready, and returns whether the service is ready in time.
    pub start: Option<JoinHandle<bool>>,
    /// When the service was told to stop.
    pub stopping: Option<Instant>,
    /// Whether the service is started again after it has stopped.
    pub restarts: bool,
    /// Whether the service has stopped because it was told to.
    pub is_stopped: bool,
    /// The delay that is added to the service's answers.
    pub delay: Duration,
    /// The proxy at the service's address that delays the answers.
    proxy: Option<Proxy>,
}

impl Service {
    /// Makes a service that does not run yet.
    pub fn new(
        key: char,
        name: &'static str,
        binary: &'static str,
        listen: &'static str,
        address: SocketAddr,
    ) -> Self {
        Self {
            key,
            name,
            binary,
            listen,
            address,
            process: None,
            start: None,
            stopping: None,
            restarts: false,
            is_stopped: false,
            delay: Duration::ZERO,
            proxy: None,
        }
    }

    /// Starts the process, and a task that says when the service is ready.
    pub fn start(&mut self, variables: &[(&'static str, String)]) -> Result<()> {
        let variables: Vec<_> =
            variables.iter().map(|(variable, value)| (*variable, value.as_str())).collect();
        let mut variables = variables;
        let mut address = self.address;
        if !self.delay.is_zero() {
            address.set_port(free_port()?);
            let proxy = Proxy::start_at(self.address, address)?;
            // The call and its answer both pass the proxy, so each of them gets half of the delay.
            proxy.slow_down(self.delay / 2);
            self.proxy = Some(proxy);
        }
        let listen = address.to_string();
        variables.push((self.listen, &listen));
        self.process = Some(Process::start_beside(self.binary, address, &variables)?);
        (self.restarts, self.is_stopped) = (false, false);
        self.start = Some(tokio::spawn(tell_when_ready(self.name, self.address)));
        Ok(())
    }

    /// Stops or starts the service, and says so.
    pub async fn toggle(&mut self, variables: &[(&'static str, String)]) {
        let name = self.name;
        match &self.process {
            None => match self.start(variables) {
                Ok(()) => drop(say(&format!("{name} is starting"))),
                Err(error) => drop(say(&format!("{name} does not start: {error:#}"))),
            },
            Some(_) if self.stopping.is_some() => {
                self.restarts = true;
                say(&format!("{name} is still stopping, and will start after that"));
            }
            Some(process) => {
                // The process may have ended by itself, which `end` reports.
                self.stopping = process.signal("TERM").await.is_ok().then(Instant::now);
                say(&format!("{name} is stopping"));
            }
        }
    }

    /// Returns the exit status and the last lines of the process, if it has ended.
    pub fn end(&mut self) -> Option<String> {
        let process = self.process.as_mut()?;
        let (exit, words) = (process.exited()?, process.last_lines(LAST_LINES));
        if let Some(start) = self.start.take() {
            start.abort();
        }
        (self.process, self.stopping, self.proxy) = (None, None, None);
        Some(format!("{} has ended by itself ({exit}). Its last lines:\n{words}", self.name))
    }
}

/// Waits until a service is ready, and says how long that took.
async fn tell_when_ready(name: &'static str, address: SocketAddr) -> bool {
    let (client, start) = (Client::new(), Instant::now());
    loop {
        let answer = match name {
            "api" => match client.get(&format!("http://{address}/readyz")).await {
                Ok(answer) if answer.status == 200 => Ok(()),
                Ok(answer) => Err(anyhow::anyhow!("{}", String::from_utf8_lossy(&answer.body))),
                Err(error) => Err(error),
            },
            _ => health::probe(address).await,
        };
        let took = start.elapsed();
        match answer {
            Ok(()) => {
                say(&format!("{name} is ready, after {:.1} s", took.as_secs_f64()));
                return true;
            }
            Err(error) if took > START_TIMEOUT => {
                say(&format!("{name} is not ready, after {} s: {error:#}", took.as_secs()));
                return false;
            }
            Err(_) => sleep(TICK).await,
        }
    }
}
