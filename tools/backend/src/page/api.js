// Asks the backend. Its answers are Jaeger's JSON; `jaeger.js` reads them.

import { list, readSummary, readTrace, text } from "./jaeger.js";

/** The backend answered, but not with what was asked for. */
export class Refused extends Error {}

/** Summaries of the traces that fit the criteria, newest first. */
export async function recentTraces(criteria) {
  const answer = await ask(`/api/recent?${new URLSearchParams(criteria)}`);
  return list(answer?.data)
    .map(readSummary)
    .filter((summary) => summary.traceID);
}

/** A trace with its logs, or null if the backend has none with this id. */
export async function trace(traceID) {
  const id = encodeURIComponent(traceID);
  return readTrace(...(await Promise.all([ask(`/api/traces/${id}`, [404]), ask(`/api/logs/${id}`)])));
}

/** The names of all services. */
export async function services() {
  const answer = await ask("/api/services");
  return list(answer?.data).map(text);
}

/** The names of a service's operations. */
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
