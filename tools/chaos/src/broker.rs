//! The broker of a run, which can be killed, started again and blocked.

use ::broker::Broker as Embedded;
use anyhow::Result;
use clap::ValueEnum;
use harness::rabbitmq::{self, Node};
use lapin::{Channel, Connection};
use std::{env, net::SocketAddr};

/// Which broker a run uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The embedded broker, in this process.
    Embedded,
    /// A RabbitMQ node that belongs to this program.
    Rabbitmq,
}

/// A running broker.
pub enum Broker {
    /// The embedded broker, in this process.
    Embedded(Embedded),
    /// A RabbitMQ node, as a process.
    Rabbitmq(Node),
}

impl Kind {
    /// Returns whether this broker can run on this machine.
    pub fn is_installed(self) -> bool {
        self == Self::Embedded || rabbitmq::is_installed()
    }
}

impl Broker {
    /// Starts an empty broker.
    ///
    /// # Errors
    /// If the broker doesn't start.
    pub async fn start(kind: Kind) -> Result<Self> {
        Ok(match kind {
            Kind::Embedded => Self::Embedded(Embedded::start().await?),
            Kind::Rabbitmq => Self::Rabbitmq(Node::start_in(&env::temp_dir()).await?),
        })
    }

    /// Returns the address that the broker listens on.
    pub fn address(&self) -> SocketAddr {
        match self {
            Self::Embedded(broker) => broker.address(),
            Self::Rabbitmq(node) => node.address,
        }
    }

    /// Kills the broker.
    ///
    /// # Errors
    /// If the broker can't be killed.
    pub async fn down(&mut self) -> Result<()> {
        match self {
            Self::Embedded(broker) => broker.crash().await,
            Self::Rabbitmq(node) => node.kill()?,
        }
        Ok(())
    }

    /// Starts the broker again, with its durable queues and messages.
    ///
    /// # Errors
    /// If the broker doesn't come up.
    pub async fn up(&mut self) -> Result<()> {
        match self {
            Self::Embedded(broker) => broker.restart(),
            Self::Rabbitmq(node) => node.up().await?,
        }
        Ok(())
    }

    /// Makes the broker stop accepting messages, or accept them again.
    ///
    /// # Errors
    /// If the alarm can't be changed.
    pub async fn set_alarm(&self, alarm: bool) -> Result<()> {
        match self {
            Self::Embedded(broker) => broker.set_alarm(alarm),
            Self::Rabbitmq(node) => node.set_alarm(alarm).await?,
        }
        Ok(())
    }

    /// Opens a connection for the test, which bypasses the proxies and so their faults.
    ///
    /// # Errors
    /// If the broker can't be reached.
    pub async fn connect(&self) -> Result<(Connection, Channel)> {
        let url = format!("amqp://guest:guest@{}/%2f", self.address());
        let server = amqp::connection::parse_url(&url).map_err(anyhow::Error::msg)?;
        let connection = amqp::connection::connect(&server, "chaos").await?;
        let channel = connection.create_channel().await?;
        Ok((connection, channel))
    }
}
