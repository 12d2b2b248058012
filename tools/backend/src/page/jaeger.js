// Reads Jaeger's JSON, and the JSON of the log records, into plain spans. Anybody who can reach the receiver can send
// anything, so a field of the JSON can be missing or have another type. In the plain spans, every field exists and has
// its type.

const KINDS = ["server", "client", "producer", "consumer", "internal"];

/** Reads a summary from `/api/recent` or `/api/events`. */
export function readSummary(summary) {
  return {
    traceID: text(summary?.traceID),
    service: text(summary?.rootService),
    operation: text(summary?.rootOperation),
    status: text(summary?.status),
    start: number(summary?.startTime),
    duration: number(summary?.duration),
    spans: number(summary?.spans),
    errors: number(summary?.errors),
    services: list(summary?.services).map((service) => ({
      name: text(service?.name),
      spans: number(service?.spans),
    })),
  };
}

/**
 * Returns the first trace of a response as `{ traceID, spans, linked, warnings }`, or null if the response has no trace.
 * `logs` is the response with the trace's log records, and `links` the one with the links that other traces have to it.
 */
export function readTrace(answer, logs, links) {
  const trace = list(answer?.data)[0];
  if (!list(trace?.spans).length) return null;
  const processes = new Map();
  for (const [id, process] of Object.entries(trace.processes ?? {})) {
    processes.set(id, { service: text(process?.serviceName), attributes: tags(process?.tags) });
  }
  const records = Map.groupBy(list(logs?.data), (record) => text(record?.spanID));
  const linked = list(links?.data).map(readLink);
  return {
    traceID: text(trace.traceID),
    spans: trace.spans.map((span) => new Span(span, text(trace.traceID), processes, records, linked)),
    linked,
    warnings: list(trace.warnings).map(text),
  };
}

/**
 * A span. The fields that only the details show are read when they are needed, because most spans of a large trace are
 * never opened.
 */
class Span {
  #json;
  #logs;

  constructor(json, traceID, processes, records, linked) {
    this.#json = json;
    this.#logs = records.get(text(json?.spanID)) ?? [];
    const process = processes.get(text(json?.processID));
    const kind = this.#tag("span.kind").toLowerCase();
    const references = list(json?.references).map(readReference);
    const parent = parentAmong(references, traceID);
    this.id = text(json?.spanID);
    this.name = text(json?.operationName);
    this.service = process?.service ?? "";
    this.resource = process?.attributes ?? [];
    this.kind = KINDS.includes(kind) ? kind.toUpperCase() : "";
    this.start = number(json?.startTime);
    this.duration = number(json?.duration);
    this.end = this.start + this.duration;
    this.error = this.#tag("error") === "true";
    this.parentID = parent?.spanID ?? "";
    this.links = references.filter((reference) => reference !== parent);
    this.linked = linked.filter((link) => link.to === this.id);
    const status = this.#first("http.response.status_code", "rpc.response.status_code", "rpc.status_code");
    const reason = this.error ? this.#tag("error.type") || (status ? "" : this.errorDescription || "error") : "";
    /** The status of HTTP or gRPC, and the reason of an error. */
    this.outcome = status === reason ? status : `${status} ${reason}`.trim();
    this.refused = Number(this.#tag("http.response.status_code")) >= 400;
  }

  get errorDescription() {
    return this.#tag("otel.status_description");
  }

  get attributes() {
    return tags(this.#json?.tags);
  }

  get events() {
    return list(this.#json?.logs).map(readEvent);
  }

  get logs() {
    return this.#logs.map(readRecord);
  }

  get warnings() {
    return list(this.#json?.warnings).map(text);
  }

  #first(...keys) {
    return keys.map((key) => this.#tag(key)).find((value) => value) ?? "";
  }

  #tag(key) {
    return text(list(this.#json?.tags).find((tag) => tag?.key === key)?.value);
  }
}

/** Reads a link from a span of another trace to the span `to` of this one. */
function readLink(link) {
  return {
    traceID: text(link?.traceID),
    spanID: text(link?.spanID),
    to: text(link?.to),
    remark: `${text(link?.service)} ${text(link?.operation)}`,
  };
}

function readReference(reference) {
  return {
    type: text(reference?.refType),
    traceID: text(reference?.traceID),
    spanID: text(reference?.spanID),
    remark: text(reference?.refType).toLowerCase().replace("_", " "),
  };
}

/**
 * Returns the CHILD_OF reference into the same trace or, if there is none, the first reference of another type into it.
 */
function parentAmong(references, traceID) {
  const same = references.filter((reference) => reference.traceID === traceID);
  return same.find((reference) => reference.type === "CHILD_OF") ?? same[0];
}

function readEvent(log) {
  const fields = tags(log?.fields);
  const name = fields.find((field) => field.key === "event");
  return {
    time: number(log?.timestamp),
    name: name?.value ?? "",
    attributes: fields.filter((field) => field !== name),
  };
}

function readRecord(record) {
  return {
    time: number(record?.timestamp),
    severity: text(record?.severity),
    body: text(record?.body?.value),
    attributes: tags(record?.attributes),
  };
}

function tags(value) {
  return list(value).map((tag) => ({ key: text(tag?.key), value: text(tag?.value) }));
}

/** Returns the value if it is an array, otherwise an empty array. */
export function list(value) {
  return Array.isArray(value) ? value : [];
}

/** Returns any JSON value as text. */
export function text(value) {
  if (value === undefined || value === null) return "";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** Returns any JSON value as a number that can be used in calculations. */
export function number(value) {
  const number = typeof value === "string" || typeof value === "number" ? Number(value) : 0;
  return Number.isFinite(number) ? Math.min(Math.max(number, 0), Number.MAX_SAFE_INTEGER) : 0;
}
