//! mq's database. A test reads this database and makes it fail, both from outside, because mq itself has no
//! hook for that.

use anyhow::Result;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, SqliteConnection, sqlite::SqliteConnectOptions};
use std::collections::HashSet;
use std::env;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A database that outlives the mq process that uses it.
pub struct Database {
    /// The value for `MQ_DATABASE_URL`.
    pub url: String,
    directory: TempDir,
}

impl Database {
    /// Makes a place for a database. mq creates the database itself.
    ///
    /// # Errors
    /// If the directory can't be created.
    pub fn new() -> Result<Self> {
        Self::new_in(&env::temp_dir())
    }

    /// Makes a place for a database in the directory `parent`. mq creates the database itself.
    ///
    /// # Errors
    /// If the directory can't be created.
    pub fn new_in(parent: &Path) -> Result<Self> {
        let directory = TempDir::new_in(parent)?;
        // The folder `data` doesn't exist yet either, so mq has to create it.
        let url = format!("sqlite://{}", directory.path().join("data/mq.db").display());
        Ok(Self { url, directory })
    }

    /// Opens a connection for the test.
    ///
    /// # Errors
    /// If mq has not created the database yet.
    pub async fn connect(&self) -> Result<SqliteConnection> {
        Ok(SqliteConnectOptions::new().filename(self.file()).connect().await?)
    }

    /// Returns the path of the database.
    pub fn file(&self) -> PathBuf {
        self.directory.path().join("data/mq.db")
    }

    /// Makes every login of `mobile` fail, with an error text that contains the number.
    ///
    /// # Errors
    /// If the database can't be used.
    pub async fn poison(&self, mobile: &str) -> Result<()> {
        let trigger = format!(
            "CREATE TRIGGER poison BEFORE INSERT ON login_history WHEN NEW.mobile = '{mobile}' \
             BEGIN SELECT RAISE(ABORT, 'poisoned: {mobile}'); END"
        );
        sqlx::query(AssertSqlSafe(trigger)).execute(&mut self.connect().await?).await?;
        Ok(())
    }

    /// A script for [`Process::start_by`](crate::process::Process::start_by), which makes a process die when it
    /// writes a file of more than 8 MiB. (`ulimit -f` counts in blocks of 512 bytes.)
    pub const BOUND_FILES: &str = "ulimit -c 0; ulimit -f 16384; exec \"$0\"";

    /// Makes every login of `mobile` write 32 MB, which kills an mq that runs under `BOUND_FILES`.
    ///
    /// # Errors
    /// If the database can't be used.
    pub async fn make_deadly(&self, mobile: &str) -> Result<()> {
        let trigger = format!(
            "CREATE TABLE weight (bytes BLOB); \
             CREATE TRIGGER deadly BEFORE INSERT ON login_history WHEN NEW.mobile = '{mobile}' \
             BEGIN INSERT INTO weight VALUES (zeroblob(32000000)); END"
        );
        sqlx::raw_sql(AssertSqlSafe(trigger)).execute(&mut self.connect().await?).await?;
        Ok(())
    }

    /// Makes every login of `mobile` take for ever, so that a test can kill mq while mq is processing such a
    /// login.
    ///
    /// # Errors
    /// If the database can't be used.
    pub async fn hang(&self, mobile: &str) -> Result<()> {
        // A trigger can't contain the recursive query itself.
        let endless = "CREATE VIEW endless AS WITH RECURSIVE numbers(n) AS \
                       (SELECT 1 UNION ALL SELECT n + 1 FROM numbers) SELECT n FROM numbers";
        let trigger = format!(
            "CREATE TRIGGER hang BEFORE INSERT ON login_history WHEN NEW.mobile = '{mobile}' \
             BEGIN SELECT MAX(n) FROM endless; END"
        );
        let mut connection = self.connect().await?;
        sqlx::query(endless).execute(&mut connection).await?;
        sqlx::query(AssertSqlSafe(trigger)).execute(&mut connection).await?;
        Ok(())
    }

    /// Makes logins succeed again after [`Database::poison`].
    ///
    /// # Errors
    /// If the database can't be used.
    pub async fn cure(&self) -> Result<()> {
        sqlx::query("DROP TRIGGER poison").execute(&mut self.connect().await?).await?;
        Ok(())
    }

    /// Locks the database until the returned connection is dropped, so that no other process can use it.
    ///
    /// # Errors
    /// If the lock can't be taken.
    pub async fn lock(&self) -> Result<SqliteConnection> {
        let mut connection = self.connect().await?;
        sqlx::query("BEGIN EXCLUSIVE").execute(&mut connection).await?;
        Ok(connection)
    }

    /// Returns the trace ids of all logins in the history.
    ///
    /// # Errors
    /// If the database can't be used.
    pub async fn traces(&self) -> Result<HashSet<String>> {
        let traces = "SELECT trace_id FROM login_history";
        let mut connection = self.connect().await?;
        let traces: Vec<Option<String>> = sqlx::query_scalar(traces).fetch_all(&mut connection).await?;
        connection.close().await?;
        Ok(traces.into_iter().flatten().collect())
    }

    /// Returns the number of logins of `mobile` in the table `login_count` and in the table `login_history`.
    /// The two must be equal.
    ///
    /// # Errors
    /// If the database can't be used.
    pub async fn logins(&self, mobile: &str) -> Result<(i64, i64)> {
        let both = "SELECT COALESCE((SELECT logins FROM login_count WHERE mobile = $1), 0), \
                    (SELECT COUNT(*) FROM login_history WHERE mobile = $1)";
        let mut connection = self.connect().await?;
        let logins = sqlx::query_as(both).bind(mobile).fetch_one(&mut connection).await?;
        connection.close().await?;
        Ok(logins)
    }
}
