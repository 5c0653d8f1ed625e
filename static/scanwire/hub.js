// @ts-check
/** Serves one connection to several ports, each of which is a page with scans of its own. */

import { Connection } from "./connection.js";

/** @import { Problem, ScanEvent, State } from "../scanwire.d.ts" */
/** @import { Env } from "./env.js" */

/**
 * What a page says.
 * @typedef {{ op: "watch", scans: Record<string, string | null> } | { op: "wake", isElsewhere: boolean }
 *     | { op: "ping" } | { op: "leave" }} Said
 */

/**
 * What it is told. A refusal travels as its parts, since an error loses its class on the way.
 * @typedef {{ op: "event", event: ScanEvent } | { op: "joined", scan: string, from: string | null }
 *     | { op: "closed", scans: string[] } | { op: "failed", scan: string, error: Failure }
 *     | { op: "state", state: Omit<State, "behind"> } | { op: "pong" } | { op: "who" }} Told
 */

/** @typedef {{ name: string, message: string, problem?: Problem, status?: number }} Failure */

/**
 * @typedef {object} Port the way to one page
 * @property {(told: Told) => void} post
 * @property {{ post: (told: Told) => void }} [all] the way to all pages at once, itself among them
 */

const GONE_MS = 150_000; // a page that said nothing for so long is gone; a hidden one's timers fire once a minute

export class Hub {
  #env;
  #connection;
  /** @type {Map<Port, { scans: Set<string>, seen: number }>} */
  #pages = new Map();
  /** @type {unknown} */
  #sweeping = undefined;

  /** @param {Env} env */
  constructor(env) {
    this.#env = env;
    this.#connection = new Connection(env, {
      event: (event) => {
        const scan = event.scan ?? "";
        this.#tell(scan, { op: "event", event });
        const isLast = event.type === "end" || (event.type === "reset" && event.data.snapshot === null);
        if (isLast) this.#forget(scan);
      },
      joined: (scan, from) => this.#tell(scan, { op: "joined", scan, from }),
      closed: (scans) => {
        for (const scan of scans) {
          this.#tell(scan, { op: "closed", scans: [scan] });
          this.#forget(scan);
        }
      },
      failed: (scan, error) => {
        const { name, message, problem, status } = /** @type {any} */ (error);
        this.#tell(scan, { op: "failed", scan, error: { name, message, problem, status } });
        this.#forget(scan);
      },
      state: (state) => {
        for (const port of this.#pages.keys()) port.post({ op: "state", state });
      },
    });
  }

  /**
   * @param {Port} port
   * @param {Said} said
   */
  hear(port, said) {
    const now = this.#env.clock.now();
    let page = this.#pages.get(port);
    if (said.op === "leave") {
      if (page !== undefined) this.#drop(port);
      return;
    }
    if (page === undefined) {
      // It was taken for gone, or another hub served it: its scans are not known here.
      if (said.op !== "watch") return port.post({ op: "who" });
      page = { scans: new Set(), seen: now };
      this.#pages.set(port, page);
      port.post({ op: "state", state: this.#connection.state });
      this.#sweepLater();
    }
    page.seen = now;
    if (said.op === "ping") port.post({ op: "pong" });
    else if (said.op === "wake") this.#connection.wake(said.isElsewhere);
    else this.#watch(port, page, said.scans);
  }

  close() {
    this.#env.clock.clearTimeout(this.#sweeping);
    this.#pages.clear();
    this.#connection.close();
  }

  /**
   * @param {Port} port
   * @param {{ scans: Set<string> }} page
   * @param {Record<string, string | null>} scans all that it watches from now on
   */
  #watch(port, page, scans) {
    const before = page.scans;
    page.scans = new Set(Object.keys(scans));
    for (const scan of before) if (!page.scans.has(scan)) this.#unwatch(scan);
    for (const scan of page.scans) {
      const from = before.has(scan) ? undefined : this.#connection.watch(scan, scans[scan]);
      if (from !== undefined) port.post({ op: "joined", scan, from });
    }
  }

  /** @param {string} scan that one page has left */
  #unwatch(scan) {
    const isWatched = [...this.#pages.values()].some((page) => page.scans.has(scan));
    if (!isWatched) this.#connection.unwatch(scan);
  }

  /** @param {Port} port */
  #drop(port) {
    const scans = this.#pages.get(port)?.scans ?? [];
    this.#pages.delete(port);
    for (const scan of scans) this.#unwatch(scan);
  }

  /** @param {string} scan of which nothing more comes */
  #forget(scan) {
    for (const page of this.#pages.values()) page.scans.delete(scan);
  }

  /**
   * @param {string} scan
   * @param {Told} told
   */
  #tell(scan, told) {
    const ways = new Set();
    for (const [port, page] of this.#pages) if (page.scans.has(scan)) ways.add(port.all ?? port);
    for (const way of ways) way.post(told);
  }

  #sweepLater() {
    const { clock } = this.#env;
    clock.clearTimeout(this.#sweeping);
    if (this.#pages.size < 2) return; // a page alone is the one that this runs in, or what keeps the worker alive
    this.#sweeping = clock.setTimeout(() => {
      for (const [port, page] of this.#pages) if (clock.now() - page.seen > GONE_MS) this.#drop(port);
      this.#sweepLater();
    }, GONE_MS / 5);
  }
}
