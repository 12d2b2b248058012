// Calculates the totals and the calls of a trace's services, and chooses their colours.

/** There are this many hues, from orange to purple. Red means an error. */
const HUES = 18;

/** Gives an element the colour of a service, which the name alone determines, so that it is the same on every page. */
export function coloured(node, service) {
  let hash = 0;
  for (let i = 0; i < service.length; i++) hash = (Math.imul(hash, 31) + service.charCodeAt(i)) >>> 0;
  node.classList.add("coloured");
  node.style.setProperty("--hue", 50 + 16 * (hash % HUES));
  return node;
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
