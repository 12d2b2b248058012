// The controls of the demo, which `cargo dev` adds to the page: they log in, stop and start parts, and slow one down.

import { byId, element, setText } from "./dom.js";
import { coalesced } from "./events.js";

const strip = element("section", { id: "controls", "aria-label": "Demo" });
const buttons = element("div", { class: "buttons" });
const remark = element("p", { role: "status" });
let shown = "";
strip.append(buttons, remark);
byId("gone").after(strip);
setText(remark, sessionStorage.getItem("remark") ?? "Press a button, and see what it does to the traces.");
sessionStorage.removeItem("remark");

async function ask(path, method = "GET") {
  const answer = await fetch(path, { method }).catch(() => null);
  if (answer?.ok) return answer.json();
  setText(remark, answer ? `The control was refused (${answer.status}).` : "cargo dev does not answer.");
  return null;
}

function show(answer) {
  // Replaced while it is being pressed, a button would miss its click.
  const now = JSON.stringify(answer.buttons);
  if (now === shown) return;
  shown = now;
  const focused = document.activeElement?.dataset?.control;
  buttons.replaceChildren(
    ...answer.buttons.map(({ name, label, hint, pressed }) => {
      const state = typeof pressed === "boolean" && String(pressed);
      const button = element("button", { type: "button", title: hint, "aria-pressed": state }, label);
      button.dataset.control = name;
      button.addEventListener("click", () => press(name, hint));
      return button;
    }),
  );
  if (focused) buttons.querySelector(`[data-control="${CSS.escape(focused)}"]`)?.focus();
}

async function press(name, hint) {
  setText(remark, hint);
  const answer = await ask(`/controls/${encodeURIComponent(name)}`, "POST");
  if (!answer) return;
  show(answer);
  const text = [answer.said, hint].filter(Boolean).join(". ");
  setText(remark, text);
  if (!/^[0-9a-f]{32}$/.test(answer.traceID ?? "")) return;
  // The page of a trace waits until its spans arrive, and shows the sentence again.
  sessionStorage.setItem("remark", text);
  location.assign(`/trace/${answer.traceID}`);
}

const refresh = coalesced(async () => {
  const answer = await ask("/controls");
  if (answer) show(answer);
}, 1000);
setInterval(() => document.visibilityState === "visible" && refresh(), 2000);
refresh();
