//! OTLP's three encodings, with compression and without. A malformed request gets the error that the protocol
//! defines.

use crate::{Fixture, GZIP, JSON, PROTOBUF, ZSTD, request, span, trace_id};
use anyhow::{Context, Result};
use backend::{Addresses, Backend};
use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceResponse, trace_service_client::TraceServiceClient},
    trace::v1::Span,
};
use prost::Message;
use serde_json::json;
use std::io::Write;
use tonic::codec::CompressionEncoding;

/// The largest request that the backend accepts.
const MAX_BYTES: usize = 16 * 1024 * 1024;

/// The fields of `google.rpc.Status`.
#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("written to memory");
    encoder.finish().expect("written to memory")
}

/// Returns a request with a span in OTLP/JSON. In this encoding, ids are hexadecimal, and 64-bit integers are
/// strings or numbers.
fn json_request(trace: u128) -> String {
    json!({ "resourceSpans": [{
        "resource": { "attributes": [{ "key": "service.name", "value": { "stringValue": "shop" } }] },
        "scopeSpans": [{
            "scope": { "name": "library" },
            "spans": [{
                "traceId": trace_id(trace),
                "spanId": "0000000000000001",
                "name": "buy",
                "startTimeUnixNano": "1769860800000000000",
                "endTimeUnixNano": 1_769_860_800_001_000_000_u64,
                "aFieldOfALaterVersion": [{}],
            }],
        }],
    }]})
    .to_string()
}

/// Returns an encoded request with seven million empty spans, each of two bytes. When they are decoded, the
/// spans would take two gigabytes.
fn empty_spans() -> Vec<u8> {
    let field = |number: u8, bytes: &[u8]| {
        let mut field = vec![number << 3 | 2];
        prost::encode_length_delimiter(bytes.len(), &mut field).expect("written to memory");
        field.extend(bytes);
        field
    };
    field(1, &field(2, &field(2, b"").repeat(7_000_000)))
}

/// Frames a message as gRPC does. The frame begins with a flag that says whether the message is compressed.
/// The message's length and the message follow.
fn framed(compressed: bool, message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).expect("small").to_be_bytes();
    [&[u8::from(compressed)], &length[..], message].concat()
}

/// Sends a body over gRPC. Returns the `grpc-status` of the response.
async fn grpc_status(backend: &Backend, header: (&'static str, &str), body: Vec<u8>) -> Result<String> {
    let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let method = "opentelemetry.proto.collector.trace.v1.TraceService/Export";
    let request = Request::post(format!("http://{}/{method}", backend.addresses().otlp_grpc))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header(header.0, header.1)
        .body(Full::new(body.into()))?;
    let (parts, body) = client.request(request).await?.into_parts();
    let trailers = body.collect().await?.trailers().cloned().unwrap_or_default();
    let status = trailers.get("grpc-status").or(parts.headers.get("grpc-status")).context("grpc-status")?;
    Ok(status.to_str()?.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_come_in_by_every_encoding_with_gzip_and_without() -> Result<()> {
    let fixture = Fixture::start().await?;
    let protobuf = |trace| request("shop", [span(trace, 1, 0, "buy")]);

    let channel =
        TraceServiceClient::connect(format!("http://{}", fixture.backend.addresses().otlp_grpc)).await?;
    assert_eq!(
        channel.clone().export(protobuf(1)).await?.into_inner(),
        ExportTraceServiceResponse::default()
    );
    channel.send_compressed(CompressionEncoding::Gzip).export(protobuf(2)).await?;
    for (headers, body, expected) in [
        (&[PROTOBUF][..], protobuf(3).encode_to_vec(), &b""[..]),
        (&[PROTOBUF, GZIP], gzip(&protobuf(4).encode_to_vec()), b""),
        (&[JSON], json_request(5).into(), b"{}"),
        (
            &[("content-type", "Application/JSON; charset=utf-8"), GZIP],
            gzip(json_request(6).as_bytes()),
            b"{}",
        ),
        (&[PROTOBUF, ("content-encoding", "identity")], protobuf(7).encode_to_vec(), b""),
    ] {
        let answer = fixture.post(headers, body).await?;
        assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, expected), "{headers:?}");
        let content_type = headers[0].1.split(';').next().unwrap().to_lowercase();
        assert_eq!(answer.header("content-type"), content_type);
    }

    let first = fixture.backend.trace(&trace_id(1));
    assert_eq!(first.len(), 1);
    for trace in 1..=7 {
        let mut spans = fixture.backend.trace(&trace_id(trace));
        spans[0].trace_id = trace_id(1);
        assert_eq!(spans, first, "{trace}");
    }
    assert_eq!(fixture.backend.statistics().spans, 7);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_http_is_answered_with_a_status_in_the_requests_own_encoding() -> Result<()> {
    let fixture = Fixture::start().await?;
    let valid = request("shop", [span(1, 1, 0, "buy")]).encode_to_vec();
    let zipped = gzip(&valid);
    let bomb = gzip(&vec![0; MAX_BYTES + 1]);
    // These few bytes would make the decoder allocate 128 MiB.
    let mut wide = zstd::Encoder::new(Vec::new(), 0)?;
    wide.window_log(27)?;
    wide.write_all(&valid)?;
    let wide = wide.finish()?;
    assert!(bomb.len() < 100_000);
    let deep = |open: &str, close: &str| open.repeat(50_000) + &close.repeat(50_000);
    let deep_attribute = deep(r#"{"arrayValue":{"values":["#, "]}}");
    for (name, headers, body, status, code) in [
        ("no protobuf", &[PROTOBUF][..], b"\xff\xff\xff".to_vec(), 400, 3),
        ("half a message", &[PROTOBUF], valid[..valid.len() - 1].to_vec(), 400, 3),
        ("a name that is not UTF-8", &[PROTOBUF], b"\x0a\x06\x12\x04\x12\x02\x2a\xff".to_vec(), 400, 3),
        ("no JSON", &[JSON], b"{".to_vec(), 400, 3),
        ("nothing as JSON", &[JSON], Vec::new(), 400, 3),
        ("another JSON", &[JSON], b"{\"resourceSpans\":7}".to_vec(), 400, 3),
        (
            "ids in base64",
            &[JSON],
            json_request(1).replace(&trace_id(1), "AAAAAAAAAAAAAAAAAAAAAQ==").into(),
            400,
            3,
        ),
        ("a negative time", &[JSON], json_request(1).replace("\"1769860800000000000\"", "-1").into(), 400, 3),
        ("deep JSON", &[JSON], deep("[", "]").into(), 400, 3),
        (
            "a deep attribute",
            &[JSON],
            json_request(1).replace("{\"stringValue\":\"shop\"}", &deep_attribute).into(),
            400,
            3,
        ),
        ("no gzip", &[PROTOBUF, GZIP], valid.clone(), 400, 3),
        ("half a gzip", &[PROTOBUF, GZIP], zipped[..zipped.len() - 5].to_vec(), 400, 3),
        ("half a gzip of JSON", &[JSON, GZIP], gzip(json_request(1).as_bytes())[..50].to_vec(), 400, 3),
        ("no zstd", &[PROTOBUF, ZSTD], valid.clone(), 400, 3),
        ("a zstd window beyond what HTTP allows", &[PROTOBUF, ZSTD], wide, 400, 3),
        (
            "too large once unzipped, zstd",
            &[PROTOBUF, ZSTD],
            zstd::encode_all(&vec![0; MAX_BYTES + 1][..], 0)?,
            413,
            8,
        ),
        ("too many", &[PROTOBUF, GZIP], gzip(&empty_spans()), 413, 8),
        (
            "too many, JSON",
            &[JSON],
            format!(r#"{{"resourceSpans":[{}{{}}]}}"#, "{},".repeat(1_000_000)).into(),
            413,
            8,
        ),
        ("too large", &[PROTOBUF], vec![0; MAX_BYTES + 1], 413, 8),
        ("too large once unzipped", &[PROTOBUF, GZIP], bomb.clone(), 413, 8),
        ("too large once unzipped, JSON", &[JSON, GZIP], bomb, 413, 8),
    ] {
        let answer = fixture.post(headers, body).await?;
        assert_eq!(answer.status, status, "{name}");
        assert_eq!(answer.header("content-type"), headers[0].1, "{name}");
        let (said, message) = if headers[0] == PROTOBUF {
            let status = Status::decode(answer.body.clone())?;
            (i64::from(status.code), status.message)
        } else {
            (answer.json()["code"].as_i64().unwrap(), answer.json()["message"].as_str().unwrap().to_owned())
        };
        assert_eq!(said, code, "{name}: {message}");
        assert!(!message.is_empty(), "{name}");
    }
    assert_eq!(fixture.backend.statistics().received, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn other_types_encodings_methods_and_paths_are_refused() -> Result<()> {
    let fixture = Fixture::start().await?;
    for headers in [
        &[][..],
        &[("content-type", "text/plain")],
        &[("content-type", "application/protobuf, application/json")],
        &[("content-type", "")],
        &[PROTOBUF, ("content-encoding", "br")],
        &[JSON, ("content-encoding", "gzip, gzip")],
    ] {
        assert_eq!(fixture.post(headers, "{}").await?.status, 415, "{headers:?}");
    }
    let url = format!("http://{}/v1/traces", fixture.backend.addresses().otlp_http);
    for method in [Method::GET, Method::PUT, Method::DELETE] {
        let answer = fixture.client.send(method, &url, &[JSON], "{}").await?;
        assert_eq!((answer.status.as_u16(), answer.header("allow")), (405, "POST"));
    }
    let profiles = url.replace("traces", "profiles");
    assert_eq!(fixture.client.send(Method::POST, &profiles, &[JSON], "{}").await?.status, 404);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_grpc_is_an_invalid_argument() -> Result<()> {
    let fixture = Fixture::start().await?;
    let valid = request("shop", [span(1, 1, 0, "buy")]).encode_to_vec();
    let zipped = gzip(&valid);
    let gzip_header = ("grpc-encoding", "gzip");
    let zstd_header = ("grpc-encoding", "zstd");
    let none = ("x", "1");
    for (name, header, body, status) in [
        ("well-formed", none, framed(false, &valid), "0"),
        ("well-formed, with gzip", gzip_header, framed(true, &zipped), "0"),
        ("no protobuf", none, framed(false, b"\xff\xff\xff"), "3"),
        ("half a message", none, framed(false, &valid[..valid.len() - 1]), "3"),
        ("shorter than its length says", none, framed(false, &valid)[..20].to_vec(), "3"),
        ("nothing", none, Vec::new(), "3"),
        ("an unknown flag", none, b"\x07\0\0\0\0".to_vec(), "3"),
        ("no gzip", gzip_header, framed(true, &valid), "3"),
        ("half a gzip", gzip_header, framed(true, &zipped[..zipped.len() - 5]), "3"),
        ("a length beyond the limit", none, b"\0\xff\xff\xff\xff".to_vec(), "11"),
        ("millions of empty spans", gzip_header, framed(true, &gzip(&empty_spans())), "8"),
        ("a gzip bomb", gzip_header, framed(true, &gzip(&vec![0; MAX_BYTES + 1])), "8"),
        ("well-formed, with zstd", zstd_header, framed(true, &zstd::encode_all(&valid[..], 0)?), "0"),
        ("no zstd", zstd_header, framed(true, &valid), "3"),
        ("a zstd bomb", zstd_header, framed(true, &zstd::encode_all(&vec![0; MAX_BYTES + 1][..], 0)?), "8"),
        ("another encoding", ("grpc-encoding", "br"), framed(true, &valid), "12"),
    ] {
        assert_eq!(grpc_status(&fixture.backend, header, body).await?, status, "{name}");
    }
    assert_eq!(fixture.backend.statistics().spans, 1);

    // The service has no method `Import`.
    let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let method = "opentelemetry.proto.collector.trace.v1.TraceService/Import";
    let request = Request::post(format!("http://{}/{method}", fixture.backend.addresses().otlp_grpc))
        .header("content-type", "application/grpc")
        .body(Full::default())?;
    assert_eq!(client.request(request).await?.headers()["grpc-status"], "12");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_with_invalid_ids_are_rejected_and_counted_and_the_others_stored() -> Result<()> {
    let fixture = Fixture::start().await?;
    let spans = |trace| {
        let good = span(trace, 1, 0, "good");
        [
            good.clone(),
            Span { trace_id: vec![0; 16], ..good.clone() },
            Span { trace_id: vec![1; 8], ..good.clone() },
            Span { trace_id: Vec::new(), ..good.clone() },
            Span { span_id: vec![0; 8], ..good.clone() },
            Span { span_id: vec![1; 9], ..good.clone() },
            Span { span_id: vec![2; 8], parent_span_id: vec![1; 7], ..good.clone() },
            // Some clients send zeros for a missing parent.
            Span { span_id: vec![3; 8], parent_span_id: vec![0; 8], ..good },
        ]
    };
    let message = "the first rejected item: its trace id or span id is invalid";

    let mut grpc =
        TraceServiceClient::connect(format!("http://{}", fixture.backend.addresses().otlp_grpc)).await?;
    let partial =
        grpc.export(request("shop", spans(1))).await?.into_inner().partial_success.context("partial")?;
    assert_eq!((partial.rejected_spans, partial.error_message.as_str()), (6, message));

    let answer = fixture.post(&[PROTOBUF], request("shop", spans(2)).encode_to_vec()).await?;
    assert_eq!(answer.status, 200);
    let response = ExportTraceServiceResponse::decode(answer.body)?;
    assert_eq!(response.partial_success, Some(partial));

    let answer = fixture.post(&[JSON], serde_json::to_vec(&request("shop", spans(3)))?).await?;
    assert_eq!(answer.status, 200);
    let expected = json!({ "partialSuccess": { "rejectedSpans": "6", "errorMessage": message } });
    assert_eq!(answer.json(), expected);

    for trace in 1..=3 {
        let roots = fixture.backend.trace(&trace_id(trace)).into_iter().map(|span| span.span_id);
        assert_eq!(roots.collect::<Vec<_>>(), ["0000000000000001", "0303030303030303"]);
    }
    assert_eq!(fixture.backend.statistics().rejected, 18);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_prefix_and_no_flipped_bit_of_a_request_does_harm() -> Result<()> {
    let fixture = Fixture::start().await?;
    let protobuf = request("shop", [span(1, 1, 0, "buy"), span(1, 2, 1, "pay")]).encode_to_vec();
    let json = json_request(2).into_bytes();
    for (headers, body) in [
        (&[PROTOBUF][..], protobuf.clone()),
        (&[PROTOBUF, GZIP], gzip(&protobuf)),
        (&[JSON], json.clone()),
        (&[JSON, GZIP], gzip(&json)),
    ] {
        for i in 0..body.len() {
            let mut flipped = body.clone();
            flipped[i] ^= 1 << (i % 8);
            for damaged in [body[..i].to_vec(), flipped] {
                let status = fixture.post(headers, damaged).await?.status.as_u16();
                assert!(status == 200 || status == 400, "{status} for {headers:?}, byte {i}");
            }
        }
    }
    fixture.export("shop", [span(3, 1, 0, "after")]).await?;
    assert_eq!(fixture.backend.trace(&trace_id(3)).len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_port_in_use_is_named() -> Result<()> {
    let fixture = Fixture::start().await?;
    let taken = fixture.backend.addresses();
    for (addresses, expected) in [
        (
            Addresses { otlp_grpc: taken.otlp_grpc, ..Addresses::FREE },
            format!("{}, for OTLP/gRPC", taken.otlp_grpc),
        ),
        (
            Addresses { otlp_http: taken.otlp_http, ..Addresses::FREE },
            format!("{}, for OTLP/HTTP", taken.otlp_http),
        ),
        (Addresses { query: taken.query, ..Addresses::FREE }, format!("{}, for queries", taken.query)),
    ] {
        let error = Backend::start_at(addresses).await.err().context("it started")?;
        assert!(format!("{error:#}").starts_with(&expected), "{error:#}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_backend_its_ports_are_free_again() -> Result<()> {
    let fixture = Fixture::start().await?;
    let addresses = *fixture.backend.addresses();
    // A connection that stays open must not keep the ports in use.
    fixture.get("/api/services").await?;
    drop(fixture);
    let again = loopback::poll(loopback::PATIENCE, async || Backend::start_at(addresses).await.ok());
    assert!(again.await.is_some());
    Ok(())
}
