//! Tests the layers of usercenter around a handler that panics. The test has its own process, because tracers
//! are global.

use opentelemetry::{Context, global};
use opentelemetry_sdk::{
    error::OTelSdkResult,
    trace::{SdkTracerProvider, Span, SpanData, SpanProcessor},
};
use proto::usercenter::v1::{
    GetUserByMobileRequest, GetUserByMobileResponse,
    usercenter_client::UsercenterClient,
    usercenter_server::{Usercenter, UsercenterServer},
};
use resilience::InFlight;
use rpc::layers::{self, RequestLimits};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::net::TcpListener;
use tonic::{
    Code, Request, Response, Status,
    transport::{Channel, Server, server::TcpIncoming},
};

#[derive(Debug, Default, Clone)]
struct Ended(Arc<Mutex<Vec<SpanData>>>);

impl SpanProcessor for Ended {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        self.0.lock().expect("no panic while the lock is held").push(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// A service whose method panics, unless the mobile number is empty.
struct Panics;

#[tonic::async_trait]
impl Usercenter for Panics {
    async fn get_user_by_mobile(
        &self,
        request: Request<GetUserByMobileRequest>,
    ) -> Result<Response<GetUserByMobileResponse>, Status> {
        assert!(request.into_inner().mobile.is_empty(), "on purpose");
        Ok(Response::new(GetUserByMobileResponse { user: None }))
    }
}

#[tokio::test]
async fn a_panic_is_internal_closes_its_span_frees_its_place_and_leaves_the_connection() {
    let ended = Ended::default();
    global::set_tracer_provider(SdkTracerProvider::builder().with_span_processor(ended.clone()).build());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let limits = RequestLimits { in_flight: InFlight::at_most(1), deadline: Duration::from_secs(2) };
    let server = layers::in_layers(Server::builder(), limits).add_service(UsercenterServer::new(Panics));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));

    let channel = Channel::from_shared(url).unwrap().connect().await.unwrap();
    let mut client = UsercenterClient::new(channel);
    let mut call = async |mobile: &str| {
        client.get_user_by_mobile(GetUserByMobileRequest { mobile: mobile.to_owned() }).await
    };
    let status = call("13800138000").await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(!status.message().contains("on purpose"));
    call("").await.unwrap();

    let spans = ended.0.lock().expect("no panic while the lock is held");
    let value = |span: &SpanData, key: &str| {
        let found = span.attributes.iter().find(|attribute| attribute.key.as_str() == key);
        found.map(|attribute| attribute.value.to_string()).unwrap_or_default()
    };
    let outcomes: Vec<_> =
        spans.iter().map(|span| (value(span, "rpc.status_code"), value(span, "error.type"))).collect();
    let outcome = |status: &str, error_type: &str| (status.to_owned(), error_type.to_owned());
    assert_eq!(outcomes, [outcome("INTERNAL", "INTERNAL"), outcome("OK", "")]);
    assert_eq!(spans[0].status, opentelemetry::trace::Status::error("panic"));
    // Both calls came over the same connection.
    assert_eq!(value(&spans[0], "client.port"), value(&spans[1], "client.port"));
}
