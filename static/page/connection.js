// @ts-check
/** How the connection is doing, in the corner of the page. */

import { find, findButton, setText } from "./dom.js";
import { formatWhole } from "./format.js";

/** @import { Scanwire, State } from "../scanwire.d.ts" */

/** @type {Record<string, string>} */
const TRANSPORTS = { fetch: "event stream", websocket: "WebSocket", eventsource: "EventSource", poll: "polls" };
const TICK_MS = 250;
const CALM_MS = 400; // what passes sooner is not shown: it would only flicker

/** @param {Scanwire} scanwire */
export function showConnection(scanwire) {
  const box = find("connection");
  const text = find("connection-text");
  const now = findButton("connection-now");
  let state = scanwire.state;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;

  const show = () => {
    clearTimeout(timer);
    if (document.hidden) return;
    box.dataset.state = state.name;
    setText(text, describe(state));
    text.title = state.reason ?? "";
    now.hidden = state.name !== "offline";
    if (state.until !== null) timer = setTimeout(show, TICK_MS);
  };
  now.addEventListener("click", () => scanwire.reconnect());
  document.addEventListener("visibilitychange", show);
  scanwire.on("state", (next) => {
    const isCalm = next.name === "offline" || next.name === "live" || next.name === state.name;
    state = next;
    clearTimeout(timer);
    timer = setTimeout(show, isCalm ? 0 : CALM_MS);
  });
}

/** @param {State} state */
function describe({ name, transport, until, reason, behind }) {
  const by = transport === null ? "" : ` · ${TRANSPORTS[transport] ?? transport}`;
  const rest = until === null ? "" : ` in ${Math.max(Math.ceil((until - Date.now()) / 1000), 0)} s`;
  if (name === "live") return `Live${by}`;
  if (name === "catching-up") return `${formatWhole(behind)} behind${by}`;
  if (name === "polling") return `Polling${rest === "" ? "" : `, next${rest}`}`;
  if (name === "offline") return rest === "" ? "Offline" : `Offline, next attempt${rest}`;
  if (name === "throttled") return `Sent away, back${rest}`;
  if (name === "connecting") return "Connecting…";
  if (name === "closed") return reason ?? "Closed";
  return "Nothing to watch";
}
