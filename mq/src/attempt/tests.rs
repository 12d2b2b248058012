use super::*;
use ::amqp::QueueType;
use tempfile::TempDir;
use tower::service_fn;

/// Returns the fate of a login that `processing` processes.
async fn fate<S>(processing: S) -> Fate
where
    S: Service<Login, Response = Processed, Error: Into<BoxError>> + Clone,
{
    let directory = TempDir::new().unwrap();
    let database = format!("sqlite://{}", directory.path().join("mq.db").display());
    let server = ::amqp::connection::parse_url(::amqp::connection::DEFAULT_URL).unwrap();
    let topology = Topology::new("", "e", "k", "q", QueueType::Quorum);
    let attempts = Attempts {
        processing,
        history: History::start(crate::history::parse_url(&database).unwrap()).0,
        broker: Broker::new(server.uri(), "test"),
        forwarder: Forwarder::new(server, topology.clone(), Vec::new()),
        topology,
        relation: Relation::Parent,
        retry_delays: vec![Duration::from_secs(1)],
    };
    let body = br#"{"Msg":"13800138000"}"#.to_vec();
    let delivery = Delivery::mock(1, "e".into(), "k".into(), false, body);
    match attempts.process(&delivery, Redelivered::No, Chunk { size: 1, pause: Duration::ZERO }).await {
        Outcome::Failed(failed) => failed.fate,
        Outcome::Settled => panic!("the message did not fail"),
    }
}

#[tokio::test]
async fn a_panic_and_an_error_of_a_layer_fail_the_message_and_are_tried_again() {
    let panics = service_fn(async |_| -> Result<Processed, BoxError> { panic!("on purpose") });
    assert!(matches!(fate(panics).await, Fate::Retry(_)));
    let fails = service_fn(async |_| Err::<Processed, BoxError>("on purpose".into()));
    assert!(matches!(fate(fails).await, Fate::Retry(_)));
}
