// Makes traces for the page to show, as OTLP/JSON.

import { randomBytes } from "node:crypto";

const KINDS = { INTERNAL: 1, SERVER: 2, CLIENT: 3, PRODUCER: 4, CONSUMER: 5 };

export const id = (bytes) => randomBytes(bytes).toString("hex");

/** Posts traces to an OTLP/HTTP receiver. */
export async function post(otlp, ...traces) {
  await send(`${otlp}/v1/traces`, { resourceSpans: traces.flatMap((trace) => trace.resourceSpans) });
}

/** Posts log records given as `{ spanID, at, severity, body, attributes }`. `at` is in microseconds after `start`. */
export async function postLogs(otlp, { traceID, start }, ...records) {
  const logRecords = records.map((record) => ({
    traceId: traceID,
    spanId: record.spanID,
    timeUnixNano: nanos(start + record.at),
    severityText: record.severity,
    body: anyValue(record.body),
    attributes: attributes(record.attributes),
  }));
  await send(`${otlp}/v1/logs`, { resourceLogs: [{ scopeLogs: [{ logRecords }] }] });
}

async function send(url, request) {
  const response = await fetch(url, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(request),
  });
  if (!response.ok) throw new Error(`${url} answered ${response.status}: ${await response.text()}`);
}

/**
 * Makes a trace of spans given as `{ service, name, kind, at, took, parent, attributes, events, links, error, resource
 * }`. Times are in microseconds after `start`, and parents are given by index or id. Returns `{ traceID, ids, start,
 * resourceSpans }`.
 */
export function trace(spans, { traceID = id(16), start = now() } = {}) {
  const ids = spans.map((span) => span.id ?? id(8));
  const resourceSpans = spans.map((span, index) => ({
    resource: { attributes: attributes({ "service.name": span.service, ...span.resource }) },
    scopeSpans: [
      {
        scope: { name: "test" },
        spans: [
          {
            traceId: traceID,
            spanId: ids[index],
            parentSpanId: typeof span.parent === "number" ? ids[span.parent] : (span.parent ?? ""),
            name: span.name,
            kind: KINDS[span.kind ?? "INTERNAL"],
            startTimeUnixNano: nanos(start + span.at),
            endTimeUnixNano: nanos(start + span.at + span.took),
            attributes: attributes(span.attributes),
            events: (span.events ?? []).map((event) => ({
              name: event.name,
              timeUnixNano: nanos(start + event.at),
              attributes: attributes(event.attributes),
            })),
            links: (span.links ?? []).map(({ traceID, spanID }) => ({ traceId: traceID, spanId: spanID })),
            status: span.error === undefined ? {} : { code: 2, message: span.error },
          },
        ],
      },
    ],
  }));
  return { traceID, ids, start, resourceSpans };
}

/** Returns the microseconds since 1970. */
export const now = () => Date.now() * 1000;

const nanos = (micros) => String(BigInt(Math.round(micros)) * 1000n);

function attributes(given = {}) {
  return Object.entries(given).map(([key, value]) => ({ key, value: anyValue(value) }));
}

function anyValue(value) {
  if (typeof value === "boolean") return { boolValue: value };
  if (Number.isInteger(value)) return { intValue: String(value) };
  if (typeof value === "number") return { doubleValue: value };
  return { stringValue: value };
}

/** Makes a login's trace, as the three services produce it. */
export function login({ start = now(), traceID } = {}) {
  const grpc = {
    "rpc.system.name": "grpc",
    "rpc.method": "usercenter.v1.Usercenter/GetUserByMobile",
    "rpc.status_code": "OK",
  };
  const peer = { "server.address": "127.0.0.1", "network.peer.address": "127.0.0.1" };
  const message = {
    "messaging.system": "rabbitmq",
    "messaging.rabbitmq.destination.routing_key": "mq.user_login",
    "messaging.message.id": "19916ba1-e31f-4cf7-8498-bc334b32e45c",
    ...peer,
    "server.port": 5672,
  };
  const spans = [
    {
      service: "api",
      name: "POST /usercenter/v1/user/login",
      kind: "SERVER",
      at: 0,
      took: 2150,
      attributes: {
        "http.request.method": "POST",
        "http.route": "/usercenter/v1/user/login",
        "url.path": "/usercenter/v1/user/login",
        "url.scheme": "http",
        "user_agent.original": "curl/8.5.0",
        "network.protocol.version": "1.1",
        ...peer,
        "server.port": 8888,
        "http.response.status_code": 200,
      },
    },
    {
      service: "api",
      name: grpc["rpc.method"],
      kind: "CLIENT",
      at: 130,
      took: 760,
      parent: 0,
      attributes: { ...grpc, ...peer, "server.port": 50051 },
    },
    {
      service: "usercenter",
      name: grpc["rpc.method"],
      kind: "SERVER",
      at: 420,
      took: 210,
      parent: 1,
      attributes: { ...grpc, ...peer, "server.port": 50051 },
    },
    { service: "api", name: "local", kind: "INTERNAL", at: 905, took: 60, parent: 0 },
    {
      service: "api",
      name: "send_msg_mq",
      kind: "PRODUCER",
      at: 980,
      took: 1080,
      parent: 0,
      attributes: {
        ...message,
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "mq.user_login",
      },
    },
    {
      service: "mq",
      name: "mq_consumer_msg",
      kind: "CONSUMER",
      at: 1630,
      took: 840,
      parent: 4,
      attributes: {
        ...message,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "mq.user_login",
        "messaging.rabbitmq.message.delivery_tag": 1,
        "throughline.trace_context.source": "headers",
      },
    },
  ];
  for (const span of spans) {
    span.resource = {
      "service.namespace": "throughline",
      "service.version": "0.1.0",
      "deployment.environment.name": "development",
    };
  }
  return trace(spans, { start, traceID });
}
