//! The three services together, with a broker and a receiver, as the end-to-end tests use them.

use crate::{
    PATIENCE,
    certificates::Files,
    client::{Answer, Client},
    poll,
    process::Process,
    proxy::Proxy,
    receiver::Receiver,
    tls_front::TlsFront,
};
use amqp::Topology;
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

/// The tree of a login, as the contract has it.
pub const LOGIN_TREE: &str = "
    api POST /usercenter/v1/user/login SERVER
      api usercenter.v1.Usercenter/GetUserByMobile CLIENT
        usercenter usercenter.v1.Usercenter/GetUserByMobile SERVER
      api local INTERNAL
      api send_msg_mq PRODUCER
        mq mq_consumer_msg CONSUMER
";

/// A mobile number of the demo directory.
pub const KNOWN_MOBILE: &str = "13800138000";

/// All of it, running.
pub struct Stack {
    /// The HTTP service.
    pub api: Process,
    /// The gRPC service.
    pub rpc: Process,
    /// The consumer.
    pub mq: Process,
    /// Where the spans go.
    pub receiver: Receiver,
    /// The broker, as a client of its own.
    pub broker: TestBroker,
    /// For requests.
    pub client: Client,
}

/// What tests change: variables of one service, or of all (`*`).
pub type Variables<'a> = &'a [(&'a str, &'a str, &'a str)];

impl Stack {
    /// Starts all, each on free ports and with names of its own on the broker.
    ///
    /// # Errors
    /// If something doesn't start.
    pub async fn start(variables: Variables<'_>) -> Result<Self> {
        Self::start_on(TestBroker::connect().await?, variables).await
    }

    /// Starts all on this broker.
    ///
    /// # Errors
    /// If something doesn't start.
    pub async fn start_on(mut broker: TestBroker, variables: Variables<'_>) -> Result<Self> {
        let receiver = Receiver::start().await?;
        if let Some((.., list)) = variables.iter().find(|(_, name, _)| *name == "MQ_RETRY_DELAYS") {
            broker.retry_delays = delays(list);
        }
        let mut settings = Settings::new(&broker, &receiver, variables);

        let rpc = Process::start("rpc", &settings.of("rpc")).await?;
        let has_tls = variables.iter().any(|(_, name, _)| *name == "USERCENTER_TLS_CERTIFICATE");
        settings.usercenter_url = format!("{}://{}", if has_tls { "https" } else { "http" }, rpc.address);
        let (for_api, for_mq) = (settings.of("api"), settings.of("mq"));
        let (api, mq) = try_join!(Process::start("api", &for_api), Process::start("mq", &for_mq))?;
        try_join!(
            api.said("connected to the broker"),
            mq.said("consuming"),
            mq.said("the database is available")
        )?;
        Ok(Self { api, rpc, mq, receiver, broker, client: Client::new() })
    }

    /// Starts all, with a network between api and the broker that can break.
    ///
    /// # Errors
    /// If something doesn't start.
    pub async fn start_with_proxy(variables: Variables<'_>) -> Result<(Self, Proxy)> {
        let broker = TestBroker::connect().await?;
        let (proxy, url) = broker.proxy()?;
        let variables = [&[("api", "AMQP_URL", url.as_str())], variables].concat();
        Ok((Self::start_on(broker, &variables).await?, proxy))
    }

    /// Starts one more instance of a service beside these.
    ///
    /// # Errors
    /// If it doesn't start.
    pub async fn another(&self, name: &'static str, variables: &[(&str, &str)]) -> Result<Process> {
        self.another_by("exec \"$0\"", name, variables).await
    }

    /// The same, by a shell that runs this script with the service's binary as `$0`.
    ///
    /// # Errors
    /// If it doesn't start.
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

    /// The URL of the login.
    pub fn login_url(&self) -> String {
        format!("http://{}/usercenter/v1/user/login", self.api.address)
    }

    /// Logs in.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn login(&self, mobile: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        let body = serde_json::json!({ "mobile": mobile }).to_string();
        self.post(&body, headers).await
    }

    /// Posts this body, as JSON, to the login.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn post(&self, body: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        let headers = [&[("content-type", "application/json")], headers].concat();
        self.client.send(Method::POST, &self.login_url(), &headers, body.to_owned()).await
    }

    /// Publishes to where `api` does, but what a test likes.
    ///
    /// # Errors
    /// If the broker doesn't take it.
    pub async fn publish(&self, properties: BasicProperties, body: &[u8]) -> Result<()> {
        let Topology { exchange, routing_key, .. } = &self.broker.topology;
        let options = BasicPublishOptions::default();
        let (exchange, key) = (exchange.as_str().into(), routing_key.as_str().into());
        self.broker.channel.basic_publish(exchange, key, options, body, properties).await?.await?;
        Ok(())
    }

    /// The next dead letter, taken out of its queue; waits for it.
    ///
    /// # Errors
    /// If none comes.
    pub async fn dead_letter(&self) -> Result<BasicGetMessage> {
        let queue = self.broker.topology.dead_letter_queue.as_str();
        let get = async || {
            let options = BasicGetOptions { no_ack: true };
            self.broker.channel.basic_get(queue.into(), options).await.ok().flatten()
        };
        poll(PATIENCE, get).await.context("no dead letter")
    }

    /// Stops the services, in the order in which a request passes them, so that all spans are sent.
    ///
    /// # Errors
    /// If one doesn't end, or not with success.
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

/// No time is up because a machine is busy or its disk stalls; tests of deadlines set their own.
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
    otlp_endpoint: String,
    usercenter_url: String,
    variables: Variables<'a>,
}

impl<'a> Settings<'a> {
    fn new(broker: &TestBroker, receiver: &Receiver, variables: Variables<'a>) -> Self {
        Self {
            amqp_url: broker.url.clone(),
            amqp_prefix: broker.prefix.clone(),
            otlp_endpoint: format!("http://{}", receiver.grpc),
            usercenter_url: String::new(),
            variables,
        }
    }

    fn of(&self, service: &str) -> Vec<(&str, &str)> {
        let mut variables = vec![
            ("AMQP_URL", self.amqp_url.as_str()),
            ("AMQP_PREFIX", &self.amqp_prefix),
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

/// The broker that a test runs on: the one at `AMQP_URL` if that is set, which tests share, so each has a
/// prefix for its names, and removes them at its end; else an embedded one of the test's own, which ends
/// with it.
pub struct TestBroker {
    /// Where it is.
    pub url: String,
    /// The prefix of this test.
    pub prefix: String,
    /// The names with that prefix.
    pub topology: Topology,
    /// The delays that mq is configured with: each has a queue to be removed.
    pub retry_delays: Vec<Duration>,
    /// A channel of the test's own.
    pub channel: Channel,
    connection: Connection,
    embedded: Option<Broker>,
}

impl TestBroker {
    /// Connects, and makes up a prefix.
    ///
    /// # Errors
    /// If there is no broker at `AMQP_URL`.
    pub async fn connect() -> Result<Self> {
        match env::var("AMQP_URL") {
            Ok(url) => Self::at(url).await,
            Err(_) => Self::embedded().await,
        }
    }

    /// Starts an embedded one, whatever `AMQP_URL` says.
    ///
    /// # Errors
    /// If that fails.
    pub async fn embedded() -> Result<Self> {
        let broker = Broker::start().await?;
        Self::connect_to(broker.url(), Some(broker)).await
    }

    /// Connects to RabbitMQ: the one at `AMQP_URL`, or on this machine.
    ///
    /// # Errors
    /// If there is none.
    pub async fn rabbitmq() -> Result<Self> {
        let url = env::var("AMQP_URL").unwrap_or_else(|_| amqp::connection::DEFAULT_URL.to_owned());
        Self::at(url).await.context("start RabbitMQ here, or name one by AMQP_URL")
    }

    /// Connects to the one at `url`.
    ///
    /// # Errors
    /// If there is none.
    pub async fn at(url: String) -> Result<Self> {
        Self::connect_to(url, None).await
    }

    async fn connect_to(url: String, embedded: Option<Broker>) -> Result<Self> {
        let server = amqp::connection::parse_url(&url).map_err(anyhow::Error::msg)?;
        let connection = amqp::connection::connect(&server, "test").await?;
        let channel = connection.create_channel().await?;
        let prefix = format!("test.{}.", Uuid::new_v4().simple());
        let topology = Topology::new(&prefix, EXCHANGE, ROUTING_KEY, QUEUE);
        topology.declare(&channel).await?;
        let retry_delays = delays(DEFAULT_RETRY_DELAYS);
        Ok(Self { url, prefix, topology, retry_delays, channel, connection: connection, embedded })
    }

    /// A network to it that can break, and the URL that leads through it.
    ///
    /// # Errors
    /// If there is no free port, or no address for the broker's name.
    pub fn proxy(&self) -> Result<(Proxy, String)> {
        self.proxy_by(Proxy::start)
    }

    /// The same, which knows AMQP and can withhold a frame.
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

    /// TLS in front of it, and the URL that leads through it; with the file of an authority, for clients with a
    /// certificate of that only.
    ///
    /// # Errors
    /// As for [`TestBroker::proxy`], or if a file can't be read.
    pub fn tls_front(&self, files: &Files, client_ca: Option<&str>) -> Result<(TlsFront, String)> {
        let front = TlsFront::start(self.address()?, files, client_ca)?;
        let url = self.url_by(front.address)?.replacen("amqp://", "amqps://", 1);
        Ok((front, url))
    }

    fn address(&self) -> Result<SocketAddr> {
        let authority = amqp::connection::parse_url(&self.url).map_err(anyhow::Error::msg)?.uri.authority;
        let address = (authority.host.as_str(), authority.port).to_socket_addrs()?.next();
        address.context("the broker has no address")
    }

    /// Its URL, with another address.
    fn url_by(&self, address: SocketAddr) -> Result<String> {
        let authority = amqp::connection::parse_url(&self.url).map_err(anyhow::Error::msg)?.uri.authority;
        let from = format!("@{}:{}", authority.host, authority.port);
        Ok(self.url.replace(&from, &format!("@{address}")))
    }

    /// Raises or clears the memory alarm of an embedded broker.
    ///
    /// # Panics
    /// If it is another, which other tests use as well.
    pub fn set_alarm(&self, on: bool) {
        self.embedded.as_ref().expect("an embedded broker").set_alarm(on);
    }

    /// Whether the broker has told the test's own connection that it takes no messages.
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
            // A connection of its own: the test may have broken the other one.
            let connection = amqp::connection::connect(&server, "test clean-up").await?;
            let channel = connection.create_channel().await?;
            let Topology { exchange, queue, dead_letter_queue, .. } = &self.topology;
            let retry_queues = self.retry_delays.iter().map(|delay| self.topology.retry_queue(*delay));
            for queue in [queue.clone(), dead_letter_queue.clone()].into_iter().chain(retry_queues) {
                channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await?;
            }
            channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await?;
            connection.close(200, "done".into()).await?;
            anyhow::Ok(())
        };
        // The runtime of the test may be ending; this needs one that does not.
        std::thread::scope(|scope| {
            scope.spawn(|| Runtime::new().map(|runtime| runtime.block_on(clean_up)));
        });
    }
}
