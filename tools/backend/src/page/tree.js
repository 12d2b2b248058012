// Arranges a trace's spans as a tree. No function is recursive, because a trace can be ten thousand spans deep.

import { markCriticalPath, selfTime } from "./timing.js";

/**
 * Adds to each span `key`, `children`, `parent`, `depth`, `position` (among its siblings, from 1), `siblings`,
 * `descendants`, `orphan` (its parent is not in the trace), `selfTime` and `critical` (see `timing.js`), and returns
 * `{ traceID, spans, root, start, end, duration, linked, warnings }` with the spans in the tree's order.
 */
export function arrange({ traceID, spans, linked, warnings }) {
  connect(spans);
  const ordered = inOrder(spans);
  let start = Infinity;
  let end = 0;
  for (const span of ordered) {
    start = Math.min(start, span.start);
    end = Math.max(end, span.end);
    span.selfTime = selfTime(span);
  }
  const roots = ordered.filter((span) => !span.parent);
  const root = roots.find((span) => !span.orphan) ?? roots[0];
  markCriticalPath(root);
  return { traceID, spans: ordered, root, start, end, duration: end - start, linked, warnings };
}

function connect(spans) {
  const byID = new Map();
  const seen = new Map();
  for (const span of spans) {
    if (!byID.has(span.id)) byID.set(span.id, span);
    // Span ids should be unique, but may not be. A key is unique, and stays the same when the trace is read again.
    const copies = seen.get(span.id) ?? 0;
    seen.set(span.id, copies + 1);
    span.key = copies ? `${span.id}.${copies}` : span.id;
    span.parent = null;
    span.children = [];
    span.depth = 0;
    span.descendants = 0;
    span.critical = [];
  }
  for (const span of spans) {
    const parent = byID.get(span.parentID);
    span.orphan = Boolean(span.parentID) && !parent;
    if (parent && parent !== span) {
      span.parent = parent;
      parent.children.push(span);
    }
  }
}

/** Returns the spans in an order with each span before its children, and siblings by start. */
function inOrder(spans) {
  const byStart = (a, b) => a.start - b.start;
  const ordered = [];
  const visited = new Set();
  const visit = (roots) => {
    place(roots);
    const todo = [...roots].reverse();
    while (todo.length) {
      const span = todo.pop();
      visited.add(span);
      ordered.push(span);
      span.children.sort(byStart);
      place(span.children);
      for (let i = span.children.length - 1; i >= 0; i--) {
        span.children[i].depth = span.depth + 1;
        todo.push(span.children[i]);
      }
    }
  };
  const roots = spans.filter((span) => !span.parent).sort(byStart);
  visit(roots);
  // A span that can't be reached from a root is on a circle of parents, or below one.
  for (const span of spans) {
    if (!visited.has(span)) visit([cutCircle(span)]);
  }
  for (let i = ordered.length - 1; i >= 0; i--) {
    const { parent, descendants } = ordered[i];
    if (parent) parent.descendants += descendants + 1;
  }
  return ordered;
}

/** Follows a span's ancestors to the circle that they form, and makes a root of the first span on it. */
function cutCircle(span) {
  const passed = new Set();
  let root = span;
  while (!passed.has(root)) {
    passed.add(root);
    root = root.parent;
  }
  root.parent.children = root.parent.children.filter((child) => child !== root);
  root.parent = null;
  root.orphan = true;
  return root;
}

function place(siblings) {
  siblings.forEach((span, index) => {
    span.position = index + 1;
    span.siblings = siblings.length;
  });
}

/** Returns the spans that are not below a collapsed span, in order. */
export function visible(spans, collapsed) {
  const rows = [];
  for (let i = 0; i < spans.length; i++) {
    rows.push(spans[i]);
    if (collapsed.has(spans[i].key)) i += spans[i].descendants;
  }
  return rows;
}
