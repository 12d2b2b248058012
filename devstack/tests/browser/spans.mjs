// Traces for the page to show, as OTLP/JSON.

import { randomBytes } from "node:crypto";

const KINDS = { INTERNAL: 1, SERVER: 2, CLIENT: 3, PRODUCER: 4, CONSUMER: 5 };

export const id = (bytes) => randomBytes(bytes).toString("hex");

/** Posts traces to an OTLP/HTTP receiver. */
export async function post(otlp, ...traces) {
  const response = await fetch(`${otlp}/v1/traces`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ resourceSpans: traces.flatMap((trace) => trace.resourceSpans) }),
  });
  if (!response.ok) throw new Error(`${otlp} answered ${response.status}: ${await response.text()}`);
}

/**
 * A trace of spans given as `{ service, name, kind, at, took, parent, attributes, events, links, error, resource }`,
 * times in microseconds after `start`, parents by index or id. Returns `{ traceID, ids, resourceSpans }`.
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
  return { traceID, ids, resourceSpans };
}

/** Microseconds since 1970. */
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

/** The login, as the three services trace it. With `error`, of a user whom nobody knows. */
export function login({ start = now(), traceID } = {}) {
  const host = { "service.version": "0.1.0", "telemetry.sdk.language": "rust", "telemetry.sdk.name": "opentelemetry" };
  const spans = [
    {
      service: "api", name: "POST /usercenter/v1/user/login", kind: "SERVER", at: 0, took: 2150, resource: host,
      attributes: {
        "http.request.method": "POST", "http.route": "/usercenter/v1/user/login", "url.path": "/usercenter/v1/user/login",
        "url.scheme": "http", "server.address": "localhost", "server.port": 8888, "network.protocol.version": "1.1",
        "user_agent.original": "curl/8.5.0", "http.response.status_code": 200,
      },
    },
    {
      service: "api", name: "usercenter.v1.Usercenter/GetUserByMobile", kind: "CLIENT", at: 130, took: 760, parent: 0, resource: host,
      attributes: { "rpc.system.name": "grpc", "rpc.method": "usercenter.v1.Usercenter/GetUserByMobile", "server.address": "127.0.0.1", "server.port": 8080, "rpc.status_code": "OK" },
    },
    {
      service: "usercenter", name: "usercenter.v1.Usercenter/GetUserByMobile", kind: "SERVER", at: 420, took: 210, parent: 1, resource: host,
      attributes: { "rpc.system.name": "grpc", "rpc.method": "usercenter.v1.Usercenter/GetUserByMobile", "rpc.status_code": "OK" },
    },
    { service: "api", name: "local", kind: "INTERNAL", at: 905, took: 60, parent: 0, resource: host },
    {
      service: "api", name: "send_msg_mq", kind: "PRODUCER", at: 980, took: 1080, parent: 0, resource: host,
      attributes: {
        "messaging.system": "rabbitmq", "messaging.operation.name": "send", "messaging.operation.type": "send",
        "messaging.destination.name": "user:login", "messaging.rabbitmq.destination.routing_key": "login",
        "messaging.message.id": "8d1a3a4e-5c1f-4c33-9d52-7bd4d8a0b9a1", "server.address": "127.0.0.1", "server.port": 5672,
      },
    },
    {
      service: "mq", name: "mq_consumer_msg", kind: "CONSUMER", at: 1630, took: 840, parent: 4, resource: host,
      attributes: {
        "messaging.system": "rabbitmq", "messaging.operation.name": "process", "messaging.operation.type": "process",
        "messaging.destination.name": "user:login", "messaging.rabbitmq.destination.routing_key": "login",
        "messaging.rabbitmq.message.delivery_tag": 1, "messaging.message.id": "8d1a3a4e-5c1f-4c33-9d52-7bd4d8a0b9a1",
      },
      events: [{ name: "counted", at: 2300, attributes: { logins: 12 } }],
    },
  ];
  return trace(spans, { start, traceID });
}
