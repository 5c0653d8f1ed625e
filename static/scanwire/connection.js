// @ts-check
/**
 * The one connection to the server: brings the events of all scans that are watched, over whatever transport gets
 * through, each from where it was. What was lost or repeated on the way is told apart by who reads them.
 */

import { sleep } from "./env.js";
import { Exhausted, RequestRefused, toError, Unreachable, WrongWay } from "./errors.js";
import { isUpTo } from "./eventstream.js";
import { Ladder } from "./ladder.js";
import { Patience } from "./patience.js";
import { findWay, isThere, readPage, request, TRANSPORTS } from "./transports.js";

/** @import { ScanEvent, State } from "../scanwire.d.ts" */
/** @import { Env } from "./env.js" */

/**
 * @typedef {object} Listener
 * @property {(event: ScanEvent) => void} event
 * @property {(scan: string, from: string | null) => void} joined from now on comes everything of a scan behind `from`
 * @property {(scans: string[]) => void} closed the server has no more of these
 * @property {(scan: string, error: Error) => void} failed nothing more will be tried for this one
 * @property {(state: Omit<State, "behind">) => void} state
 */

const MAX_SCANS = 100; // of one connection; the server's bound
const LOST = "lost"; // where the stream is, when it cannot be said; compares with no cursor
const SETTLE_MS = 10; // what is watched in one go is asked for in one go
const LEAVE_MS = 1000; // a scan that is not watched any more is left with the next change, or after this
const PACE = { opens: 5, withinMs: 5000 }; // more changes than this wait, else the server throttles

export class Connection {
  #env;
  #listener;
  #ladder;
  #patience;
  /** @type {Set<string>} scans that are watched and have not ended */
  #wanted = new Set();
  /** @type {Set<string>} of those, what the stream brings or goes on with */
  #joined = new Set();
  /** @type {string | null} behind the last event that came */
  #cursor = null;
  /** @type {AbortController | null} of the attempt under way */
  #attempt = null;
  /** @type {readonly string[]} */
  #opened = []; // the scans of that attempt
  #isOpen = false; // it has shown a sign of life
  #hasTaken = false; // something durable came since `#cursor` was set from outside
  #isChanging = false; // it was aborted for other scans
  /** @type {{ error: Error, floorMs: number } | null} the server's own parting word */
  #parting = null;
  #isRunning = false;
  #isClosed = false;
  /** @type {number[]} */
  #opens = []; // when the last streams were opened
  /** @type {(() => void) | null} ends the pause, if its floor allows */
  #hurry = null;
  #timers = { settle: /** @type {unknown} */ (undefined), better: /** @type {unknown} */ (undefined) };
  /** @type {AbortController | null} */
  #probe = null;
  /** @type {Omit<State, "behind">} */
  state = { name: "idle", transport: null, until: null, reason: null };

  /**
   * @param {Env} env
   * @param {Listener} listener
   */
  constructor(env, listener) {
    this.#env = env;
    this.#listener = listener;
    this.#patience = new Patience(env);
    const rungs = env.transports.filter((name) => isThere(env, name));
    this.#ladder = new Ladder(rungs.length > 0 ? rungs : ["poll"]);
  }

  /**
   * Brings the events of a scan behind a cursor, or from where the stream is by then: `joined` says which. When the
   * stream brings it already, that is the answer; else it is undefined.
   * @param {string} scan
   * @param {string | null} after
   * @returns {string | null | undefined}
   */
  watch(scan, after) {
    if (this.#isOpen && this.#opened.includes(scan)) {
      this.#wanted.add(scan);
      this.#joined.add(scan);
      return this.#cursor ?? (this.#hasTaken ? LOST : null);
    }
    if (this.#wanted.has(scan) || this.#isClosed) return undefined;
    if (this.#wanted.size >= MAX_SCANS) {
      const detail = `One connection may watch ${MAX_SCANS} scans; close one first.`;
      this.#listener.failed(scan, new RequestRefused({ title: "Too many scans", detail }, 422));
    } else {
      // The first ones say where the stream begins; later ones read for themselves what it is past.
      const isFresh = !this.#isRunning || this.#joined.size === 0;
      if (this.#wanted.size === 0) [this.#cursor, this.#hasTaken] = [after, false];
      else if (isFresh && isUpTo(after, this.#cursor)) this.#cursor = after;
      this.#wanted.add(scan);
      this.#settle(SETTLE_MS);
    }
    return undefined;
  }

  /** @param {string} scan */
  unwatch(scan) {
    this.#wanted.delete(scan);
    this.#joined.delete(scan);
    if (this.#opened.includes(scan)) this.#settle(this.#wanted.size ? LEAVE_MS : SETTLE_MS);
  }

  /**
   * Ends a wait that nobody but this client asked for. With another network what looks open is dead.
   * @param {boolean} [isElsewhere]
   */
  wake(isElsewhere = false) {
    this.#hurry?.();
    const opened = this.#opens.at(-1) ?? -Infinity;
    if (isElsewhere && this.#isOpen && this.#env.clock.now() - opened > LEAVE_MS) this.#reopen();
  }

  close() {
    this.#isClosed = true;
    this.#wanted.clear();
    this.#joined.clear();
    this.#env.clock.clearTimeout(this.#timers.settle);
    this.#attempt?.abort();
    this.#hurry?.();
    this.#leaveBetter();
  }

  // What is watched has changed.

  /** @param {number} ms */
  #settle(ms) {
    const { clock } = this.#env;
    clock.clearTimeout(this.#timers.settle);
    this.#opens = this.#opens.filter((at) => clock.now() - at < PACE.withinMs);
    const paced =
      this.#opens.length < PACE.opens || this.#wanted.size === 0 ? ms : Math.max(ms, PACE.withinMs / PACE.opens);
    this.#timers.settle = clock.setTimeout(() => {
      if (!this.#isRunning) {
        if (this.#wanted.size > 0) void this.#run();
        return;
      }
      const scans = [...this.#wanted];
      if (scans.length === this.#opened.length && scans.every((scan) => this.#opened.includes(scan))) return;
      this.#reopen();
      if (scans.length === 0) this.#hurry?.();
    }, paced);
  }

  #reopen() {
    this.#isChanging = true;
    this.#attempt?.abort();
  }

  // The loop.

  async #run() {
    this.#isRunning = true;
    while (this.#wanted.size > 0) {
      this.#attempt = new AbortController();
      this.#isChanging = false;
      this.#parting = null;
      const began = this.#env.clock.now();
      let hasOpened = false;
      let error;
      try {
        await this.#bring(() => (hasOpened = true));
        this.#finish(this.#opened);
        continue;
      } catch (thrown) {
        error = this.#said()?.error ?? toError(thrown);
      } finally {
        this.#attempt.abort();
        this.#attempt = null;
        this.#isOpen = false;
      }
      if (this.#isChanging || this.#wanted.size === 0) continue;
      await this.#recover(error, hasOpened, began);
    }
    this.#isRunning = false;
    this.#opened = [];
    this.#leaveBetter();
    if (this.state.name !== "closed") this.#show(this.#isClosed ? "closed" : "idle", { transport: null });
  }

  /** @param {() => void} noteOpened */
  async #bring(noteOpened) {
    const signal = /** @type {AbortController} */ (this.#attempt).signal;
    const name = this.#ladder.current;
    const from = this.#cursor;
    this.#opened = [...this.#wanted];
    this.#opens.push(this.#env.clock.now());
    this.#show("connecting", { transport: name });
    await TRANSPORTS[name](
      this.#env,
      {
        scans: this.#opened,
        cursor: () => this.#cursor,
        opened: () => {
          noteOpened();
          this.#isOpen = true;
          this.#ladder.note(name);
          this.#show(name === "poll" ? "polling" : "live", { transport: name });
          this.#tryBetterLater();
          this.#join(from);
        },
        take: (event) => this.#take(event),
        retry: (ms) => (this.#patience.retryMs = ms),
      },
      signal,
    );
  }

  /** @param {string | null} from */
  #join(from) {
    for (const scan of this.#opened) {
      if (this.#joined.has(scan) || !this.#wanted.has(scan)) continue;
      this.#joined.add(scan);
      this.#listener.joined(scan, from);
    }
  }

  /** @param {ScanEvent} event */
  #take(event) {
    if (event.type === "bye") {
      this.#part(new Unreachable("The server is stopping."), event.data.reconnect_ms);
    } else if (event.type === "throttled") {
      const problem = event.data.problem ?? { title: "Too many requests", status: 429 };
      const ms = (event.data.retry_after_s ?? 0) * 1000;
      this.#part(new RequestRefused(problem, problem.status ?? 429, ms), ms);
    }
    if (event.type === "reset") {
      this.#cursor = null;
      this.#hasTaken = true;
    } else if (event.id !== undefined && !(this.#cursor !== null && isUpTo(event.id, this.#cursor))) {
      this.#cursor = event.id;
      this.#hasTaken = true;
      this.#patience.renew();
    }
    if (event.scan === null || !this.#wanted.has(event.scan)) return;
    const isLast = event.type === "end" || (event.type === "reset" && event.data.snapshot === null);
    if (isLast) {
      this.#wanted.delete(event.scan);
      this.#joined.delete(event.scan);
      if (this.#wanted.size === 0) this.#attempt?.abort();
    }
    this.#listener.event(event);
  }

  /**
   * @param {Error} error
   * @param {unknown} ms
   */
  #part(error, ms) {
    this.#parting = { error, floorMs: typeof ms === "number" ? ms : 0 };
    this.#attempt?.abort();
  }

  #said() {
    return this.#parting; // by a method, since tsc does not see that a callback sets it
  }

  /** @param {readonly string[]} scans of which the server has no more */
  #finish(scans) {
    const open = scans.filter((scan) => this.#wanted.delete(scan));
    for (const scan of open) this.#joined.delete(scan);
    if (open.length > 0) this.#listener.closed(open);
  }

  // When it cannot go on.

  /**
   * @param {Error} error
   * @param {boolean} hasOpened
   * @param {number} began
   */
  async #recover(error, hasOpened, began) {
    let isHeld = error instanceof WrongWay;
    if (!hasOpened && !this.#parting && !isHeld && !(error instanceof RequestRefused)) {
      // It cannot tell why; a plain request can.
      const found = await this.#askPlainly();
      if (this.#isChanging || this.#wanted.size === 0) return;
      if (found === null) isHeld = this.#ladder.current !== "poll";
      else error = found;
    }
    if (isHeld && this.#ladder.blame(error instanceof WrongWay)) return;
    const refusal = error instanceof RequestRefused ? error : null;
    if (error instanceof Exhausted || (refusal !== null && !this.#parting && !refusal.isPassing)) {
      await this.#giveUp(error);
      return;
    }
    const floorMs = this.#parting?.floorMs ?? refusal?.retryAfterMs ?? 0;
    const waitMs = this.#patience.spend(began, floorMs);
    if (waitMs === null) {
      for (const scan of [...this.#wanted]) this.#fail(scan, error);
      this.#show("closed", { transport: null, reason: error.message });
      return;
    }
    await this.#pause(waitMs, floorMs, refusal !== null && floorMs > 0 ? "throttled" : "offline", error.message);
  }

  /** What a plain request comes to: null when it is answered, else why not. */
  async #askPlainly() {
    this.#attempt = new AbortController();
    try {
      const page = await readPage(this.#env, this.#opened, this.#cursor, this.#attempt.signal);
      if (page.isClosed && page.events.length === 0) this.#finish(this.#opened);
      return null;
    } catch (error) {
      return toError(error);
    } finally {
      this.#attempt = null;
    }
  }

  /**
   * A refusal that waiting does not help. Of several scans it may be the fault of one.
   * @param {Error} error
   */
  async #giveUp(error) {
    const scans = [...this.#wanted];
    if (scans.length > 1 && error instanceof RequestRefused && ![401, 403].includes(error.status)) {
      for (const scan of scans) {
        try {
          const { answer } = await request(this.#env, `/v1/scans/${encodeURIComponent(scan)}`);
          if (answer.status === 404) this.#fail(scan, error);
        } catch {} // cannot be told just now; the next attempt will
      }
      if (this.#wanted.size < scans.length) return;
    }
    for (const scan of scans) this.#fail(scan, error);
    const isForAll = error instanceof Exhausted || [401, 403].includes(/** @type {any} */ (error).status);
    if (isForAll) this.#show("closed", { transport: null, reason: error.message });
  }

  /**
   * @param {string} scan
   * @param {Error} error
   */
  #fail(scan, error) {
    this.#wanted.delete(scan);
    this.#joined.delete(scan);
    this.#listener.failed(scan, error);
  }

  /**
   * @param {number} ms
   * @param {number} floorMs what the server asked for; nothing shortens it
   * @param {"offline" | "throttled"} name
   * @param {string} reason
   */
  async #pause(ms, floorMs, name, reason) {
    const { clock } = this.#env;
    const began = clock.now();
    const rest = new AbortController();
    this.#hurry = () => {
      const left = this.#wanted.size > 0 ? began + floorMs - clock.now() : 0;
      if (left <= 0) rest.abort();
    };
    this.#show(name, { until: Date.now() + ms, reason });
    try {
      await sleep(clock, ms, rest.signal);
    } catch {} // hurried
    this.#hurry = null;
  }

  // A better transport.

  #tryBetterLater() {
    this.#leaveBetter();
    if (this.#ladder.better.length === 0) return;
    this.#timers.better = this.#env.clock.setTimeout(() => void this.#tryBetter(), this.#env.retryBetterMs);
  }

  #leaveBetter() {
    this.#env.clock.clearTimeout(this.#timers.better);
    this.#probe?.abort();
  }

  /** Opens a stream beside the present one; the first byte decides. */
  async #tryBetter() {
    const { signal } = (this.#probe = new AbortController());
    const better = await findWay(this.#env, this.#ladder.better, [...this.#wanted], this.#cursor, signal);
    if (signal.aborted) return;
    if (better === null) return this.#tryBetterLater();
    this.#ladder.note(better);
    this.#reopen();
  }

  /**
   * @param {State["name"]} name
   * @param {Partial<State>} rest
   */
  #show(name, { transport = this.state.transport, until = null, reason = null }) {
    this.state = { name, transport, until, reason };
    this.#listener.state(this.state);
  }
}
