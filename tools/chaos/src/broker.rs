//! The broker of a run: one that can be taken down, brought back and blocked.

use ::broker::Broker as Embedded;
use anyhow::Result;
use clap::ValueEnum;
use harness::rabbitmq::{self, Node};
use lapin::{Channel, Connection};
use std::{env, net::SocketAddr};

/// Which broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The one in this process.
    Embedded,
    /// A RabbitMQ node of this program's own.
    Rabbitmq,
}

/// A broker, running.
pub enum Broker {
    /// In this process.
    Embedded(Embedded),
    /// As a process.
    Rabbitmq(Node),
}

impl Kind {
    /// Whether it can run on this machine.
    pub fn is_installed(self) -> bool {
        self == Self::Embedded || rabbitmq::is_installed()
    }
}

impl Broker {
    /// Starts one with nothing in it.
    ///
    /// # Errors
    /// If it doesn't start.
    pub async fn start(kind: Kind) -> Result<Self> {
        Ok(match kind {
            Kind::Embedded => Self::Embedded(Embedded::start().await?),
            Kind::Rabbitmq => Self::Rabbitmq(Node::start_in(&env::temp_dir()).await?),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        match self {
            Self::Embedded(broker) => broker.address(),
            Self::Rabbitmq(node) => node.address,
        }
    }

    /// Kills it.
    ///
    /// # Errors
    /// If it can't be killed.
    pub async fn down(&mut self) -> Result<()> {
        match self {
            Self::Embedded(broker) => broker.crash().await,
            Self::Rabbitmq(node) => node.kill()?,
        }
        Ok(())
    }

    /// Brings it back, with what is durable.
    ///
    /// # Errors
    /// If it doesn't come back.
    pub async fn up(&mut self) -> Result<()> {
        match self {
            Self::Embedded(broker) => broker.restart(),
            Self::Rabbitmq(node) => node.up().await?,
        }
        Ok(())
    }

    /// Has it take no more messages, or take them again.
    ///
    /// # Errors
    /// If it can't be told.
    pub async fn set_alarm(&self, alarm: bool) -> Result<()> {
        match self {
            Self::Embedded(broker) => broker.set_alarm(alarm),
            Self::Rabbitmq(node) => node.set_alarm(alarm).await?,
        }
        Ok(())
    }

    /// A connection of the test's own, around all faults of the network.
    ///
    /// # Errors
    /// If there is none.
    pub async fn connect(&self) -> Result<(Connection, Channel)> {
        let url = format!("amqp://guest:guest@{}/%2f", self.address());
        let server = amqp::connection::parse_url(&url).map_err(anyhow::Error::msg)?;
        let connection = amqp::connection::connect(&server, "chaos").await?;
        let channel = connection.create_channel().await?;
        Ok((connection, channel))
    }
}
