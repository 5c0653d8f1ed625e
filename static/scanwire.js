// @ts-check
/** The Scanwire client for JavaScript; scanwire.d.ts documents it. */

import { backOff, hasOwnParts, makeEnv, readSettings, sleep } from "./scanwire/env.js";
import { ScanwireError, Unreachable } from "./scanwire/errors.js";
import { Scan } from "./scanwire/scan.js";
import { Session } from "./scanwire/session.js";
import { readRefusal, request } from "./scanwire/transports.js";

/** @import * as api from "./scanwire.d.ts" */

export { BrokenStream, RequestRefused, ResultLost, ScanFailed, ScanwireError, Unreachable } from "./scanwire/errors.js";

const REQUEST_TRIES = 3; // of one request, while connections break
const KEEP_ROWS = 100_000;

/** @type {typeof api.connect} */
export function connect(url, options = {}) {
  return new Scanwire(url, options);
}

/** @implements {api.Scanwire} */
class Scanwire {
  #env;
  #session;
  #keepRows;

  /**
   * @param {string | URL | undefined} url
   * @param {api.ConnectOptions} options
   */
  constructor(url, options) {
    const settings = readSettings(url, options);
    const { document, navigator, SharedWorker, BroadcastChannel } = globalThis;
    const isPage = document !== undefined && !hasOwnParts(options);
    const wanted = options.share ?? "auto";
    const mode = !isPage || wanted === "none" ? "none" : wanted === "auto" ? "worker" : wanted;
    const around = isPage
      ? { document, window: globalThis, SharedWorker, BroadcastChannel, locks: navigator.locks }
      : {};
    const canShare = around.SharedWorker !== undefined || around.locks !== undefined;
    if (isPage && options.transports === undefined && (mode === "none" || !canShare)) {
      // Each tab has a connection of its own, and a browser has six for streams over HTTP/1.1, in all tabs together.
      settings.transports = ["websocket", "fetch", "eventsource", "poll"];
    }
    this.url = settings.url;
    this.#keepRows = options.keepRows ?? KEEP_ROWS;
    this.#env = makeEnv(settings, options);
    this.#session = new Session(settings, this.#env, mode, around);
  }

  get state() {
    return this.#session.state;
  }

  /**
   * @param {string} scanner
   * @param {Record<string, unknown>} [params]
   * @param {api.SubmitOptions} [options]
   */
  async submit(scanner, params = {}, { reuse, cancelWhenUnwatchedS, idempotencyKey, signal } = {}) {
    const body = { scanner, params, reuse, cancel_when_unwatched_s: cancelWhenUnwatchedS };
    const headers = { "Content-Type": "application/json", "Idempotency-Key": idempotencyKey ?? makeKey() };
    const init = { body: JSON.stringify(body), headers };
    /** @type {api.Snapshot} */
    const snapshot = await this.#ask("POST", "/v1/scans", { signal }, init);
    return this.#open(snapshot.id, { snapshot, signal });
  }

  /**
   * @param {string} id
   * @param {api.WatchOptions} [options]
   */
  watch(id, { after, signal } = {}) {
    return this.#open(id, { after, signal });
  }

  /**
   * @param {api.RequestOptions} [options]
   * @returns {Promise<api.Scanners>}
   */
  scanners(options) {
    return this.#ask("GET", "/v1/scanners", options);
  }

  /**
   * @param {api.ListOptions} [options]
   * @returns {Promise<{ scans: api.Snapshot[], next: string | null }>}
   */
  list({ limit = 50, before, signal } = {}) {
    const from = before === undefined ? "" : `&before=${encodeURIComponent(before)}`;
    return this.#ask("GET", `/v1/scans?limit=${limit}${from}`, { signal });
  }

  /**
   * @param {"state"} type
   * @param {(state: api.State) => void} listener
   */
  on(type, listener) {
    if (type !== "state") throw new TypeError(`There are no events ${type}; there is "state".`);
    const { listeners } = this.#session;
    listeners.add(listener);
    listener(this.state);
    return () => void listeners.delete(listener);
  }

  reconnect() {
    this.#session.wake();
  }

  close() {
    this.#session.close();
  }

  /**
   * @param {string} id
   * @param {{ after?: string, snapshot?: api.Snapshot, signal?: AbortSignal }} given
   * @returns {api.Scan}
   */
  #open(id, given) {
    const ask = this.#ask.bind(this);
    return new Scan(this.#session, ask, id, { ...given, keepRows: this.#keepRows });
  }

  /**
   * The JSON of one answer. A request whose connection broke is sent again, REQUEST_TRIES times in all.
   * @param {string} method
   * @param {string} path
   * @param {api.RequestOptions} [options]
   * @param {RequestInit} [init]
   * @returns {Promise<any>}
   */
  async #ask(method, path, { signal } = {}, init = {}) {
    const headers = { Accept: "application/json", ...init.headers };
    for (let tries = 1; ; tries += 1) {
      try {
        const { answer, text } = await request(this.#env, path, { ...init, method, headers, signal });
        if (!answer.ok) throw readRefusal(answer, text);
        return JSON.parse(text);
      } catch (error) {
        if (error instanceof SyntaxError)
          throw new ScanwireError(`What answers at ${this.url} is not a Scanwire server.`);
        if (!(error instanceof Unreachable) || tries >= REQUEST_TRIES) throw error;
        await sleep(this.#env.clock, backOff(tries - 1, this.#env.random()), signal);
      }
    }
  }
}

/** A key that nobody else makes, also where `crypto.randomUUID` is missing: in pages that came over plain HTTP. */
function makeKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
