//! The connection to the database, and every statement. The statements run on SQLite, and also on PostgreSQL.

use anyhow::{Context, ensure};
use proto::login::MobileNumber;
use sha2::{Digest, Sha256};
use sqlx::{
    ConnectOptions, Connection, QueryBuilder, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, DirBuilder, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use uuid::{Builder, Uuid};

const TABLES: [&str; 4] = [
    "CREATE TABLE IF NOT EXISTS login_history (
        message_id TEXT PRIMARY KEY,
        trace_id TEXT,
        mobile TEXT NOT NULL,
        applied_at BIGINT NOT NULL -- milliseconds since 1970
    )",
    "CREATE TABLE IF NOT EXISTS login_count (mobile TEXT PRIMARY KEY, logins BIGINT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS redelivery_count (message_id TEXT PRIMARY KEY, redeliveries BIGINT NOT NULL)",
    // This table has one row.
    "CREATE TABLE IF NOT EXISTS history (one BIGINT PRIMARY KEY CHECK (one = 1), secret TEXT NOT NULL)",
];

/// How long another process may hold the database before it counts as unavailable.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);

/// A login to record.
#[derive(Debug, Clone)]
pub struct Login {
    /// The id of the message, which is the same for every delivery of the same login.
    pub message_id: String,
    /// The trace in which the login happened, as 32 hex digits.
    pub trace_id: Option<String>,
    /// Who logged in.
    pub mobile: MobileNumber,
    /// The number of this attempt, counted from 1.
    pub attempt: u32,
}

/// The database refuses one login, because its content violates one of the database's constraints. Other
/// logins are not affected.
// It does not hold the database's own text, because that may quote the row.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the database refuses the data of this message (code {code})")]
pub struct Refused {
    /// The database's code: SQLite's extended result code, or an SQLSTATE.
    pub code: String,
}

/// A random number that is kept in the history. It is different in each history.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Secret(Uuid);

impl Secret {
    /// Derives an id from these parts. The id is the same for every process that uses this history. Without
    /// the secret, nobody can find the parts of an id, not even by trying all mobile numbers.
    pub fn id_of(self, parts: &[&[u8]]) -> String {
        let mut hash = Sha256::new_with_prefix(self.0);
        for part in parts {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        let mut id = [0; 16];
        id.copy_from_slice(&hash.finalize()[..16]);
        Builder::from_custom_bytes(id).into_uuid().to_string()
    }
}

/// A change to be committed.
pub enum Change {
    /// A login takes effect. The result is 1, or 0 if the login had taken effect before.
    Apply(Login),
    /// A message is marked as redelivered, unless redeliveries of it are already counted. The result is how
    /// many redeliveries were counted before.
    MarkRedelivery(String),
    /// One more redelivery of a message is counted. The result is how many redeliveries are counted now.
    CountRedelivery(String),
    /// The count of a message's redeliveries is deleted. The result is how many counts were deleted.
    ForgetRedeliveries(String),
}

/// The database, opened when it is needed.
pub struct Database {
    options: SqliteConnectOptions,
    connection: Option<(SqliteConnection, Files)>,
    /// The history's secret, which is known once the database has been opened.
    secret: Option<Secret>,
}

/// Reads `sqlite://path`.
///
/// # Errors
/// If the URL can't be used. The error says what is expected, and does not quote the URL, because the URL of
/// another database may hold a password.
pub fn parse_url(url: &str) -> Result<SqliteConnectOptions, &'static str> {
    let expected = "expected sqlite://path/to/file.db";
    let path = url.strip_prefix("sqlite://").ok_or(expected)?;
    // Data in memory would not survive the process.
    if path.is_empty() || path.starts_with('?') || url.contains(":memory:") || url.contains("mode=memory") {
        return Err(expected);
    }
    let options: SqliteConnectOptions = url.parse().map_err(|_| expected)?;
    Ok(options
        .create_if_missing(false)
        .journal_mode(SqliteJournalMode::Wal)
        // With NORMAL in WAL mode, a loss of power could undo a commit after its message was acknowledged.
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT)
        // While the database is slow, a line for each statement would flood the log.
        .disable_statement_logging())
}

impl Database {
    /// Makes a database that is not open yet.
    pub fn new(options: SqliteConnectOptions) -> Self {
        Self { options, connection: None, secret: None }
    }

    /// Returns the secret of this history, if the database was ever open.
    pub fn secret(&self) -> Option<Secret> {
        self.secret
    }

    /// Commits all changes in one transaction, except those that the database refuses because of their
    /// content.
    ///
    /// # Errors
    /// If the database can't be used now. Then no change was made, unless the database failed during the
    /// commit itself. In that case, all changes may have been made. That does no harm, because a login that
    /// is applied again is a duplicate.
    pub async fn commit(&mut self, changes: &[Change]) -> anyhow::Result<Vec<Result<i64, Refused>>> {
        // Take the connection, so that it is not used again if it fails.
        let (mut connection, files) = match self.connection.take() {
            Some(open) => open,
            None => self.open().await?,
        };
        let answers = commit(&mut connection, changes).await.context("committing to the database")?;
        // SQLite goes on writing to its file even after the file was deleted.
        ensure!(files == Files::of(&self.options), "the database's file was deleted or replaced");
        self.connection = Some((connection, files));
        Ok(answers)
    }

    async fn open(&mut self) -> anyhow::Result<(SqliteConnection, Files)> {
        let file = self.options.get_filename();
        let opening = || format!("opening {}", file.display());
        // The file is made only at the first opening. If it is missing later, it was deleted, and an empty
        // history must not take its place.
        if self.secret.is_none() {
            make(file).with_context(opening)?;
        }
        let mut connection = self.options.connect().await.with_context(opening)?;
        for table in TABLES {
            sqlx::query(table).execute(&mut connection).await.with_context(opening)?;
        }
        let secret = secret(&mut connection).await.with_context(opening)?;
        ensure!(*self.secret.get_or_insert(secret) == secret, "{} holds another history", file.display());
        Ok((connection, Files::of(&self.options)))
    }
}

/// Makes the file and its folder, if they are missing. Other users may not read who logged in when. SQLite
/// gives the same mode to the files that it makes next to the database.
fn make(file: &Path) -> io::Result<()> {
    if let Some(directory) = file.parent().filter(|directory| *directory != Path::new("")) {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    OpenOptions::new().append(true).create(true).mode(0o600).open(file).map(drop)
}

/// The device and inode of the database and of its write-ahead log. They distinguish a file from another file
/// that has the same name later.
#[derive(PartialEq, Eq)]
struct Files([Option<(u64, u64)>; 2]);

impl Files {
    fn of(options: &SqliteConnectOptions) -> Self {
        let mut log = options.get_filename().as_os_str().to_owned();
        log.push("-wal");
        let number = |path: &Path| fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
        Self([number(options.get_filename()), number(log.as_ref())])
    }
}

/// Returns the history's secret, which is made when the database is opened for the first time.
async fn secret(connection: &mut SqliteConnection) -> anyhow::Result<Secret> {
    let make = "INSERT INTO history (one, secret) VALUES (1, $1) ON CONFLICT DO NOTHING";
    sqlx::query(make).bind(Uuid::new_v4().to_string()).execute(&mut *connection).await?;
    let secret: String = sqlx::query_scalar("SELECT secret FROM history").fetch_one(connection).await?;
    Ok(Secret(secret.parse()?))
}

async fn commit(
    connection: &mut SqliteConnection,
    changes: &[Change],
) -> sqlx::Result<Vec<Result<i64, Refused>>> {
    let mut transaction = connection.begin().await?;
    match apply(&mut transaction, changes).await {
        Ok(answers) => {
            transaction.commit().await?;
            Ok(answers.into_iter().map(Ok).collect())
        }
        // Savepoints are used only after a refusal, because refusals are rare.
        Err(error) if code_of_refusal(&error).is_some() => {
            transaction.rollback().await?;
            commit_but_refused(connection, changes).await
        }
        Err(error) => Err(error),
    }
}

/// Commits with a savepoint for each change, so that a refused change rolls back only itself.
async fn commit_but_refused(
    connection: &mut SqliteConnection,
    changes: &[Change],
) -> sqlx::Result<Vec<Result<i64, Refused>>> {
    let mut answers = Vec::with_capacity(changes.len());
    let mut transaction = connection.begin().await?;
    for change in changes {
        let mut savepoint = transaction.begin().await?;
        match apply(&mut savepoint, std::slice::from_ref(change)).await {
            Ok(answer) => {
                savepoint.commit().await?;
                answers.extend(answer.into_iter().map(Ok));
            }
            Err(error) => {
                let code = code_of_refusal(&error).ok_or(error)?;
                savepoint.rollback().await?;
                answers.push(Err(Refused { code }));
            }
        }
    }
    transaction.commit().await?;
    Ok(answers)
}

/// Makes these changes. Returns the result of each change.
async fn apply(connection: &mut SqliteConnection, changes: &[Change]) -> sqlx::Result<Vec<i64>> {
    let logins = changes.iter().filter_map(|change| match change {
        Change::Apply(login) => Some(login),
        _ => None,
    });
    let logins: Vec<_> = logins.collect();
    let mut recorded = if logins.is_empty() { HashSet::new() } else { record(connection, &logins).await? };
    let mut answers = Vec::with_capacity(changes.len());
    for change in changes {
        answers.push(match change {
            // If a login is in `changes` twice, it was recorded only once, for its first change.
            Change::Apply(login) => recorded.remove(&login.message_id).into(),
            Change::MarkRedelivery(message_id) => mark_redelivery(connection, message_id).await?,
            Change::CountRedelivery(message_id) => {
                let count = "INSERT INTO redelivery_count (message_id, redeliveries) VALUES ($1, 1) \
                             ON CONFLICT (message_id) DO UPDATE SET redeliveries = redelivery_count.redeliveries + 1 \
                             RETURNING redeliveries";
                sqlx::query_scalar(count).bind(message_id).fetch_one(&mut *connection).await?
            }
            Change::ForgetRedeliveries(message_id) => {
                let forget = "DELETE FROM redelivery_count WHERE message_id = $1";
                let forgotten = sqlx::query(forget).bind(message_id).execute(&mut *connection).await?;
                forgotten.rows_affected().cast_signed()
            }
        });
    }
    Ok(answers)
}

async fn mark_redelivery(connection: &mut SqliteConnection, message_id: &str) -> sqlx::Result<i64> {
    let mark =
        "INSERT INTO redelivery_count (message_id, redeliveries) VALUES ($1, 1) ON CONFLICT DO NOTHING";
    let marked = sqlx::query(mark).bind(message_id).execute(&mut *connection).await?;
    if marked.rows_affected() == 1 {
        return Ok(0);
    }
    let counted = "SELECT redeliveries FROM redelivery_count WHERE message_id = $1";
    sqlx::query_scalar(counted).bind(message_id).fetch_one(connection).await
}

/// Records logins, and counts those that were not recorded before. Either both happen or neither. Returns the
/// message ids of the logins that were not recorded before. All logins share two statements, because each
/// statement needs a round trip to the thread that runs SQLite, which costs more than the statement itself.
async fn record(connection: &mut SqliteConnection, logins: &[&Login]) -> sqlx::Result<HashSet<String>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = i64::try_from(now.as_millis()).unwrap_or(i64::MAX);
    let mut record =
        QueryBuilder::new("INSERT INTO login_history (message_id, trace_id, mobile, applied_at) ");
    record.push_values(logins, |mut row, login| {
        row.push_bind(&login.message_id).push_bind(&login.trace_id);
        row.push_bind(login.mobile.as_str()).push_bind(now);
    });
    record.push(" ON CONFLICT DO NOTHING RETURNING message_id, mobile");
    let recorded: Vec<(String, String)> = record.build_query_as().fetch_all(&mut *connection).await?;
    let mut counts = BTreeMap::<_, i64>::new();
    for (_, mobile) in &recorded {
        *counts.entry(mobile).or_default() += 1;
    }
    if !counts.is_empty() {
        let mut count = QueryBuilder::new("INSERT INTO login_count (mobile, logins) ");
        count.push_values(&counts, |mut row, (mobile, logins)| {
            row.push_bind(mobile).push_bind(logins);
        });
        count.push(" ON CONFLICT (mobile) DO UPDATE SET logins = login_count.logins + excluded.logins");
        count.build().execute(connection).await?;
    }
    Ok(recorded.into_iter().map(|(message_id, _)| message_id).collect())
}

/// Returns the code of an error that is due to the content of a row, and not to the state of the database.
fn code_of_refusal(error: &sqlx::Error) -> Option<String> {
    /// SQLite's primary result codes (the low byte of the extended ones): TOOBIG, CONSTRAINT, MISMATCH.
    const OF_THE_ROW: [i32; 3] = [18, 19, 20];

    let code = error.as_database_error()?.code()?;
    let primary = code.parse::<i32>().ok()? & 0xff;
    OF_THE_ROW.contains(&primary).then(|| code.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    #[test]
    fn an_id_is_the_same_for_the_same_parts_of_the_same_history_only() {
        let secret = Secret(Uuid::new_v4());
        let id = secret.id_of(&[b"ab", b"c"]);
        assert_eq!(id, secret.id_of(&[b"ab", b"c"]));
        assert_ne!(id, secret.id_of(&[b"a", b"bc"]));
        assert_ne!(id, Secret(Uuid::new_v4()).id_of(&[b"ab", b"c"]));
    }

    #[test]
    fn only_a_database_in_a_file_is_taken() {
        for url in
            ["mq.db", "sqlite://", "sqlite://?cache=shared", "sqlite://:memory:", "sqlite://a?mode=memory"]
        {
            assert!(parse_url(url).is_err(), "{url}");
        }
        assert_eq!(parse_url("sqlite://a/b.db").unwrap().get_filename(), Path::new("a/b.db"));
    }

    #[tokio::test]
    async fn a_login_that_is_twice_in_a_group_counts_once_and_a_refused_one_leaves_the_others() {
        let directory = TempDir::new().unwrap();
        let url = format!("sqlite://{}/mq.db", directory.path().display());
        let mut database = Database::new(parse_url(&url).unwrap());
        let apply = |message_id: &str, mobile: &str| {
            let mobile = mobile.to_owned().try_into().unwrap();
            Change::Apply(Login { message_id: message_id.to_owned(), trace_id: None, mobile, attempt: 1 })
        };
        let (one, other) = ("13800138000", "13900139000");
        let group = [
            apply("a", one),
            Change::CountRedelivery("a".to_owned()),
            apply("b", one),
            apply("a", other),
            apply("c", other),
        ];
        assert_eq!(database.commit(&group).await.unwrap(), [1, 1, 1, 0, 1].map(Ok));

        let (connection, _) = database.connection.as_mut().unwrap();
        let refuse = "CREATE TRIGGER refuse BEFORE INSERT ON login_history WHEN NEW.message_id = 'd' \
                      BEGIN SELECT RAISE(ABORT, 'no'); END";
        sqlx::query(refuse).execute(connection).await.unwrap();
        let answers = database.commit(&[apply("c", one), apply("d", one), apply("e", one)]).await.unwrap();
        assert!(matches!(answers[..], [Ok(0), Err(_), Ok(1)]), "{answers:?}");
        let (connection, _) = database.connection.as_mut().unwrap();
        let counts = "SELECT mobile, logins FROM login_count ORDER BY mobile";
        let counts: Vec<(String, i64)> = sqlx::query_as(counts).fetch_all(connection).await.unwrap();
        assert_eq!(counts, [(one.to_owned(), 3), (other.to_owned(), 1)]);
    }
}
