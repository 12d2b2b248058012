//! mq's database, as a test looks into it and spoils it: there is no hook for that in mq itself.

use anyhow::Result;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, SqliteConnection, sqlite::SqliteConnectOptions};
use tempfile::TempDir;

/// A database that outlives the mq that uses it.
pub struct Database {
    /// For `MQ_DATABASE_URL`.
    pub url: String,
    directory: TempDir,
}

impl Database {
    /// A place for one. mq makes it.
    ///
    /// # Errors
    /// If there is no room.
    pub fn new() -> Result<Self> {
        let directory = TempDir::new()?;
        // Its folder is not there either.
        let url = format!("sqlite://{}", directory.path().join("data/mq.db").display());
        Ok(Self { url, directory })
    }

    /// A connection of the test's own.
    ///
    /// # Errors
    /// If mq has not made the database yet.
    pub async fn connect(&self) -> Result<SqliteConnection> {
        let file = self.directory.path().join("data/mq.db");
        Ok(SqliteConnectOptions::new().filename(file).connect().await?)
    }

    /// Makes every login of `mobile` fail, with an error text that names it.
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

    /// Makes logins succeed again.
    ///
    /// # Errors
    /// If the database can't be used.
    pub async fn cure(&self) -> Result<()> {
        sqlx::query("DROP TRIGGER poison").execute(&mut self.connect().await?).await?;
        Ok(())
    }

    /// Holds the database for this process alone until the connection is dropped.
    ///
    /// # Errors
    /// If it can't be had.
    pub async fn lock(&self) -> Result<SqliteConnection> {
        let mut connection = self.connect().await?;
        sqlx::query("BEGIN EXCLUSIVE").execute(&mut connection).await?;
        Ok(connection)
    }

    /// How often `mobile` has logged in, by the count and by the history, which must be the same.
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
