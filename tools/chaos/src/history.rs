//! The logins that mq has applied, read from its database.

use super::ledger::TraceId;
use anyhow::{Context, Result};
use sqlx::{ConnectOptions, SqliteConnection, sqlite::SqliteConnectOptions};
use std::{collections::HashMap, path::Path, time::Duration};

/// A copy of the history: the number of effects of each trace. The copy changes only when [`History::catch_up`]
/// or [`History::read_all`] is called.
pub struct History {
    connection: SqliteConnection,
    last_row: i64,
    effects: HashMap<TraceId, u64>,
    untraced: usize,
    rows: u64,
    counted: u64,
}

impl History {
    /// Opens a database that mq has created.
    ///
    /// # Errors
    /// If there is no such database.
    pub async fn open(file: &Path) -> Result<Self> {
        let options = SqliteConnectOptions::new().filename(file).busy_timeout(Duration::from_secs(10));
        let connection = options.disable_statement_logging().connect().await;
        let connection = connection.with_context(|| format!("opening {}", file.display()))?;
        Ok(Self { connection, last_row: 0, effects: HashMap::new(), untraced: 0, rows: 0, counted: 0 })
    }

    /// Reads the rows that were added since the last call.
    ///
    /// # Errors
    /// If the database can't be read.
    pub async fn catch_up(&mut self) -> Result<()> {
        let new = "SELECT rowid, trace_id FROM login_history WHERE rowid > $1 ORDER BY rowid";
        let rows: Vec<(i64, Option<String>)> =
            sqlx::query_as(new).bind(self.last_row).fetch_all(&mut self.connection).await?;
        for (row, trace) in rows {
            self.last_row = row;
            self.rows += 1;
            match trace.and_then(|trace| TraceId::from_str_radix(&trace, 16).ok()) {
                Some(trace) => *self.effects.entry(trace).or_default() += 1,
                None => self.untraced += 1,
            }
        }
        Ok(())
    }

    /// Reads all rows and the counts again, for the verdict.
    ///
    /// # Errors
    /// If the database can't be read.
    pub async fn read_all(&mut self) -> Result<()> {
        (self.last_row, self.rows, self.untraced) = (0, 0, 0);
        self.effects.clear();
        self.catch_up().await?;
        let counted: Option<i64> =
            sqlx::query_scalar("SELECT SUM(logins) FROM login_count").fetch_one(&mut self.connection).await?;
        self.counted = u64::try_from(counted.unwrap_or_default())?;
        Ok(())
    }

    /// Makes the database refuse logins of the traces that are passed to [`History::refuse`].
    ///
    /// # Errors
    /// If the database can't be written.
    pub async fn prepare_refusals(&mut self) -> Result<()> {
        let table = "CREATE TABLE IF NOT EXISTS chaos_refused (trace_id TEXT PRIMARY KEY)";
        sqlx::query(table).execute(&mut self.connection).await?;
        let trigger = "CREATE TRIGGER IF NOT EXISTS chaos_refuses BEFORE INSERT ON login_history \
                       WHEN EXISTS (SELECT 1 FROM chaos_refused WHERE trace_id = NEW.trace_id) \
                       BEGIN SELECT RAISE(ABORT, 'refused by the test'); END";
        sqlx::query(trigger).execute(&mut self.connection).await?;
        Ok(())
    }

    /// Makes the database refuse the login of this trace, however often it is tried.
    ///
    /// # Errors
    /// If the database can't be written.
    pub async fn refuse(&mut self, trace: TraceId) -> Result<()> {
        let refuse = "INSERT INTO chaos_refused (trace_id) VALUES ($1)";
        sqlx::query(refuse).bind(format!("{trace:032x}")).execute(&mut self.connection).await?;
        Ok(())
    }

    /// Makes the database refuse all logins, or accept them again.
    ///
    /// # Errors
    /// If the database can't be written.
    pub async fn refuse_all(&mut self, on: bool) -> Result<()> {
        let change = if on {
            "CREATE TRIGGER chaos_refuses_all BEFORE INSERT ON login_history \
             BEGIN SELECT RAISE(ABORT, 'refused by the test'); END"
        } else {
            "DROP TRIGGER chaos_refuses_all"
        };
        sqlx::query(change).execute(&mut self.connection).await?;
        Ok(())
    }

    /// Returns whether a login took effect.
    pub fn has(&self, trace: TraceId) -> bool {
        self.effects.contains_key(&trace)
    }

    /// Returns how often a login took effect.
    pub fn effects(&self, trace: TraceId) -> u64 {
        self.effects.get(&trace).copied().unwrap_or_default()
    }

    /// Returns the trace ids of all logins that took effect.
    pub fn traces(&self) -> impl Iterator<Item = TraceId> {
        self.effects.keys().copied()
    }

    /// Returns the number of effects without a trace.
    pub fn untraced(&self) -> usize {
        self.untraced
    }

    /// Returns the number of all effects.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Returns the sum of the login counts, as it was when [`History::read_all`] last read them.
    pub fn counted(&self) -> u64 {
        self.counted
    }
}
