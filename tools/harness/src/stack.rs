//! The three services together, with a broker and a receiver, as the end-to-end tests use them.

use crate::{
    PATIENCE,
    certificates::Files,
    client::{Answer, Client},
    database::Database,
    go_zero, poll,
    process::Process,
    proxy::Proxy,
    receiver::Receiver,
    tls_front::TlsFront,
};
use amqp::{QueueType, Topology};
use anyhow::{Context, Result};
use broker::Broker;
use http::Method;
use lapin::{
    BasicProperties, Channel, Connection,
    message::BasicGetMessage,
    options::{BasicGetOptions, BasicPublishOptions, ExchangeDeleteOptions, QueueDeleteOptions},
};
use proto::topology::{DEFAULT_RETRY_DELAYS, EXCHANGE, QUEUE, ROUTING_KEY};
use std::{
    env,
    net::{SocketAddr, ToSocketAddrs},
    time::Duration,
};
use tokio::{runtime::Runtime, try_join};
use uuid::Uuid;

/// The trace of a login, as the contract specifies it.
pub const LOGIN_TREE: &str = "
    api POST /usercenter/v1/user/login SERVER
      api usercenter.v1.Usercenter/GetUserByMobile CLIENT
        usercenter usercenter.v1.Usercenter/GetUserByMobile SERVER
      api local INTERNAL
      api send_msg_mq PRODUCER
        mq mq_consumer_msg CONSUMER
";

/// The mobile number of a user whom usercenter knows.
pub const KNOWN_MOBILE: &str = "13800138000";

/// The running services, their broker and their receiver.
pub struct Stack {
    /// The HTTP service.
    pub api: Process,
    /// The gRPC service.
    pub rpc: Process,
    /// The consumer.
    pub mq: Process,
    /// The receiver of the spans.
    pub receiver: Receiver,
    /// The broker, with a connection for the test.
    pub broker: TestBroker,
    /// The client for HTTP requests.
    pub client: Client,
}

/// The variables that a test sets. Each has the name of its service (or `*` for all services), its own name
/// and its value.
pub type Variables<'a> = &'a [(&'a str, &'a str, &'a str)];

impl Stack {
    /// Starts all parts, each service on a free port. The names of the queues and exchanges are used by no
    /// other test.
    ///
    /// # Errors
    /// If a part doesn't start.
    pub async fn start(variables: Variables<'_>) -> Result<Self> {
        Self::start_on(TestBroker::connect().await?, variables).await
    }

    /// Starts the services and the receiver, with this broker.
    ///
    /// # Errors
    /// If a part doesn't start.
    pub async fn start_on(broker: TestBroker, variables: Variables<'_>) -> Result<Self> {
        Self::start_mixed(broker, &[], variables).await
    }

    /// Starts the services and the receiver as [`Stack::start_on`] does. The services named in `in_go` are
    /// those in Go ([`go_zero`]).
    ///
    /// # Errors
    /// If a part doesn't start.
    pub async fn start_mixed(
        mut broker: TestBroker,
        in_go: &[&str],
        variables: Variables<'_>,
    ) -> Result<Self> {
        let receiver = Receiver::start().await?;
        if let Some((.., list)) = variables.iter().find(|(_, name, _)| *name == "MQ_RETRY_DELAYS") {
            broker.retry_delays = delays(list);
        }
        let mut settings = Settings::new(&broker, &receiver, variables);

        let start = async |name, variables: &[(&str, &str)]| match in_go.contains(&name) {
            true => go_zero::start(name, variables).await,
            false => Process::start(name, variables).await,
        };
        let rpc = start("rpc", &settings.of("rpc")).await?;
        let has_tls = variables.iter().any(|(_, name, _)| *name == "USERCENTER_TLS_CERTIFICATE");
        settings.usercenter_url = format!("{}://{}", if has_tls { "https" } else { "http" }, rpc.address);
        let (for_api, for_mq) = (settings.of("api"), settings.of("mq"));
        let (api, mq) = try_join!(start("api", &for_api), start("mq", &for_mq))?;
        if !in_go.contains(&"api") {
            api.said("connected to the broker").await?;
        }
        if !in_go.contains(&"mq") {
            try_join!(mq.said("consuming"), mq.said("the database is available"))?;
        }
        Ok(Self { api, rpc, mq, receiver, broker, client: Client::new() })
    }

    /// Starts all parts as [`Stack::start`] does, with a proxy between api and the broker.
    ///
    /// # Errors
    /// If a part doesn't start.
    pub async fn start_with_proxy(variables: Variables<'_>) -> Result<(Self, Proxy)> {
        let broker = TestBroker::connect().await?;
        let (proxy, url) = broker.proxy()?;
        let variables = [&[("api", "AMQP_URL", url.as_str())], variables].concat();
        Ok((Self::start_on(broker, &variables).await?, proxy))
    }

    /// Starts another instance of a service.
    ///
    /// # Errors
    /// If the instance doesn't start.
    pub async fn another(&self, name: &'static str, variables: &[(&str, &str)]) -> Result<Process> {
        self.another_by("exec \"$0\"", name, variables).await
    }

    /// Starts another instance of a service, through a shell that runs this script. In the script, `$0` is
    /// the service's binary.
    ///
    /// # Errors
    /// If the instance doesn't start.
    pub async fn another_by(
        &self,
        script: &str,
        name: &'static str,
        variables: &[(&str, &str)],
    ) -> Result<Process> {
        let mut settings = Settings::new(&self.broker, &self.receiver, &[]);
        settings.usercenter_url = format!("http://{}", self.rpc.address);
        Process::start_by(script, name, &[settings.of(name).as_slice(), variables].concat()).await
    }

    /// Returns the URL of the login.
    pub fn login_url(&self) -> String {
        format!("http://{}/usercenter/v1/user/login", self.api.address)
    }

    /// Logs in.
    ///
    /// # Errors
    /// If there is no response.
    pub async fn login(&self, mobile: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        let body = serde_json::json!({ "mobile": mobile }).to_string();
        self.post(&body, headers).await
    }

    /// Posts this body to the URL of the login, with the content type of JSON.
    ///
    /// # Errors
    /// If there is no response.
    pub async fn post(&self, body: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        let headers = [&[("content-type", "application/json")], headers].concat();
        self.client.send(Method::POST, &self.login_url(), &headers, body.to_owned()).await
    }

    /// Publishes a message of any content, with the exchange and routing key that `api` uses.
    ///
    /// # Errors
    /// If the broker refuses the message.
    pub async fn publish(&self, properties: BasicProperties, body: &[u8]) -> Result<()> {
        let Topology { exchange, routing_key, .. } = &self.broker.topology;
        let options = BasicPublishOptions::default();
        let (exchange, key) = (exchange.as_str().into(), routing_key.as_str().into());
        self.broker.channel.basic_publish(exchange, key, options, body, properties).await?.await?;
        Ok(())
    }

    /// Waits for the next dead letter and takes it out of its queue.
    ///
    /// # Errors
    /// If no dead letter comes in time.
    pub async fn dead_letter(&self) -> Result<BasicGetMessage> {
        let queue = self.broker.topology.dead_letter_queue.as_str();
        let get = async || {
            let options = BasicGetOptions { no_ack: true };
            self.broker.channel.basic_get(queue.into(), options).await.ok().flatten()
        };
        poll(PATIENCE, get).await.context("no dead letter")
    }

    /// Stops the services in the order in which a request passes through them, so that all spans are sent.
    ///
    /// # Errors
    /// If a service doesn't end, or fails.
    pub async fn stop(&mut self) -> Result<()> {
        for service in [&mut self.api, &mut self.rpc, &mut self.mq] {
            let exit = service.stop().await?;
            anyhow::ensure!(exit.success(), "{} ended with {exit}:\n{}", service.name, service.output());
        }
        Ok(())
    }
}

fn delays(list: &str) -> Vec<Duration> {
    list.split(',').filter_map(|delay| humantime::parse_duration(delay).ok()).collect()
}

/// Long deadlines, which don't expire even on a busy machine with a stalled disk. Tests of deadlines set other
/// values.
pub const PATIENT: [(&str, &str); 4] = [
    ("API_DEADLINE", "50s"),
    ("USERCENTER_TIMEOUT", "30s"),
    ("USERCENTER_DEADLINE", "40s"),
    ("PUBLISH_TIMEOUT", "15s"),
];

/// The variables of the services.
struct Settings<'a> {
    amqp_url: String,
    amqp_prefix: String,
    database_url: String,
    otlp_endpoint: String,
    usercenter_url: String,
    variables: Variables<'a>,
}

impl<'a> Settings<'a> {
    fn new(broker: &TestBroker, receiver: &Receiver, variables: Variables<'a>) -> Self {
        Self {
            amqp_url: broker.url.clone(),
            amqp_prefix: broker.prefix.clone(),
            database_url: broker.database.url.clone(),
            otlp_endpoint: format!("http://{}", receiver.grpc),
            usercenter_url: String::new(),
            variables,
        }
    }

    fn of(&self, service: &str) -> Vec<(&str, &str)> {
        let mut variables = vec![
            ("AMQP_URL", self.amqp_url.as_str()),
            ("AMQP_PREFIX", &self.amqp_prefix),
            ("MQ_DATABASE_URL", &self.database_url),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &self.otlp_endpoint),
            ("OTEL_BSP_SCHEDULE_DELAY", "20"),
            ("USERCENTER_URL", &self.usercenter_url),
        ];
        variables.extend(PATIENT);
        let changes = self.variables.iter().filter(|(of, ..)| *of == service || *of == "*");
        variables.extend(changes.map(|(_, name, value)| (*name, *value)));
        variables
    }
}

/// The broker of a test. If `AMQP_URL` is set, all tests share the broker at that URL. Each test then gives its
/// queues and exchanges names with a prefix, and deletes them at the end. Otherwise the test has an embedded
/// broker for itself, which ends with the test.
pub struct TestBroker {
    /// The broker's URL.
    pub url: String,
    /// The prefix of this test's names.
    pub prefix: String,
    /// The names with that prefix.
    pub topology: Topology,
    /// The retry delays that mq is configured with. Each delay has a queue, which must be deleted.
    pub retry_delays: Vec<Duration>,
    /// A channel for the test.
    pub channel: Channel,
    /// The database that all instances of mq share, unless the test names another database. The queue belongs
    /// to this database.
    pub database: Database,
    connection: Connection,
    embedded: Option<Broker>,
}

impl TestBroker {
    /// Connects to the broker at `AMQP_URL`, or starts an embedded broker. Makes up a prefix for this test.
    ///
    /// # Errors
    /// If there is no broker at `AMQP_URL`.
    pub async fn connect() -> Result<Self> {
        match env::var("AMQP_URL") {
            Ok(url) => Self::at(url).await,
            Err(_) => Self::embedded().await,
        }
    }

    /// Starts an embedded broker, whatever `AMQP_URL` says.
    ///
    /// # Errors
    /// If the broker can't be started.
    pub async fn embedded() -> Result<Self> {
        let broker = Broker::start().await?;
        Self::connect_to(broker.url(), Some(broker)).await
    }

    /// Connects to RabbitMQ, at `AMQP_URL` or on localhost.
    ///
    /// # Errors
    /// If there is no broker at that URL.
    pub async fn rabbitmq() -> Result<Self> {
        let url = env::var("AMQP_URL").unwrap_or_else(|_| amqp::connection::DEFAULT_URL.to_owned());
        Self::at(url).await.context("start RabbitMQ here, or set AMQP_URL to the URL of a RabbitMQ")
    }

    /// Connects to the broker at `url`.
    ///
    /// # Errors
    /// If there is no broker at that URL.
    pub async fn at(url: String) -> Result<Self> {
        Self::connect_to(url, None).await
    }

    async fn connect_to(url: String, embedded: Option<Broker>) -> Result<Self> {
        let server = amqp::connection::parse_url(&url).map_err(anyhow::Error::msg)?;
        let connection = amqp::connection::connect(&server, "test").await?;
        let channel = connection.create_channel().await?;
        let prefix = format!("test.{}.", Uuid::new_v4().simple());
        let topology = Topology::new(&prefix, EXCHANGE, ROUTING_KEY, QUEUE, QueueType::Quorum);
        topology.declare(&channel, &[]).await?;
        topology.bind(&channel).await?;
        let retry_delays = delays(DEFAULT_RETRY_DELAYS);
        let database = Database::new()?;
        Ok(Self { url, prefix, topology, retry_delays, channel, database, connection, embedded })
    }

    /// Starts a proxy in front of the broker. Returns the proxy, and the URL by which clients connect through
    /// it.
    ///
    /// # Errors
    /// If no port is free, or if the broker's host name does not resolve.
    pub fn proxy(&self) -> Result<(Proxy, String)> {
        self.proxy_by(Proxy::start)
    }

    /// Starts a proxy as [`TestBroker::proxy`] does, but one that knows AMQP and can withhold a frame.
    ///
    /// # Errors
    /// As for [`TestBroker::proxy`].
    pub fn amqp_proxy(&self) -> Result<(Proxy, String)> {
        self.proxy_by(Proxy::start_amqp)
    }

    fn proxy_by(&self, start: fn(SocketAddr) -> Result<Proxy>) -> Result<(Proxy, String)> {
        let proxy = start(self.address()?)?;
        let url = self.url_by(proxy.address)?;
        Ok((proxy, url))
    }

    /// Starts a TLS server in front of the broker. Returns the TLS server, and the URL by which clients connect
    /// through it. If `client_ca` is a CA's certificate file, only clients with a certificate of that CA can
    /// connect.
    ///
    /// # Errors
    /// As for [`TestBroker::proxy`], or if a file can't be read.
    pub fn tls_front(&self, files: &Files, client_ca: Option<&str>) -> Result<(TlsFront, String)> {
        let front = TlsFront::start(self.address()?, files, client_ca)?;
        let url = self.url_by(front.address)?.replacen("amqp://", "amqps://", 1);
        Ok((front, url))
    }

    fn address(&self) -> Result<SocketAddr> {
        let authority =
            amqp::connection::parse_url(&self.url).map_err(anyhow::Error::msg)?.uri().authority.clone();
        let address = (authority.host.as_str(), authority.port).to_socket_addrs()?.next();
        address.context("the broker has no address")
    }

    /// Returns the broker's URL, with `address` in place of the broker's address.
    ///
    /// # Errors
    /// If the broker's URL is malformed.
    pub fn url_by(&self, address: SocketAddr) -> Result<String> {
        let authority =
            amqp::connection::parse_url(&self.url).map_err(anyhow::Error::msg)?.uri().authority.clone();
        let from = format!("@{}:{}", authority.host, authority.port);
        Ok(self.url.replace(&from, &format!("@{address}")))
    }

    /// Raises or clears the memory alarm of an embedded broker.
    ///
    /// # Panics
    /// If the broker is not embedded, because other tests use it too.
    pub fn set_alarm(&self, on: bool) {
        self.embedded.as_ref().expect("an embedded broker").set_alarm(on);
    }

    /// Makes an embedded broker refuse bodies of more than `bytes` bytes.
    ///
    /// # Panics
    /// If the broker is not embedded, because other tests use it too.
    pub fn set_longest_body(&self, bytes: u64) {
        self.embedded.as_ref().expect("an embedded broker").set_longest_body(bytes);
    }

    /// Bounds the number of messages that wait in each queue of an embedded broker, by a policy.
    ///
    /// # Panics
    /// If the broker is not embedded, because a policy needs RabbitMQ's command line.
    pub fn set_longest_queue(&self, messages: Option<usize>) {
        self.embedded.as_ref().expect("an embedded broker").set_longest_queue(messages);
    }

    /// Returns whether the broker has told the test's connection that it is accepting no messages.
    pub fn is_blocked(&self) -> bool {
        self.connection.status().blocked()
    }
}

impl Drop for TestBroker {
    fn drop(&mut self) {
        if self.embedded.is_some() {
            return;
        }
        let clean_up = async {
            let server = amqp::connection::parse_url(&self.url).map_err(anyhow::Error::msg)?;
            // Opens a new connection, because the test may have broken its own connection.
            let connection = amqp::connection::connect(&server, "test clean-up").await?;
            let channel = connection.create_channel().await?;
            let Topology { exchange, queue, dead_letter_queue, .. } = &self.topology;
            let retry_queues = self.retry_delays.iter().map(|delay| self.topology.retry_queue(*delay));
            for queue in [queue.clone(), dead_letter_queue.clone()].into_iter().chain(retry_queues) {
                channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await?;
            }
            for exchange in [exchange.clone(), format!("{queue}.history")] {
                channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await?;
            }
            connection.close(200, "done".into()).await?;
            anyhow::Ok(())
        };
        // The test's runtime may be ending, so the clean-up runs on another runtime.
        std::thread::scope(|scope| {
            scope.spawn(|| Runtime::new().map(|runtime| runtime.block_on(clean_up)));
        });
    }
}
