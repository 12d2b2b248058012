//! The attributes of a request in HTTP server spans and HTTP metrics.

use crate::{
    config::KNOWN_METHODS_VARIABLE,
    headers::{peer_attributes, server_attributes},
    metrics::{self, Measurement},
    redaction::{user_agent, without_long_numbers},
    scope::layers_meter,
    semconv::{self, OTHER},
};
use axum::extract::{ConnectInfo, MatchedPath};
use http::{Method, Request, Version, header};
use opentelemetry::{
    KeyValue, Value,
    metrics::{Histogram, UpDownCounter},
};
use std::{env, net::SocketAddr, sync::LazyLock};

/// Returns the attributes that a server span has from its start.
pub(super) fn request_attributes<B>(
    request: &Request<B>,
    method: Option<&'static str>,
    route: Option<&str>,
) -> Vec<KeyValue> {
    let mut attributes = Vec::with_capacity(16);
    let mut set = |key: &'static str, value: Value| attributes.push(KeyValue::new(key, value));

    set(semconv::HTTP_REQUEST_METHOD, method.unwrap_or(OTHER).into());
    if method.is_none() {
        set(semconv::HTTP_REQUEST_METHOD_ORIGINAL, without_long_numbers(request.method().as_str()).into());
    }
    if let Some(route) = route {
        set(semconv::HTTP_ROUTE, route.to_owned().into());
    }
    // The query is left out, because personal data and secrets are often sent there by mistake.
    set(semconv::URL_PATH, without_long_numbers(request.uri().path()).into());
    set(
        semconv::URL_SCHEME,
        request.uri().scheme_str().map_or("http".into(), |scheme| scheme.to_owned().into()),
    );
    if let Some(agent) = request.headers().get(header::USER_AGENT).and_then(|agent| agent.to_str().ok()) {
        set(semconv::USER_AGENT_ORIGINAL, user_agent(agent).into());
    }
    if let Some(version) = protocol_version(request.version()) {
        set(semconv::NETWORK_PROTOCOL_VERSION, version.into());
    }
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let authority = request.uri().authority().map(|authority| authority.as_str()).or(host);
    if let Some(authority) = authority.and_then(|authority| authority.parse::<http::uri::Authority>().ok()) {
        attributes.extend(server_attributes(&authority));
    }
    if let Some(ConnectInfo(peer)) = request.extensions().get::<ConnectInfo<SocketAddr>>() {
        attributes.extend(peer_attributes(*peer));
    }
    attributes
}

/// The metrics `http.server.*` of semantic conventions 1.45. Values that a caller can choose freely, such as
/// a path or a host, are not among their attributes.
#[derive(Clone)]
pub(super) struct Metrics {
    duration: Histogram<f64>,
    active: UpDownCounter<i64>,
}

impl Metrics {
    pub fn new() -> Self {
        let meter = layers_meter();
        Self {
            duration: metrics::duration_histogram(&meter, "http.server.request.duration"),
            active: meter.i64_up_down_counter("http.server.active_requests").with_unit("{request}").build(),
        }
    }
}

/// Measures one request, which counts as active until this value is dropped.
#[derive(Debug)]
pub(super) struct Measured {
    pub duration: Measurement,
    active: UpDownCounter<i64>,
    of_active: [KeyValue; 2],
}

impl Measured {
    pub fn start<B>(metrics: &Metrics, request: &Request<B>) -> Self {
        let scheme = if request.uri().scheme_str() == Some("https") { "https" } else { "http" };
        let of_active = [
            KeyValue::new(semconv::HTTP_REQUEST_METHOD, known_method(request.method()).unwrap_or(OTHER)),
            KeyValue::new(semconv::URL_SCHEME, scheme),
        ];
        metrics.active.add(1, &of_active);
        let mut duration = Measurement::start(&metrics.duration, of_active.to_vec());
        if let Some(route) = request.extensions().get::<MatchedPath>() {
            duration.set(semconv::HTTP_ROUTE, route.as_str().to_owned());
        }
        if let Some(version) = protocol_version(request.version()) {
            duration.set(semconv::NETWORK_PROTOCOL_VERSION, version);
        }
        Self { duration, active: metrics.active.clone(), of_active }
    }
}

impl Drop for Measured {
    fn drop(&mut self) {
        self.active.add(-1, &self.of_active);
    }
}

/// The methods of RFC 9110, PATCH of RFC 5789, and QUERY.
const KNOWN_METHODS: &str = "CONNECT,DELETE,GET,HEAD,OPTIONS,PATCH,POST,PUT,QUERY,TRACE";

/// Returns the name of a known method. Any other method is reported as `_OTHER`, because callers can invent
/// methods.
pub(super) fn known_method(method: &Method) -> Option<&'static str> {
    static KNOWN: LazyLock<Vec<String>> = LazyLock::new(|| {
        let list = env::var(KNOWN_METHODS_VARIABLE).ok().filter(|list| !list.trim().is_empty());
        let list = list.as_deref().unwrap_or(KNOWN_METHODS);
        list.split(',').map(|method| method.trim().to_owned()).collect()
    });
    KNOWN.iter().map(String::as_str).find(|known| *known == method.as_str())
}

fn protocol_version(version: Version) -> Option<&'static str> {
    Some(match version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_11 => "1.1",
        Version::HTTP_2 => "2",
        _ => return None,
    })
}
