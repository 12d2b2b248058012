// Makes elements. What a span says only ever becomes text or a plain attribute: nothing here parses markup,
// and the page's Content-Security-Policy (require-trusted-types-for) refuses code that would.

/** `element("a", { href }, "text", child)`. An attribute that is false, null or undefined is left out. */
export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** The same for SVG, which has a namespace of its own. */
export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) setAttribute(node, name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Sets an attribute, or removes it when the value is false, null or undefined. */
export function setAttribute(node, name, value) {
  if (value === false || value === null || value === undefined) node.removeAttribute(name);
  else node.setAttribute(name, value === true ? "" : value);
}

/** Sets an element's text, and leaves the document alone if it already says that. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** The element with this id: they are in the HTML file, so it exists. */
export const byId = (id) => document.getElementById(id);

/** Text that goes over to the next line after a dot, a slash or an underscore rather than anywhere. */
export function breakable(text) {
  return text.split(/(?<=[./_])/).flatMap((part) => [part, element("wbr")]);
}

/** Where a trace, and a span of it, is shown; null unless the ids are hex digits. */
export function tracePath(traceID, spanID = "") {
  if (!/^[0-9a-f]{1,32}$/i.test(traceID) || !/^[0-9a-f]{0,16}$/i.test(spanID)) return null;
  return `/trace/${traceID}${spanID && `#${spanID}`}`;
}
