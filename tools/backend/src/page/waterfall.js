// Shows the spans as a tree with bars: a treegrid (WAI-ARIA Authoring Practices) of which only the visible rows are in
// the document. The focus stays on the grid, and `aria-activedescendant` names the active row, so that the focus is not
// lost when a row scrolls out of sight.

import { byId, element, setAttribute } from "./dom.js";
import { duration } from "./format.js";
import { timeline } from "./timeline.js";
import { row } from "./waterfall_row.js";
import { visible } from "./tree.js";

/** How many rows beyond each edge are in the document, so that no row is missing during scrolling. */
const MARGIN = 12;

export class Waterfall {
  /** The span that the arrow keys start from. */
  active = null;
  #grid;
  #body = byId("rows");
  #trace = null;
  #axis = null;
  /** The shown part of the trace as `[from, to]`, or undefined for all of it. */
  #range = undefined;
  #collapsed = new Set();
  #spans = [];
  /** The rows in the document, by the index of their span. */
  #rows = new Map();
  #selected = "";
  #activated;
  #chosen;
  #scheduled = false;

  /** Calls `activated(span)` when the user moves to a span, and `chosen(span or null)` on a click or Enter. */
  constructor(grid, { activated, chosen }) {
    this.#grid = grid;
    this.#activated = activated;
    this.#chosen = chosen;
    grid.addEventListener("keydown", (event) => this.#key(event));
    grid.addEventListener("scroll", () => this.#schedule(), { passive: true });
    this.#body.addEventListener("click", (event) => this.#click(event));
    grid.addEventListener("pointerdown", (event) => this.#drag(event));
    byId("whole").addEventListener("click", () => this.showWhole());
    byId("expand").addEventListener("click", () => this.#collapseAll(false));
    byId("collapse").addEventListener("click", () => this.#collapseAll(true));
    new ResizeObserver(() => this.redraw()).observe(grid);
  }

  /** Shows a trace. If it is the same trace with more spans, the visible rows stay in place. */
  show(trace) {
    const top = this.#spans[Math.floor(this.#grid.scrollTop / this.#rowHeight())];
    const offset = top ? this.#spans.indexOf(top) * this.#rowHeight() - this.#grid.scrollTop : 0;
    const activeKey = this.active?.key;
    this.#trace = trace;
    this.active = trace.spans.find((span) => span.key === activeKey) ?? trace.spans[0];
    this.#scale();
    this.#arrange();
    const index = this.#spans.findIndex((span) => span.key === top?.key);
    if (index < 0 || this.#grid.scrollTop === 0) return;
    this.#grid.scrollTop = index * this.#rowHeight() - offset;
    this.#draw();
  }

  /** Marks the span whose details are shown. */
  select(key) {
    this.#selected = key;
    this.#draw();
  }

  /** Makes a span active and scrolls to it, and expands any collapsed ancestor. */
  reveal(span) {
    let hidden = false;
    for (let above = span.parent; above; above = above.parent) {
      hidden = this.#collapsed.delete(above.key) || hidden;
    }
    if (hidden) this.#arrange();
    this.#activate(this.#spans.indexOf(span));
  }

  get isZoomed() {
    return this.#range !== undefined;
  }

  /** Shows only the time of the active span. */
  zoomToActive() {
    this.#zoom(this.active.start, Math.max(this.active.end, this.active.start + 1));
  }

  /** Shows `factor` times as much of the axis. The active span stays in the middle if it is in sight. */
  zoomBy(factor) {
    const place = (this.#axis.place(this.active.start) + this.#axis.place(this.active.end)) / 2;
    this.#zoomTo(place >= 0 && place <= 1 ? place : 0.5, factor);
  }

  /** Moves along the axis, by a share of what is in sight. */
  move(share) {
    this.#zoomTo(0.5 + share, 1);
  }

  showWhole() {
    this.#zoom(this.#trace.start, this.#trace.end);
  }

  /** Shows the axis around a place, `factor` times as much of it as now. */
  #zoomTo(place, factor) {
    const { from, to } = timeline(this.#trace);
    const [first, last] = [this.#axis.place(from), this.#axis.place(to)];
    const half = Math.min(factor, last - first) / 2;
    const middle = Math.min(Math.max(place, first + half), last - half);
    this.#zoom(this.#axis.time(middle - half), this.#axis.time(middle + half));
  }

  #zoom(from, to) {
    // Times are in microseconds.
    if (to - from < 1) return;
    const { start, end } = this.#trace;
    this.#range = from <= start && to >= end ? undefined : [Math.max(from, start), Math.min(to, end)];
    this.#scale();
    this.redraw();
  }

  #scale() {
    this.#axis = timeline(this.#trace, this.#range);
    showScale(this.#axis);
    byId("whole").hidden = !this.isZoomed;
  }

  /** Selects a part of the axis with the pointer, and then shows only that part. */
  #drag(event) {
    const column = byId("time").getBoundingClientRect();
    if (event.button !== 0 || event.pointerType === "touch" || !event.target.closest(".time")) return;
    const place = ({ clientX }) => Math.min(Math.max((clientX - column.left) / column.width, 0), 1);
    const from = place(event);
    const selection = byId("selection");
    const ended = new AbortController();
    const move = (event) => {
      const to = place(event);
      selection.hidden = Math.abs(to - from) * column.width < 4;
      selection.style.left = `${Math.min(from, to) * 100}%`;
      selection.style.width = `${Math.abs(to - from) * 100}%`;
    };
    const end = (event) => {
      ended.abort();
      if (selection.hidden) return;
      selection.hidden = true;
      const [left, right] = [from, place(event)].sort((a, b) => a - b);
      // The click that follows belongs to the drag.
      addEventListener("click", (event) => event.stopPropagation(), { capture: true, once: true });
      setTimeout(() => this.#zoom(this.#axis.time(left), this.#axis.time(right)));
    };
    addEventListener("pointermove", move, { signal: ended.signal });
    addEventListener("pointerup", end, { signal: ended.signal });
    event.preventDefault();
    this.focus();
  }

  focus() {
    this.#grid.focus({ preventScroll: true });
  }

  #rowHeight() {
    return Number.parseFloat(getComputedStyle(this.#grid).getPropertyValue("--row"));
  }

  #arrange() {
    this.#spans = visible(this.#trace.spans, this.#collapsed);
    setAttribute(this.#grid, "aria-rowcount", this.#spans.length + 1);
    this.redraw();
  }

  #schedule() {
    if (this.#scheduled) return;
    this.#scheduled = true;
    requestAnimationFrame(() => {
      this.#scheduled = false;
      this.#draw();
    });
  }

  /** Draws all rows again after their spans have changed. */
  redraw() {
    for (const shown of this.#rows.values()) shown.span = null;
    this.#draw();
  }

  #draw() {
    if (!this.#trace) return;
    const height = this.#rowHeight();
    this.#body.style.height = `${this.#spans.length * height}px`;
    const first = Math.max(0, Math.floor(this.#grid.scrollTop / height) - MARGIN);
    const last = Math.min(
      this.#spans.length - 1,
      Math.ceil((this.#grid.scrollTop + this.#grid.clientHeight) / height) + MARGIN,
    );
    const wanted = new Set();
    for (let index = first; index <= last; index++) wanted.add(index);
    const active = this.#spans.indexOf(this.active);
    if (active >= 0) wanted.add(active);

    const spare = [];
    for (const [index, shown] of this.#rows) {
      if (wanted.has(index)) continue;
      this.#rows.delete(index);
      spare.push(shown);
    }
    for (const index of wanted) {
      let shown = this.#rows.get(index);
      if (!shown) {
        shown = spare.pop() ?? this.#newRow();
        this.#rows.set(index, shown);
      }
      this.#fill(shown, index, height);
    }
    for (const shown of spare) shown.element.remove();
    setAttribute(this.#grid, "aria-activedescendant", active >= 0 && `row-${active}`);
  }

  #newRow() {
    const shown = row();
    this.#body.append(shown.element);
    return shown;
  }

  #fill(shown, index, height) {
    const span = this.#spans[index];
    if (shown.span !== span || shown.index !== index) {
      shown.span = span;
      shown.index = index;
      shown.element.id = `row-${index}`;
      shown.element.style.transform = `translateY(${index * height}px)`;
      setAttribute(shown.element, "aria-rowindex", index + 2);
      shown.show(span, this.#axis, this.#collapsed.has(span.key));
    }
    setAttribute(shown.element, "aria-selected", String(span.key === this.#selected));
    shown.element.classList.toggle("active", span === this.active);
  }

  #click(event) {
    const at = event.target.closest("[role=row]");
    const span = this.#spans[Number(at?.id.slice("row-".length))];
    if (!span) return;
    if (event.target.closest(".twist") && span.children.length) {
      this.active = span;
      this.#toggle(span);
    } else {
      this.active = span;
      this.#choose(span);
    }
  }

  #choose(span) {
    this.#chosen(span.key === this.#selected ? null : span);
  }

  #toggle(span) {
    if (!this.#collapsed.delete(span.key)) this.#collapsed.add(span.key);
    this.#arrange();
  }

  #collapseAll(collapse) {
    this.#collapsed.clear();
    if (collapse) {
      for (const span of this.#trace.spans) if (span.children.length) this.#collapsed.add(span.key);
      while (this.active.parent) this.active = this.active.parent;
    }
    this.#arrange();
    this.#activate(this.#spans.indexOf(this.active));
    this.focus();
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.active) return;
    const index = this.#spans.indexOf(this.active);
    const page = Math.max(1, Math.floor(this.#grid.clientHeight / this.#rowHeight()) - 2);
    const last = this.#spans.length - 1;
    const actions = {
      ArrowDown: () => this.#activate(Math.min(index + 1, last)),
      ArrowUp: () => this.#activate(Math.max(index - 1, 0)),
      PageDown: () => this.#activate(Math.min(index + page, last)),
      PageUp: () => this.#activate(Math.max(index - page, 0)),
      Home: () => this.#activate(0),
      End: () => this.#activate(last),
      ArrowRight: () => (event.shiftKey ? this.#collapseAll(false) : this.#inward(index)),
      ArrowLeft: () => (event.shiftKey ? this.#collapseAll(true) : this.#outward()),
      Enter: () => this.#choose(this.active),
      " ": () => this.#choose(this.active),
    };
    if (!Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  }

  #inward(index) {
    if (this.#collapsed.has(this.active.key)) this.#toggle(this.active);
    else if (this.active.children.length) this.#activate(index + 1);
  }

  #outward() {
    const { active } = this;
    if (active.children.length && !this.#collapsed.has(active.key)) this.#toggle(active);
    else if (active.parent) this.#activate(this.#spans.indexOf(active.parent));
  }

  #activate(index) {
    const span = this.#spans[index];
    if (!span) return;
    const moved = span !== this.active;
    this.active = span;
    this.#scrollTo(index);
    this.#draw();
    if (moved) this.#activated(span);
  }

  /** Scrolls to a row, and no further than needed. */
  #scrollTo(index) {
    const height = this.#rowHeight();
    const head = this.#body.offsetTop;
    const top = index * height;
    const room = this.#grid.clientHeight - head;
    if (top < this.#grid.scrollTop) this.#grid.scrollTop = top;
    else if (top + height > this.#grid.scrollTop + room) this.#grid.scrollTop = top + height - room;
  }
}

/** Labels the quarters of the axis, and marks its pauses. */
function showScale({ trace, pauses, place, time }) {
  const edges = pauses
    .map(({ start, end }) => [place(start), place(end), duration(end - start)])
    .filter(([left, right]) => right > 0 && left < 1);
  const marks = [0, 0.25, 0.5, 0.75, 1].map((share) => {
    // There would be no room for a label beside that of a pause.
    if (share % 1 && edges.some(([left, right]) => share > left - 0.12 && share < right + 0.12)) return element("span");
    // After a pause of minutes, microseconds would be lost in the time since the start.
    const earlier = pauses.findLast(({ end }) => end <= time(share));
    const at = Math.max(time(share) - (earlier?.end ?? trace.start), 0);
    return element("span", {}, (earlier ? "+" : "") + (at ? duration(at) : "0"));
  });
  byId("scale").replaceChildren(...marks, ...edges.map(([left, right, text]) => pause(left, right, text)));
  byId("pauses").replaceChildren(...edges.map(([left, right]) => pause(left, right)));
}

function pause(left, right, text = "") {
  const mark = element("i", { class: "pause", title: `${text} in which no span ran` }, text);
  mark.style.left = `${Math.max(left, 0) * 100}%`;
  mark.style.width = `${(Math.min(right, 1) - Math.max(left, 0)) * 100}%`;
  return mark;
}
