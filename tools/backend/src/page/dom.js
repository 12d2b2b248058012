// Makes elements. The text of a span only ever becomes text or a plain attribute, because nothing here parses markup,
// and the page's Content-Security-Policy (require-trusted-types-for) refuses code that would.

/**
 * `element("a", { href }, "text", child)` makes an element. An attribute that is false, null or undefined is left out.
 */
export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** Does the same for SVG, which has its own namespace. */
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

/** Sets an element's text. If the text is the same, the document isn't touched. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Returns the element with this id. The ids are in the HTML files, so the element exists. */
export const byId = (id) => document.getElementById(id);

/** Returns text that breaks after a dot, a slash or an underscore, if it can, rather than anywhere. */
export function breakable(text) {
  return text.split(/(?<=[./_])/).flatMap((part) => [part, element("wbr")]);
}

/** Returns the path of a trace's page, and of a span on it, or null unless the ids are hex digits. */
export function tracePath(traceID, spanID = "") {
  if (!/^[0-9a-f]{1,32}$/i.test(traceID) || !/^[0-9a-f]{0,16}$/i.test(spanID)) return null;
  return `/trace/${traceID}${spanID && `#${spanID}`}`;
}

/** Returns a link to a span, or plain text if the ids are invalid. */
export function spanLink({ traceID, spanID }) {
  const path = tracePath(traceID, spanID);
  const label = path?.startsWith(location.pathname) ? spanID : `${traceID} ${spanID}`;
  return path ? element("a", { href: path, class: "id" }, label) : element("span", { class: "id" }, label);
}

/** Returns a button that copies a text, or null: a browser lets only a page that is local or uses TLS do that. */
export function copyButton(label, text) {
  if (!navigator.clipboard) return null;
  const button = element("button", { type: "button", class: "copy" }, label);
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    setText(button, "Copied");
    setTimeout(() => setText(button, label), 1500);
  });
  return button;
}
