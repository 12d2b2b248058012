//! Lets an operator handle the spool of an instance that no longer runs: `api spool list|drain|export`.
//!
//! Only one process can open a spool at a time, so these commands refuse the spool of an instance that is
//! still running.

use crate::{
    config::{Config, SpoolCommand},
    outbox::{Message, OpenSpoolError, Outbox, SPOOL_FILE, Spool},
};
use anyhow::{Context, bail, ensure};
use proto::topology::{EXCHANGE, QUEUE, ROUTING_KEY};
use std::{
    io::{self, Write},
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// How long `drain` waits for the broker to confirm further logins.
const PATIENCE: Duration = Duration::from_secs(30);

/// The largest number of entries that are read at once.
const MAX_READ: usize = 512;

/// Carries out the command, and prints its result.
///
/// # Errors
/// If the spool can't be opened or read, or if the broker does not confirm its logins.
pub async fn run(config: &Config, command: SpoolCommand) -> anyhow::Result<()> {
    let directory = config.data_dir.display();
    // Opening a missing spool would create an empty one.
    ensure!(config.data_dir.join(SPOOL_FILE).exists(), "there is no spool in {directory}");
    let spool = match Spool::open(&config.data_dir, config.spool_capacity()) {
        Err(OpenSpoolError::InUse) => bail!(
            "another process uses the spool in {directory}; if that process is an api, it publishes the logins \
             itself, and its /readyz says how many are left"
        ),
        spool => spool.with_context(|| format!("opening the spool in {directory}"))?,
    };
    match command {
        SpoolCommand::List => {
            writeln!(io::stdout(), "{:<36}  {:>14}  {:>6}", "MESSAGE ID", "AGE IN SECONDS", "BYTES")?;
            write_entries(&spool, |out, message, bytes| {
                let age = message.taken_at().elapsed().unwrap_or_default().as_secs();
                writeln!(out, "{:<36}  {age:>14}  {bytes:>6}", message.id())
            })
            .await
        }
        SpoolCommand::Export => {
            write_entries(&spool, |out, message, _| {
                out.write_all(&message.to_bytes())?;
                out.write_all(b"\n")
            })
            .await
        }
        SpoolCommand::Drain => drain(config, spool).await,
    }
}

/// Writes all entries to standard output, the oldest first, each with its size in bytes.
async fn write_entries(
    spool: &Spool,
    write: impl Fn(&mut dyn Write, &Message, usize) -> io::Result<()>,
) -> anyhow::Result<()> {
    let (mut after, mut out) = (0, io::stdout().lock());
    loop {
        let entries = spool.read(after, MAX_READ).await.context("the spool can't be read")?;
        let Some((last, _)) = entries.last() else { break };
        after = *last;
        for (_, message) in &entries {
            write(&mut out, message, message.to_bytes().len())?;
        }
    }
    Ok(out.flush()?)
}

/// Publishes all entries as api would, and removes those that the broker confirms.
async fn drain(config: &Config, spool: Spool) -> anyhow::Result<()> {
    let server = config.amqp.server().map_err(anyhow::Error::msg)?;
    let (state, all) = (spool.state(), spool.state().borrow().entries);
    let left = || {
        // The state is copied, because a second `borrow` during the first could wait for ever.
        let state = *state.borrow();
        state.entries.saturating_sub(state.set_aside)
    };
    let topology = config.amqp.topology(EXCHANGE, ROUTING_KEY, QUEUE);
    let (_outbox, publishing) = Outbox::start(server.clone(), topology, config.publish_options(), spool);
    let (mut before, mut since) = (left(), Instant::now());
    while left() > 0 && since.elapsed() < PATIENCE {
        sleep(Duration::from_millis(20)).await;
        if left() != before {
            (before, since) = (left(), Instant::now());
        }
    }
    publishing.close(Instant::now() + PATIENCE).await;
    let kept = state.borrow().entries;
    writeln!(io::stdout(), "published {} of {all} logins", all - kept)?;
    ensure!(
        kept == 0,
        "{kept} logins stay in the spool, because the broker at {server} did not confirm them"
    );
    Ok(())
}
