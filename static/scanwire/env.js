// @ts-check
/** What the client needs of its surroundings, and how it waits. */

/** @import { Clock, ConnectOptions, Transport } from "../scanwire.d.ts" */

/**
 * What can be sent to a worker.
 * @typedef {object} Settings
 * @property {string} url without a slash at its end
 * @property {string | null} apiKey
 * @property {Transport[]} transports
 * @property {number} patienceMs
 * @property {number} heartbeatMs
 * @property {number} firstByteMs
 * @property {number} retryBetterMs
 */

/**
 * @typedef {object} Parts
 * @property {typeof globalThis.fetch} fetch
 * @property {typeof globalThis.WebSocket | undefined} WebSocket
 * @property {typeof globalThis.EventSource | undefined} EventSource
 * @property {Clock} clock
 * @property {() => number} random
 */

/** @typedef {Settings & Parts} Env */

/** @type {Transport[]} */
const TRANSPORTS = ["fetch", "websocket", "eventsource", "poll"];
const PARTS = /** @type {const} */ (["fetch", "WebSocket", "EventSource", "clock", "random"]);

/** @type {Clock} */
const CLOCK = {
  now: () => performance.now(),
  setTimeout: (callback, ms) => setTimeout(callback, ms),
  clearTimeout: (timer) => clearTimeout(/** @type {any} */ (timer)),
};

/**
 * @param {string | URL | undefined} url
 * @param {ConnectOptions} options
 * @returns {Settings}
 */
export function readSettings(url, options) {
  const page = globalThis.location?.href;
  if (url === undefined && page === undefined) throw new TypeError("connect: outside of a page it needs a URL.");
  const base = new URL(url ?? "/", page);
  if (!/^https?:$/.test(base.protocol)) throw new TypeError(`connect: ${base.href} is not an address of the web.`);
  const { apiKey = null, transports = TRANSPORTS } = options;
  if (apiKey !== null && !/^[\x21-\x7e]+$/.test(apiKey)) {
    throw new TypeError("connect: the API key has characters that no key has.");
  }
  const wrong = transports.find((name) => !TRANSPORTS.includes(name));
  if (wrong !== undefined || transports.length === 0) {
    throw new TypeError(`connect: there is no transport ${wrong}; there are ${TRANSPORTS.join(", ")}.`);
  }
  return {
    url: (base.origin + base.pathname).replace(/\/+$/, ""),
    apiKey,
    transports: [...transports],
    patienceMs: options.patienceMs ?? Infinity,
    heartbeatMs: options.heartbeatMs ?? 15_000,
    firstByteMs: options.firstByteMs ?? 2000,
    retryBetterMs: options.retryBetterMs ?? 300_000,
  };
}

/**
 * @param {Settings} settings
 * @param {ConnectOptions} [options] parts of one's own
 * @returns {Env}
 */
export function makeEnv(settings, options = {}) {
  return {
    ...settings,
    fetch: options.fetch ?? ((input, init) => globalThis.fetch(input, init)),
    WebSocket: options.WebSocket ?? globalThis.WebSocket,
    EventSource: options.EventSource ?? globalThis.EventSource,
    clock: options.clock ?? CLOCK,
    random: options.random ?? Math.random,
  };
}

/**
 * Whether parts were passed in that cannot be sent to another tab or a worker.
 * @param {ConnectOptions} options
 */
export function hasOwnParts(options) {
  return PARTS.some((name) => options[name] !== undefined);
}

export const BACKOFF_BASE_MS = 500;
export const BACKOFF_MAX_MS = 30_000;

/**
 * Full jitter: anything up to a ceiling that doubles with each failure in a row.
 * @param {number} failures before this one
 * @param {number} random in [0, 1)
 */
export function backOff(failures, random) {
  return random * Math.min(BACKOFF_MAX_MS, BACKOFF_BASE_MS * 2 ** Math.min(failures, 16));
}

/**
 * Waits; rejects with the signal's reason.
 * @param {Clock} clock
 * @param {number} ms
 * @param {AbortSignal} [signal]
 * @returns {Promise<void>}
 */
export function sleep(clock, ms, signal) {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) return reject(signal.reason);
    const leave = () => {
      clock.clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = clock.setTimeout(() => {
      signal?.removeEventListener("abort", leave);
      resolve();
    }, ms);
    signal?.addEventListener("abort", leave, { once: true });
  });
}

/** Aborts its signal, which follows another, when what is expected does not come in time. */
export class Deadline {
  #clock;
  #outer;
  #controller = new AbortController();
  /** @type {unknown} */
  #timer = undefined;
  #leave;

  /**
   * @param {Clock} clock
   * @param {AbortSignal} [outer]
   */
  constructor(clock, outer) {
    this.#clock = clock;
    this.#outer = outer;
    this.#leave = () => this.#controller.abort(outer?.reason);
    if (outer?.aborted) this.#leave();
    outer?.addEventListener("abort", this.#leave, { once: true });
  }

  get signal() {
    return this.#controller.signal;
  }

  /**
   * The next thing must be there within `ms`, else `error` is the reason.
   * @param {number} ms
   * @param {() => Error} error
   */
  expect(ms, error) {
    this.#clock.clearTimeout(this.#timer);
    this.#timer = this.#clock.setTimeout(() => this.#controller.abort(error()), ms);
  }

  /** Nothing is expected any more; what is still under way with this signal is left. */
  close() {
    this.#clock.clearTimeout(this.#timer);
    this.#outer?.removeEventListener("abort", this.#leave);
    this.#controller.abort();
  }
}
