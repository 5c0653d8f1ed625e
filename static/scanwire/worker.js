// @ts-check
/** The SharedWorker that holds the connection for all tabs of a browser. */

import { makeEnv } from "./env.js";
import { Hub } from "./hub.js";

/** @type {Hub | null} */
let hub = null;

/** The name of a lock that is held as long as this worker lives; undefined where there are no locks. */
const life = new Promise((resolve) => {
  const { locks } = navigator;
  if (locks === undefined) return resolve(undefined);
  const name = `scanwire worker ${Math.random().toString(36).slice(2)}`;
  const hold = () => {
    resolve(name);
    return new Promise(() => {});
  };
  locks.request(name, hold).catch(() => resolve(undefined)); // forbidden here
});

globalThis.addEventListener("connect", (event) => {
  const [port] = /** @type {MessageEvent} */ (event).ports;
  const way = { post: (/** @type {unknown} */ told) => port.postMessage(told) };
  port.onmessage = ({ data }) => {
    // All tabs of one worker bring the same settings: its name is made of them.
    hub ??= new Hub(makeEnv(data.settings));
    hub.hear(way, data.said);
  };
  void life.then((name) => name && port.postMessage({ life: name }));
});
