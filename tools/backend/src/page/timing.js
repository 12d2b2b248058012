// Calculates where the time went: self time and the critical path.

/**
 * Returns whether a parent waits for a child. A producer doesn't wait for the consumer of its message, so such a child
 * takes none of the parent's time, and a shorter child would not make the parent shorter.
 */
function waitsFor(parent, child) {
  return !(parent.kind === "PRODUCER" && child.kind === "CONSUMER");
}

/**
 * Returns how much of a span's time passed while none of the children that it waits for ran. Children are ordered by
 * start.
 */
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
 * Divides the critical path among the spans below `root`: adds to each span's `critical`, as `[from, to]`, the parts
 * that were spent in the span. The critical path is the chain of work that the end of `root` waited for. If any part of
 * the path were shorter, `root` would be shorter. The path is followed backwards: from the end of a parent to the end
 * of the child that ended last, then through this child in the same way, and before the child's start in the parent.
 */
export function markCriticalPath(root) {
  const todo = [{ span: root, from: root.start, until: root.end }];
  while (todo.length) {
    const { span, from, until } = todo.pop();
    const children = span.children.filter((child) => waitsFor(span, child));
    children.sort((a, b) => b.end - a.end || b.start - a.start);
    let cursor = until;
    for (const child of children) {
      // Clocks differ between machines, so only the part of a child within its parent counts.
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

/** Returns how much of the critical path was spent in a span itself. */
export function criticalTime(span) {
  return span.critical.reduce((sum, [from, to]) => sum + to - from, 0);
}
