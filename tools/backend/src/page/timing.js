// Where the time went: self time, and the critical path.

/**
 * A parent does not wait for who consumes its message: such a child takes none of the parent's time, and ending
 * it sooner would not end the parent sooner.
 */
function waitsFor(parent, child) {
  return !(parent.kind === "PRODUCER" && child.kind === "CONSUMER");
}

/** The part of a span's time in which none of the children it waits for was running. Children are by start. */
export function selfTime(span) {
  let covered = 0;
  let until = span.start;
  for (const child of span.children) {
    if (!waitsFor(span, child)) continue;
    const from = Math.max(child.start, until);
    const to = Math.min(child.end, span.end);
    if (to > from) {
      covered += to - from;
      until = to;
    }
  }
  return span.duration - covered;
}

/**
 * Adds to the spans below `root` the parts of the critical path that were spent in them, as `[from, to]` in
 * `critical`: the chain of work that the end of `root` waited for, so that making any part of it shorter makes
 * `root` shorter. Found from the end: before it the parent worked, back to the end of the child that ended last;
 * then that child, likewise; then from its start on back in the parent.
 */
export function markCriticalPath(root) {
  const todo = [{ span: root, from: root.start, until: root.end }];
  while (todo.length) {
    const { span, from, until } = todo.pop();
    const children = span.children.filter((child) => waitsFor(span, child));
    children.sort((a, b) => b.end - a.end || b.start - a.start);
    let cursor = until;
    for (const child of children) {
      // Clocks differ between machines: a child counts only inside its parent.
      const start = Math.max(child.start, from);
      const end = Math.min(child.end, until);
      if (end > cursor || start >= end) continue;
      if (end < cursor) span.critical.push([end, cursor]);
      todo.push({ span: child, from: start, until: end });
      cursor = start;
    }
    if (cursor > from) span.critical.push([from, cursor]);
    span.critical.reverse();
  }
}

/** How much of the critical path was spent in a span itself. */
export function criticalTime(span) {
  return span.critical.reduce((sum, [from, to]) => sum + to - from, 0);
}
