// Calculates the totals and the calls of a trace's services, and chooses their colours.

const COLOURS = 10;
const slots = new Map();

/**
 * Returns a service's colour, as the class that `base.css` gives it. The name determines the colour, so that a service
 * looks the same in every trace. If that colour is taken on this page, the next free one is used.
 */
export function colour(service) {
  if (!slots.has(service)) {
    let hash = 0;
    for (let i = 0; i < service.length; i++) hash = (hash * 31 + service.charCodeAt(i)) >>> 0;
    let slot = hash % COLOURS;
    const taken = new Set(slots.values());
    for (let tries = 0; tries < COLOURS && taken.has(slot); tries++) slot = (slot + 1) % COLOURS;
    slots.set(service, slot);
  }
  return `service-${slots.get(service)}`;
}

/** Returns `{ name, spans, errors, selfTime }` of each service, in the order of the tree. */
export function totals(trace) {
  const services = new Map();
  for (const span of trace.spans) {
    const total = services.get(span.service) ?? { name: span.service, spans: 0, errors: 0, selfTime: 0 };
    total.spans += 1;
    total.errors += span.error ? 1 : 0;
    total.selfTime += span.selfTime;
    services.set(span.service, total);
  }
  return [...services.values()];
}

/** Returns `{ from, to, count, errors, message }` for each pair of services of which one called the other. */
export function calls(trace) {
  const found = new Map();
  for (const span of trace.spans) {
    const from = span.parent?.service;
    if (from === undefined || from === span.service) continue;
    const key = JSON.stringify([from, span.service]);
    const call = found.get(key) ?? { from, to: span.service, count: 0, errors: 0, message: false };
    call.count += 1;
    call.errors += span.error ? 1 : 0;
    call.message ||= span.kind === "CONSUMER";
    found.set(key, call);
  }
  return [...found.values()];
}
