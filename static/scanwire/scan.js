// @ts-check
/** One scan, as the page that watches it sees it. */

import { RequestRefused, ResultLost, ScanFailed } from "./errors.js";
import { Buffer } from "./sinks.js";

/** @import { End, Progress, RequestOptions, Row, ScanEvent, Snapshot } from "../scanwire.d.ts" */
/** @import { Session } from "./session.js" */

/** @typedef {(method: string, path: string, options?: RequestOptions) => Promise<any>} Ask */

export class Scan {
  #session;
  #ask;
  #after;
  #keepRows;
  #signal;
  #path;
  /** @type {Map<string, Set<(...given: any[]) => void>>} */
  #listeners = new Map();
  /** @type {Set<import("./reader.js").Reader>} */
  #readers = new Set();
  #hasBegun = false;
  #isWhole; // what was received began with the first event
  /** @type {Row[]} */
  #rows = [];
  /** @type {Promise<void>} */
  #finished;
  /** @type {(error: Error | null) => void} */
  #finish = () => {};
  /** @type {Snapshot | null} */
  snapshot;
  matches = 0;
  /** @type {Progress | null} */
  progress = null;
  /** @type {End | null} */
  end = null;
  /** @type {Error | null} */
  error = null;

  /**
   * @param {Session} session
   * @param {Ask} ask
   * @param {string} id
   * @param {{ after?: string, snapshot?: Snapshot, keepRows: number, signal?: AbortSignal }} given
   */
  constructor(session, ask, id, { after, snapshot, keepRows, signal }) {
    this.id = id;
    this.snapshot = snapshot ?? null;
    this.#session = session;
    this.#ask = ask;
    this.#after = after ?? null;
    this.#isWhole = after === undefined;
    this.#keepRows = keepRows;
    this.#signal = signal;
    this.#path = `/v1/scans/${encodeURIComponent(id)}`;
    this.#finished = new Promise((resolve, reject) => {
      this.#finish = (error) => (error === null ? resolve() : reject(error));
    });
    this.#finished.catch(() => {}); // not everybody asks
    signal?.addEventListener("abort", () => this.#stop(signal.reason), { once: true });
  }

  get rows() {
    return this.#rows;
  }

  /**
   * @param {string} type
   * @param {(...given: any[]) => void} listener
   * @returns {() => void}
   */
  on(type, listener) {
    const listeners = this.#listeners.get(type) ?? new Set();
    this.#listeners.set(type, listeners.add(listener));
    this.#begin();
    return () => void listeners.delete(listener);
  }

  /** @returns {AsyncIterator<ScanEvent, undefined>} */
  [Symbol.asyncIterator]() {
    const buffer = new Buffer();
    const reader = this.#read(buffer);
    return {
      next: () => buffer.take(),
      return: async () => {
        reader?.finish();
        return { done: true, value: undefined };
      },
    };
  }

  async result() {
    this.#begin();
    await this.#finished;
    const end = this.end ?? (await this.#look()).end;
    if (end === null) throw new ResultLost(`The watching of scan ${this.id} was closed before its end.`);
    if (end.state === "failed" || end.state === "lost") throw new ScanFailed(end);
    const isKept = this.#isWhole && this.#rows.length === end.matches;
    const rows = isKept ? [...this.#rows] : await this.#fetchRows();
    if (rows.length !== end.matches) {
      throw new ResultLost(`The rows received of scan ${this.id} are not the ones that it found.`);
    }
    return rows;
  }

  /** @param {RequestOptions} [options] */
  async cancel(options) {
    this.snapshot = /** @type {Snapshot} */ (await this.#ask("DELETE", this.#path, options));
    return this.snapshot;
  }

  /** @param {RequestOptions} [options] */
  async look(options) {
    this.snapshot = /** @type {Snapshot} */ (await this.#ask("GET", this.#path, options));
    return this.snapshot;
  }

  close() {
    this.#stop(null);
  }

  // Watching.

  #begin() {
    if (this.#hasBegun) return;
    this.#hasBegun = true;
    this.#read({
      push: (event) => this.#take(event),
      isFull: () => false,
      room: () => Promise.resolve(),
      finish: (error) => this.#settle(error),
    });
  }

  /** @param {import("./reader.js").Sink} sink */
  #read(sink) {
    if (this.#signal?.aborted) {
      sink.finish(this.#signal.reason);
      return null;
    }
    const reader = this.#session.read(this.id, this.#after, {
      ...bind(sink),
      finish: (error) => {
        this.#readers.delete(reader);
        sink.finish(error);
      },
    });
    this.#readers.add(reader);
    return reader;
  }

  /** @param {Error | null} error */
  #stop(error) {
    for (const reader of [...this.#readers]) reader.finish(error);
  }

  /** @param {Error | null} error */
  #settle(error) {
    this.error = error;
    this.#finish(error);
    if (error !== null) this.#call("error", error);
  }

  /** @param {ScanEvent} event */
  #take(event) {
    const { type, data } = event;
    if (type === "matches") {
      this.matches += data.rows.length;
      this.#keep(data.rows);
      this.#call(type, data.rows, event);
    } else {
      if (type === "progress") this.progress = data;
      if (type === "end") this.end = data;
      if (type === "reset") this.#forget();
      this.#call(type, data, event);
    }
    this.#call("event", event);
  }

  /** @param {Row[]} rows */
  #keep(rows) {
    for (const row of rows) this.#rows.push(row);
    // Cut in large pieces: a cut for each event would move all rows each time.
    if (this.#rows.length > this.#keepRows * 1.25) this.#rows.splice(0, this.#rows.length - this.#keepRows);
  }

  #forget() {
    this.#rows = [];
    this.matches = 0;
    this.progress = null;
    this.#isWhole = true; // everything comes again
  }

  /**
   * @param {string} type
   * @param {...unknown} given
   */
  #call(type, ...given) {
    for (const listener of [...(this.#listeners.get(type) ?? [])]) {
      try {
        listener(...given);
      } catch (error) {
        // The listener's fault is reported as such, and holds up nobody else.
        queueMicrotask(() => {
          throw error;
        });
      }
    }
  }

  // Results.

  async #look() {
    try {
      return await this.look();
    } catch (error) {
      throw this.#explainLoss(error);
    }
  }

  /** @returns {Promise<Row[]>} */
  async #fetchRows() {
    try {
      return (await this.#ask("GET", `${this.#path}/matches`, { signal: this.#signal })).rows;
    } catch (error) {
      throw this.#explainLoss(error);
    }
  }

  /** @param {unknown} error */
  #explainLoss(error) {
    const isGone = error instanceof RequestRefused && [404, 410].includes(error.status);
    return isGone ? new ResultLost(`The rows of scan ${this.id} are not kept any more. Submit it again.`) : error;
  }
}

/** @param {import("./reader.js").Sink} sink */
function bind(sink) {
  return {
    push: sink.push.bind(sink),
    isFull: sink.isFull.bind(sink),
    room: sink.room.bind(sink),
  };
}
