// Follows the backend's server-sent events, and shows whether the backend can be reached.

import { text } from "./jaeger.js";
import { byId, setText } from "./dom.js";

const RETRY = 1000;

/**
 * Calls `changed(traceID)` for each trace that changed, and `connected()` whenever the connection opens. Then the
 * caller must query the earlier changes.
 *
 * A browser opens six HTTP/1.1 connections to one server, and an event stream holds one of them for good, so the
 * seventh tab would wait forever. Therefore a hidden tab has no event stream.
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
      // The browser's own retry waits for seconds, and never comes after a response such as 502.
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

/**
 * Returns a function that runs `work`, but never twice at a time, and with a pause after each run. Calls during a run
 * or a pause lead to one more run.
 */
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
