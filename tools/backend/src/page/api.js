// Queries the backend. The responses are Jaeger's JSON, which `jaeger.js` reads.

import { list, number, readSummary, readTrace, text } from "./jaeger.js";

/** The error when the backend responds, but not with the requested data. */
export class Refused extends Error {}

/** Returns `{ traces, total }`: summaries of the traces that meet the criteria, and how many there are in total. */
export async function recentTraces(criteria) {
  const answer = await ask(`/api/recent?${new URLSearchParams(criteria)}`);
  const traces = list(answer?.data)
    .map(readSummary)
    .filter((summary) => summary.traceID);
  return { traces, total: Math.max(number(answer?.total), traces.length) };
}

/** Returns a trace with its log records and the links to it, or null if the backend has no trace with this id. */
export async function trace(traceID) {
  const id = encodeURIComponent(traceID);
  const paths = [ask(`/api/traces/${id}`, [404]), ask(`/api/logs/${id}`), ask(`/api/links/${id}`)];
  return readTrace(...(await Promise.all(paths)));
}

/** Returns the names of all services. */
export async function services() {
  const answer = await ask("/api/services");
  return list(answer?.data).map(text);
}

/** Returns the names of a service's operations. */
export async function operations(service) {
  const answer = await ask(`/api/services/${encodeURIComponent(service)}/operations`);
  return list(answer?.data).map(text);
}

async function ask(path, alsoFine = []) {
  const response = await fetch(path, { headers: { accept: "application/json" } });
  if (!response.ok && !alsoFine.includes(response.status)) {
    const answer = await response.json().catch(() => null);
    throw new Refused(text(list(answer?.errors)[0]?.msg) || `the backend answered ${response.status}`);
  }
  return response.json();
}
