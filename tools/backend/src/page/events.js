// Follows the backend's server-sent events, and says whether it is there.

import { text } from "./jaeger.js";
import { byId, setText } from "./dom.js";

const RETRY = 1000;

/**
 * Calls `changed(traceID)` for each trace that changed, and `connected()` whenever events start to flow: what came
 * before has to be asked for.
 *
 * A browser opens six HTTP/1.1 connections to one server, and an event stream holds one for good: the seventh tab
 * would wait forever. So a tab that nobody sees has none.
 */
export function follow({ changed, connected }) {
  let source = null;
  let retry = 0;

  function open() {
    if (source) return;
    source = new EventSource("/api/events");
    source.onopen = () => {
      show("live");
      connected();
    };
    source.onmessage = ({ data }) => changed(traceIDOf(data));
    source.onerror = () => {
      show("reconnecting");
      // The browser's own retry waits for seconds, and never comes after an answer such as 502.
      close();
      retry = setTimeout(open, RETRY);
    };
  }

  function close() {
    clearTimeout(retry);
    source?.close();
    source = null;
  }

  const followWhileSeen = () => (document.visibilityState === "visible" ? open() : close());
  document.addEventListener("visibilitychange", followWhileSeen);
  addEventListener("pagehide", close);
  addEventListener("pageshow", followWhileSeen);
  followWhileSeen();
}

function traceIDOf(data) {
  try {
    return text(JSON.parse(data)?.traceID);
  } catch {
    return "";
  }
}

function show(state) {
  const connection = byId("connection");
  connection.dataset.state = state;
  setText(connection, state);
  byId("gone").hidden = state === "live";
}

/** `work`, but never twice at a time, and with a pause after each: calls in between lead to one more. */
export function coalesced(work, pause) {
  let running = false;
  let again = false;
  return async () => {
    again = true;
    if (running) return;
    running = true;
    while (again) {
      again = false;
      await work();
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
    running = false;
  };
}
