//! The control, which does the work of api and mq as the Go original does it. Its api opens a connection to the
//! broker for each login, uses no confirms, and answers 200 whatever happens. Its mq acknowledges a message on
//! receipt, processes it afterwards, and only logs failures. The test must find that the control loses logins;
//! otherwise the test would prove nothing about the services.
//!
//! The control doesn't replace usercenter, because usercenter plays no part in the loss of logins.

use amqp::{QueueType, Server, Topology, connection};
use anyhow::{Context, Result};
use axum::{Json, Router, extract::State, http::HeaderMap, routing::post};
use clap::Subcommand;
use futures_util::StreamExt;
use lapin::{
    BasicProperties, Consumer,
    options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions},
    types::{AMQPValue, FieldTable},
};
use proto::{
    login::LoginMessage,
    topology::{EXCHANGE, QUEUE, ROUTING_KEY},
};
use serde_json::{Value, json};
use sqlx::{
    ConnectOptions, Connection, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode},
};
use std::{env, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::TcpListener,
    time::{sleep, timeout},
};
use uuid::Uuid;

/// Which service the control replaces.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum Service {
    /// api, which answers logins.
    Api,
    /// mq, which processes logins.
    Mq,
}

/// Runs the control in place of a service, until the control is killed.
///
/// # Errors
/// If the control can't start.
pub async fn run(service: Service) -> Result<()> {
    let url = env::var("AMQP_URL")?;
    let server = connection::parse_url(&url).map_err(anyhow::Error::msg)?;
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    say(&format!("listening address={}", listener.local_addr()?));
    match service {
        Service::Api => {
            say("connected to the broker");
            let routes =
                Router::new().route("/usercenter/v1/user/login", post(log_in)).with_state(Arc::new(server));
            Ok(axum::serve(listener, routes).await?)
        }
        Service::Mq => consume(&server).await,
    }
}

async fn log_in(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    Json(login): Json<Value>,
) -> Json<Value> {
    if let Err(error) = publish(&server, &headers, &login).await {
        say(&format!("publishing: {error:#}"));
    }
    Json(json!({ "accessToken": "", "accessExpire": 0, "refreshAfter": 0 }))
}

async fn publish(server: &Server, headers: &HeaderMap, login: &Value) -> Result<()> {
    let connection = connection::connect(server, "control api").await?;
    let channel = connection.create_channel().await?;
    let Topology { exchange, routing_key, .. } =
        Topology::new("", EXCHANGE, ROUTING_KEY, QUEUE, QueueType::Quorum);
    let traceparent = headers.get("traceparent").context("no traceparent")?.to_str()?;
    let mut table = FieldTable::default();
    table.insert("traceparent".into(), AMQPValue::LongString(traceparent.into()));
    let properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_message_id(Uuid::new_v4().to_string().into())
        .with_headers(table);
    let body = json!({ "Carrier": {}, "Msg": login["mobile"] }).to_string();
    channel
        .basic_publish(
            exchange.into(),
            routing_key.into(),
            BasicPublishOptions::default(),
            body.as_bytes(),
            properties,
        )
        .await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn consume(server: &Server) -> Result<()> {
    let mut database = open_database().await?;
    loop {
        if let Err(error) = consume_until_it_breaks(server, &mut database).await {
            say(&format!("consuming: {error:#}"));
        }
        sleep(Duration::from_millis(200)).await;
    }
}

async fn consume_until_it_breaks(server: &Server, database: &mut SqliteConnection) -> Result<()> {
    // Without the time-out, opening a connection may wait for ever if the connection breaks at a bad moment.
    let (_connection, mut deliveries) = timeout(Duration::from_secs(5), open(server)).await??;
    say("consuming");
    while let Some(delivery) = deliveries.next().await {
        let delivery = delivery?;
        // Without the time-out, lapin may never answer if the connection is lost at this moment.
        timeout(Duration::from_secs(5), delivery.ack(BasicAckOptions::default())).await??;
        if let Err(error) = process(&delivery, database).await {
            say(&format!("processing: {error:#}"));
        }
    }
    Ok(())
}

async fn open(server: &Server) -> Result<(lapin::Connection, Consumer)> {
    let connection = connection::connect(server, "control mq").await?;
    let channel = connection.create_channel().await?;
    channel.basic_qos(64, BasicQosOptions::default()).await?;
    let topology = Topology::new("", EXCHANGE, ROUTING_KEY, QUEUE, QueueType::Quorum);
    topology.declare(&channel, &[]).await?;
    topology.bind(&channel).await?;
    let (queue, tag) = (topology.queue.as_str().into(), "mq".into());
    let consumer =
        channel.basic_consume(queue, tag, BasicConsumeOptions::default(), FieldTable::default()).await?;
    Ok((connection, consumer))
}

async fn process(delivery: &lapin::message::Delivery, database: &mut SqliteConnection) -> Result<()> {
    let (_, mobile) = LoginMessage::from_json(&delivery.data);
    let mobile = mobile?;
    let message_id = delivery.properties.message_id().as_ref().context("no message id")?.as_str().to_owned();
    let headers = delivery.properties.headers().as_ref().context("no headers")?;
    let trace = match headers.inner().get("traceparent") {
        Some(AMQPValue::LongString(traceparent)) => {
            traceparent.to_string().split('-').nth(1).map(str::to_owned).context("no trace id")?
        }
        _ => anyhow::bail!("no traceparent"),
    };
    let mut transaction = database.begin().await?;
    sqlx::query(
        "INSERT INTO login_history (message_id, trace_id, mobile, applied_at) VALUES ($1, $2, $3, 0)",
    )
    .bind(message_id)
    .bind(trace)
    .bind(mobile.as_str())
    .execute(&mut *transaction)
    .await?;
    sqlx::query(
        "INSERT INTO login_count (mobile, logins) VALUES ($1, 1) \
         ON CONFLICT (mobile) DO UPDATE SET logins = login_count.logins + 1",
    )
    .bind(mobile.as_str())
    .execute(&mut *transaction)
    .await?;
    Ok(transaction.commit().await?)
}

/// Creates the database that mq would have created.
async fn open_database() -> Result<SqliteConnection> {
    let options: SqliteConnectOptions = env::var("MQ_DATABASE_URL")?.parse()?;
    let options = options.create_if_missing(true).journal_mode(SqliteJournalMode::Wal);
    let mut database = options.busy_timeout(Duration::from_secs(10)).connect().await?;
    for table in [
        "CREATE TABLE IF NOT EXISTS login_history \
         (message_id TEXT PRIMARY KEY, trace_id TEXT, mobile TEXT NOT NULL, applied_at BIGINT NOT NULL)",
        "CREATE TABLE IF NOT EXISTS login_count (mobile TEXT PRIMARY KEY, logins BIGINT NOT NULL)",
    ] {
        sqlx::query(table).execute(&mut database).await?;
    }
    Ok(database)
}

#[expect(clippy::print_stderr, reason = "the control has no telemetry, and so no log")]
fn say(text: &str) {
    eprintln!("{text}");
}
