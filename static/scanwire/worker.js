// @ts-check
/** The SharedWorker that holds the connection for all tabs of a browser. */

import { makeEnv } from "./env.js";
import { Hub } from "./hub.js";

/** @type {Hub | null} */
let hub = null;

globalThis.addEventListener("connect", (event) => {
  const [port] = /** @type {MessageEvent} */ (event).ports;
  const way = { post: (/** @type {unknown} */ told) => port.postMessage(told) };
  port.onmessage = ({ data }) => {
    // All tabs of one worker bring the same settings: its name is made of them.
    hub ??= new Hub(makeEnv(data.settings));
    hub.hear(way, data.said);
  };
});
