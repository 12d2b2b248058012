//! The flags and environment variables of this service. The `OTEL_*` variables belong to the crate
//! `telemetry`.

use clap::{Parser, Subcommand};
use proto::topology::DEFAULT_RETRY_DELAYS;
use serving::{arguments, shutdown};
use sqlx::sqlite::SqliteConnectOptions;
use std::{net::SocketAddr, str::FromStr, time::Duration};
use telemetry::amqp::Relation;

/// The consumer of login messages.
// It has no `Debug`, because the URL may hold a password.
#[derive(Parser)]
#[command(version)]
pub struct Config {
    /// What to do instead of consuming.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Where to listen for gRPC health checks.
    #[arg(long, env = "MQ_LISTEN", default_value = "127.0.0.1:50052", global = true)]
    pub listen: SocketAddr,

    /// The broker.
    #[command(flatten)]
    pub amqp: amqp::Arguments,

    /// How many unacknowledged messages the broker may send to mq.
    #[arg(long, env = "MQ_PREFETCH", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    pub prefetch: u16,

    /// The time from the start of one chunk of deliveries to the start of the next. Deliveries gather
    /// meanwhile, so that their logins share a commit. The maximum is 1s. With 0s, or after a full chunk,
    /// there is no wait.
    #[arg(long, env = "MQ_COMMIT_INTERVAL", default_value = "10ms", value_parser = commit_interval)]
    pub commit_interval: Duration,

    /// How the consumer span relates to the producer span: parent (as its child), link (in a new trace, with
    /// a link) or both.
    #[arg(long, env = "MQ_RELATION", default_value = "parent")]
    pub relation: Relation,

    /// The database of the login history, as sqlite://path. The file and its folder are made if they are
    /// missing.
    #[arg(long, env = "MQ_DATABASE_URL", default_value = "sqlite://data/mq/mq.db", hide_env_values = true)]
    database_url: String,

    /// How long a failed message waits before its second attempt, its third attempt, and so on. If the
    /// attempt after the last delay fails, the message becomes a dead letter. With `none`, it becomes a dead
    /// letter after the first attempt.
    #[arg(long, env = "MQ_RETRY_DELAYS", default_value = DEFAULT_RETRY_DELAYS)]
    pub retry_delays: RetryDelays,

    /// How to shut down.
    #[command(flatten)]
    pub shutdown: shutdown::Options,
}

/// What to do instead of consuming.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Ask the running service whether it is consuming. The exit code is 0 if it is consuming, and 1 if not.
    Health,
    /// Look at dead letters, that is, messages that mq has given up, or publish them again.
    #[command(subcommand)]
    DeadLetters(DeadLetters),
}

/// What to do with dead letters.
#[derive(Debug, Clone, Subcommand)]
pub enum DeadLetters {
    /// List all dead letters, the oldest first. They stay in the queue.
    List,
    /// Show the headers and properties of one dead letter, which stays in the queue.
    Show {
        /// The message id of the dead letter.
        message_id: String,
        /// Also show the body, which holds personal data.
        #[arg(long)]
        body: bool,
    },
    /// Publish one or all dead letters for a new round of attempts, and remove them from the queue.
    #[group(required = true, multiple = false)]
    Replay {
        /// The message id of the dead letter.
        message_id: Option<String>,
        /// Replay all dead letters that are in the queue now.
        #[arg(long)]
        all: bool,
    },
}

/// The pauses between attempts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryDelays(pub Vec<Duration>);

impl FromStr for RetryDelays {
    type Err = String;

    fn from_str(list: &str) -> Result<Self, String> {
        /// The largest number of delays. It is limited, because each delay needs its own queue.
        const MOST: usize = 16;
        /// The longest delay that a queue's `x-message-ttl` can hold.
        const LONGEST: Duration = Duration::from_millis(u32::MAX as u64);

        if list == "none" {
            return Ok(Self(Vec::new()));
        }
        let delays = list.split(',').map(|delay| humantime::parse_duration(delay.trim()));
        let delays: Vec<_> = delays.collect::<Result<_, _>>().map_err(|error| error.to_string())?;
        let in_order = delays.is_sorted();
        let in_range = delays.iter().all(|delay| (Duration::from_millis(1)..=LONGEST).contains(delay));
        if delays.len() > MOST || !in_order || !in_range {
            return Err("expected at most 16 durations from 1ms to 49days, none shorter than the one before"
                .to_owned());
        }
        Ok(Self(delays))
    }
}

/// Reads an interval. The interval has a bound, because each login may wait this long.
fn commit_interval(text: &str) -> Result<Duration, String> {
    match arguments::duration(text)? {
        interval if interval > Duration::from_secs(1) => Err("must be at most 1s".to_owned()),
        interval => Ok(interval),
    }
}

impl Config {
    /// Reads flags and environment variables. Exits with code 2 if a value can't be used.
    pub fn load() -> Self {
        arguments::parse(|config: &Self| {
            config.amqp.server()?;
            config.shutdown.check()?;
            config.database().map(drop)
        })
    }

    /// Returns the database of the login history.
    ///
    /// # Errors
    /// If the URL is malformed. [`Config::load`] has already checked that.
    pub fn database(&self) -> Result<SqliteConnectOptions, String> {
        crate::history::parse_url(&self.database_url).map_err(|problem| format!("MQ_DATABASE_URL: {problem}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::topology::{EXCHANGE, QUEUE, ROUTING_KEY};

    #[test]
    fn with_the_longest_prefix_every_name_is_a_short_string() {
        let with_prefix = |prefix: String| Config::try_parse_from(["mq", "--amqp-prefix", &prefix]);
        let config = with_prefix("p".repeat(195)).unwrap();
        let topology = config.amqp.topology(EXCHANGE, ROUTING_KEY, QUEUE);
        // No delay that is allowed has a longer name.
        let delays: RetryDelays = "1month 18days 23h 59m 59s 999ms 999us 999ns".parse().unwrap();
        let names = [
            topology.exchange.clone(),
            topology.dead_letter_queue.clone(),
            topology.retry_queue(delays.0[0]),
        ];
        assert!(names.iter().all(|name| name.len() <= 255), "{names:?}");
        // Bytes count, not characters.
        assert!(with_prefix("é".repeat(98)).is_err());
    }
}
