//! The broker of a run, which can be killed, started again and blocked. The broker may be a cluster.

use ::broker::Broker as Embedded;
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use futures_util::future::try_join_all;
use harness::rabbitmq::{self, Node};
use lapin::{Channel, Connection};
use std::{env, net::SocketAddr};

/// Which broker a run uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The embedded broker, in this process.
    Embedded,
    /// A RabbitMQ node that this program starts.
    Rabbitmq,
    /// A cluster of three RabbitMQ nodes that this program starts.
    Cluster,
}

/// A running broker.
pub enum Broker {
    /// The embedded broker, in this process.
    Embedded(Embedded),
    /// RabbitMQ nodes, each as a process.
    Rabbitmq {
        /// The nodes. If there are several, they form a cluster.
        nodes: Vec<Node>,
        /// The index of the node that new connections reach.
        current: usize,
    },
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
            Kind::Rabbitmq | Kind::Cluster => {
                let mut nodes = vec![Node::start_in(&env::temp_dir()).await?];
                while kind == Kind::Cluster && nodes.len() < 3 {
                    nodes.push(nodes[0].start_beside().await?);
                }
                Self::Rabbitmq { nodes, current: 0 }
            }
        })
    }

    /// Returns the address for new connections.
    pub fn address(&self) -> SocketAddr {
        match self {
            Self::Embedded(broker) => broker.address(),
            Self::Rabbitmq { nodes, current } => nodes[*current].address,
        }
    }

    /// Kills the broker, with all its nodes.
    ///
    /// # Errors
    /// If the broker can't be killed.
    pub async fn down(&mut self) -> Result<()> {
        match self {
            Self::Embedded(broker) => broker.crash().await,
            Self::Rabbitmq { nodes, .. } => nodes.iter_mut().try_for_each(Node::kill)?,
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
            // The nodes start at the same time, because each waits for the others after a crash of all nodes.
            Self::Rabbitmq { nodes, .. } => drop(try_join_all(nodes.iter_mut().map(Node::up)).await?),
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
            Self::Rabbitmq { .. } => self.node()?.set_alarm(alarm).await?,
        }
        Ok(())
    }

    /// Returns the node for new connections.
    ///
    /// # Errors
    /// If the broker is embedded.
    pub fn node(&self) -> Result<&Node> {
        match self {
            Self::Embedded(_) => bail!("the embedded broker is not a RabbitMQ node"),
            Self::Rabbitmq { nodes, current } => Ok(&nodes[*current]),
        }
    }

    /// Chooses the next node for new connections. Returns the address of this node, and the previous node.
    ///
    /// # Errors
    /// If the broker is embedded.
    pub fn move_on(&mut self) -> Result<(SocketAddr, &mut Node)> {
        match self {
            Self::Embedded(_) => bail!("the embedded broker is not a RabbitMQ node"),
            Self::Rabbitmq { nodes, current } => {
                let before = *current;
                *current = (before + 1) % nodes.len();
                Ok((nodes[*current].address, &mut nodes[before]))
            }
        }
    }

    /// For new connections, chooses the node that has the leader of a queue.
    ///
    /// # Errors
    /// If there is no such queue, or the broker is embedded.
    pub async fn choose_leader(&mut self, queue: &str) -> Result<()> {
        let leader = self.node()?.leader(queue).await?;
        if let Self::Rabbitmq { nodes, current } = self {
            *current = nodes.iter().position(|node| node.name == leader).context("an unknown leader")?;
        }
        Ok(())
    }

    /// Opens a connection for the test itself. The connection bypasses the proxies and so their faults.
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
