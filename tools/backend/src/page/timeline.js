// Places times on the axis of the waterfall. A pause that is longer than all the work of the trace, such as the minutes
// in which a message waited in a spool, is cut short. The axis can also show a part of the trace.

/** The share of the axis that one pause takes, and the share that all pauses take at most. */
const PAUSE = 0.05;
const ALL_PAUSES = 0.4;

/**
 * Returns the axis of a trace. `place(time)` is a time's place from 0 to 1, and below 0 or above 1 if the axis shows
 * only the part `[from, to]`, and not this time. `time(place)` is the reverse. `pauses` lists the pauses that are cut short.
 */
export function timeline(trace, [from, to] = [trace.start, trace.end]) {
  const pieces = arrange(work(trace.spans));
  const whole = (time) => {
    const { start, end, left, width } = pieces.findLast((piece) => piece.start <= time) ?? pieces[0];
    return left + width * Math.min(Math.max((time - start) / (end - start || 1), 0), 1);
  };
  const left = whole(from);
  const width = whole(to) - left || 1;
  return {
    trace,
    from,
    to,
    pauses: pieces.filter((piece) => piece.isPause),
    place: (time) => (whole(time) - left) / width,
    time(place) {
      const x = left + width * place;
      const piece = pieces.findLast((piece) => piece.left <= x) ?? pieces[0];
      const share = Math.min((x - piece.left) / (piece.width || 1), 1);
      return piece.start + share * (piece.end - piece.start);
    },
  };
}

/** Returns the times in which at least one span ran, as `{ start, end }`. */
function work(spans) {
  const busy = [];
  for (const { start, end } of [...spans].sort((a, b) => a.start - b.start)) {
    const last = busy.at(-1);
    if (last && start <= last.end) last.end = Math.max(last.end, end);
    else busy.push({ start, end });
  }
  return busy;
}

/** Returns the pieces of the axis, each of which has its own scale: `{ start, end, left, width, isPause }`. */
function arrange(busy) {
  // Work without a duration takes a microsecond, so that it has a place.
  const all = busy.reduce((sum, { start, end }) => sum + Math.max(end - start, 1), 0);
  const pieces = [];
  for (const { start, end } of busy) {
    const last = pieces.at(-1);
    if (last && start - last.end <= all) last.end = end;
    else {
      if (last) pieces.push({ start: last.end, end: start, isPause: true });
      pieces.push({ start, end, isPause: false });
    }
  }
  const count = pieces.filter((piece) => piece.isPause).length;
  const pause = count ? Math.min(PAUSE, ALL_PAUSES / count) : 0;
  const length = ({ start, end }) => Math.max(end - start, 1);
  const shown = pieces.filter((piece) => !piece.isPause).reduce((sum, piece) => sum + length(piece), 0);
  let left = 0;
  for (const piece of pieces) {
    piece.left = left;
    piece.width = piece.isPause ? pause : (length(piece) / shown) * (1 - pause * count);
    left += piece.width;
  }
  return pieces;
}
