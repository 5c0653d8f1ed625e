// @ts-check
/**
 * What a page has of the one connection of its browser, wherever that lives: in a SharedWorker, in the tab that leads
 * (by a Web Lock, over a BroadcastChannel), or in this page. Whoever holds it may vanish: then another takes over within
 * two seconds, and every page says again what it watches and from where.
 */

import { Hub } from "./hub.js";

/** @import { Env, Settings } from "./env.js" */
/** @import { Port, Said, Told } from "./hub.js" */

/**
 * @typedef {object} Surroundings what sharing needs of a browser; missing parts are done without
 * @property {typeof globalThis.SharedWorker} [SharedWorker]
 * @property {LockManager} [locks]
 * @property {typeof globalThis.BroadcastChannel} [BroadcastChannel]
 * @property {Document} [document]
 * @property {EventTarget} [window]
 */

/** @typedef {{ post: (said: Said) => void, close: () => void }} Way to the hub */

const PING_MS = 400; // of a page that is shown; whoever does not answer for LOST_MS has lost its place
const LOST_MS = 800;
const HIDDEN_PING_MS = 30_000; // to stay known; such a page judges nobody
const WORKER_START_MS = 2000;
const WORKER_TRIES = 2;

export class Link {
  #settings;
  #env;
  #around;
  #hear;
  #describe;
  #mode;
  #name;
  #id = Math.random().toString(36).slice(2);
  /** @type {Way | null} null while this page is suspended */
  #way = null;
  #workers = 0; // in a row that never answered
  /** @type {unknown} */
  #timer = undefined;
  #pinged = Infinity; // since when an answer is waited for
  #ticked = 0;
  #isHeard = false; // by the present way
  #leaving = new AbortController();

  /**
   * @param {Settings} settings
   * @param {Env} env
   * @param {"worker" | "leader" | "none"} mode the first that is tried
   * @param {Surroundings} around
   * @param {(told: Told) => void} hear
   * @param {() => Record<string, string | null>} describe what is watched, and from where on
   */
  constructor(settings, env, mode, around, hear, describe) {
    this.#settings = settings;
    this.#env = env;
    this.#mode = mode;
    this.#around = around;
    this.#hear = hear;
    this.#describe = describe;
    this.#name = nameGroup(settings);
    this.#observe();
    this.#open();
  }

  /** What is watched has changed. */
  update() {
    this.#way?.post({ op: "watch", scans: this.#describe() });
    this.#tickLater();
  }

  /** @param {boolean} [isElsewhere] another network */
  wake(isElsewhere = false) {
    this.#way?.post({ op: "wake", isElsewhere });
  }

  close() {
    this.#leaving.abort();
    this.#suspend();
  }

  // This page.

  #observe() {
    const { document, window } = this.#around;
    const { signal } = this.#leaving;
    /** @param {EventTarget | undefined} target @param {string} type @param {(event: any) => void} act */
    const on = (target, type, act) => target?.addEventListener(type, act, { signal });
    on(window, "online", () => this.wake(true));
    on(document, "visibilitychange", () => {
      if (!this.#isShown) return;
      this.wake();
      this.#tick();
    });
    // With a lock, a channel or a connection no page gets into the back/forward cache.
    on(window, "pagehide", () => this.#suspend());
    on(window, "pageshow", () => this.#resume());
    on(document, "freeze", () => this.#suspend());
    on(document, "resume", () => this.#resume());
  }

  get #isShown() {
    return this.#around.document?.visibilityState !== "hidden";
  }

  #suspend() {
    this.#env.clock.clearTimeout(this.#timer);
    this.#way?.post({ op: "leave" });
    this.#way?.close();
    this.#way = null;
  }

  #resume() {
    if (this.#way === null && !this.#leaving.signal.aborted) this.#open();
  }

  // Where the connection lives.

  #open() {
    this.#pinged = Infinity;
    this.#isHeard = false;
    const way = this.#openWay();
    this.#way = way;
    // What is watched is said again to whoever holds the connection now.
    if (Object.keys(this.#describe()).length > 0) this.update();
  }

  #openWay() {
    const { SharedWorker, BroadcastChannel, locks } = this.#around;
    if (this.#mode === "worker") {
      try {
        if (SharedWorker && this.#workers < WORKER_TRIES) return this.#openWorker(SharedWorker);
      } catch {} // of another origin, or forbidden by the page's policy
      this.#mode = "leader";
    }
    if (this.#mode === "leader") {
      try {
        if (BroadcastChannel && locks) return this.#openChannel(BroadcastChannel, locks);
      } catch {} // in a sandbox
      this.#mode = "none";
    }
    return this.#openOwn();
  }

  /** @returns {Way} */
  #openOwn() {
    const hub = new Hub(this.#env);
    const port = { post: this.#hear };
    return { post: (said) => hub.hear(port, said), close: () => hub.close() };
  }

  /**
   * @param {typeof globalThis.SharedWorker} SharedWorker
   * @returns {Way}
   */
  #openWorker(SharedWorker) {
    const worker = new SharedWorker(new URL("./worker.js", import.meta.url), { type: "module", name: this.#name });
    const leaving = new AbortController();
    worker.onerror = () => this.#lose(way);
    worker.port.onmessage = ({ data }) => {
      if (data.life === undefined) return this.#receive(way, data);
      // Whoever gets this lock learns that the worker is dead, in a hidden tab as well.
      const { signal } = leaving;
      const options = /** @type {const} */ ({ mode: "shared", signal });
      this.#around.locks?.request(data.life, options, () => this.#lose(way)).catch(() => {});
    };
    /** @type {Way} */
    const way = {
      post: (said) => worker.port.postMessage({ said, settings: this.#settings }),
      close: () => {
        leaving.abort();
        worker.port.close();
      },
    };
    return way;
  }

  /**
   * @param {typeof globalThis.BroadcastChannel} BroadcastChannel
   * @param {LockManager} locks
   * @returns {Way}
   */
  #openChannel(BroadcastChannel, locks) {
    const channel = new BroadcastChannel(this.#name);
    let waiting = new AbortController();
    /** @type {Hub | null} */
    let hub = null;
    /** @type {Map<string, Port>} */
    const ports = new Map();
    const all = {
      post: (/** @type {Told} */ told) => {
        channel.postMessage({ to: null, told });
        this.#receive(way, told); // a channel does not bring back what one says
      },
    };
    const own = { post: (/** @type {Told} */ told) => this.#receive(way, told), all };
    /** @param {string} id */
    const findPort = (id) => {
      const port = ports.get(id) ?? { post: (/** @type {Told} */ told) => channel.postMessage({ to: id, told }), all };
      ports.set(id, port);
      return port;
    };
    /** @type {() => void} */
    let release = () => {};
    const lead = () =>
      new Promise((resolve) => {
        release = () => {
          hub?.close();
          hub = null;
          resolve(undefined);
        };
        ports.clear();
        hub = new Hub(this.#env);
        all.post({ op: "who" });
      });
    /** @param {boolean} steal from a leader that does not answer */
    const stand = (steal) => {
      waiting.abort();
      const { signal } = (waiting = new AbortController());
      locks.request(this.#name, steal ? { steal } : { signal }, lead).catch((error) => {
        if (signal.aborted) return; // by ourselves
        release();
        if (error.name === "AbortError") return stand(false); // stolen from us, since we did not answer
        this.#mode = "none"; // locks are forbidden here
        this.#lose(way);
      });
    };
    channel.onmessage = ({ data }) => {
      if (data.from !== undefined) hub?.hear(findPort(data.from), data.said);
      else if (hub === null && (data.to === null || data.to === this.#id)) this.#receive(way, data.told);
    };
    /** @type {Way} */
    const way = {
      post: (said) => {
        if (hub !== null) hub.hear(own, said);
        else channel.postMessage({ from: this.#id, said });
      },
      close: () => {
        waiting.abort();
        release();
        channel.close();
      },
    };
    this.#steal = () => stand(true);
    stand(false);
    return way;
  }

  /** @type {() => void} */
  #steal = () => {};

  /**
   * @param {Way} way
   * @param {Told} told
   */
  #receive(way, told) {
    if (way !== this.#way) return;
    this.#pinged = Infinity;
    this.#isHeard = true;
    this.#workers = 0;
    if (told.op === "who") this.update();
    else if (told.op !== "pong") this.#hear(told);
  }

  // Whether who holds it is still there.

  #tickLater() {
    const { clock } = this.#env;
    clock.clearTimeout(this.#timer);
    if (this.#mode === "none" || this.#way === null || Object.keys(this.#describe()).length === 0) return;
    this.#ticked = clock.now();
    this.#timer = clock.setTimeout(() => this.#tick(), this.#isShown ? PING_MS : HIDDEN_PING_MS);
  }

  #tick() {
    const now = this.#env.clock.now();
    const way = this.#way;
    // A tick that is late was held up here: an answer may lie unread.
    const wasAsleep = now - this.#ticked > 2 * PING_MS;
    const limitMs = this.#mode === "worker" && !this.#isHeard ? WORKER_START_MS : LOST_MS;
    if (way !== null && !wasAsleep && now - this.#pinged >= limitMs) return this.#lose(way);
    if (wasAsleep || this.#pinged === Infinity) this.#pinged = now;
    way?.post({ op: "ping" });
    this.#tickLater();
  }

  /** @param {Way} way that does not answer */
  #lose(way) {
    if (way !== this.#way) return;
    if (this.#mode !== "leader") {
      this.#workers += 1;
      way.close();
      this.#open();
    } else {
      this.#pinged = Infinity;
      this.#steal();
      this.#tickLater();
    }
  }
}

/**
 * Only pages with the same settings share; an API key is not told to the others.
 * @param {Settings} settings
 */
function nameGroup(settings) {
  let hash = 0xcbf29ce484222325n;
  for (const unit of JSON.stringify(settings)) {
    hash = BigInt.asUintN(64, (hash ^ BigInt(unit.codePointAt(0) ?? 0)) * 0x100000001b3n);
  }
  return `scanwire ${hash.toString(36)}`;
}
