// @ts-check
/**
 * One reader of one scan, with a position of its own. While it is level with the stream it is given what comes; when it
 * was left behind (it joined late, something was lost, or nobody took what it read) it reads on in the server's log,
 * page by page and no faster than it is read itself, until it is level again.
 */

import { backOff, sleep } from "./env.js";
import { BrokenStream, RequestRefused, toError, Unreachable } from "./errors.js";
import { isUpTo, Position } from "./eventstream.js";
import { readPage } from "./transports.js";

/** @import { ScanEvent } from "../scanwire.d.ts" */
/** @import { Env } from "./env.js" */

/**
 * @typedef {object} Sink who takes the events
 * @property {(event: ScanEvent) => void} push
 * @property {() => boolean} isFull
 * @property {() => Promise<void>} room until it is not full
 * @property {(error: Error | null) => void} finish nothing more comes
 */

/**
 * @typedef {object} Stream what the reader sees of it
 * @property {string | null} tip the last durable event of the scan that came by
 * @property {number} seq of that event
 */

const SAME_GAP_MAX = 3; // reading again has not closed it
const PAGES_AT_ONCE = 8; // then others may use the read limit too
const PAGE_EVERY_MS = 250;

export class Reader {
  #env;
  #scan;
  #stream;
  #sink;
  #changed;
  #position;
  #leaving = new AbortController();
  #isJoined = false;
  #isReading = false;
  #resets = 0; // a page that was asked for before one counts for nothing
  #gaps = 0; // in a row, at the same place
  isLevel = false;
  isDone = false;

  /**
   * @param {Env} env
   * @param {string} scan
   * @param {string | null} after
   * @param {Stream} stream
   * @param {Sink} sink
   * @param {() => void} changed called when it became level, fell behind or is done
   */
  constructor(env, scan, after, stream, sink, changed) {
    this.#env = env;
    this.#scan = scan;
    this.#stream = stream;
    this.#sink = sink;
    this.#changed = changed;
    this.#position = new Position(after);
  }

  get cursor() {
    return this.#position.cursor;
  }

  /** Durable events that have come by and were not read; 0 for one that is level, or waits for whoever reads it. */
  get behind() {
    if (this.isLevel || this.isDone || !this.#isJoined || this.#sink.isFull()) return 0;
    return Math.max(1, this.#stream.seq - (this.#position.seq ?? this.#stream.seq));
  }

  /**
   * From now on the stream brings everything behind `from`.
   * @param {string | null} from
   */
  join(from) {
    this.#isJoined = true;
    // Behind a cursor that was given, nothing may be left to come; only a page says so on every transport.
    const isKnown = this.#position.seq !== null;
    if (isKnown && isUpTo(from, this.cursor) && isUpTo(this.#stream.tip, this.cursor)) this.#rise();
    else this.fallBehind();
  }

  /**
   * An event from the stream.
   * @param {ScanEvent} event
   */
  offer(event) {
    if (this.isDone) return;
    if (event.type === "reset") {
      this.#resets += 1;
      this.#take(event);
      this.#rise();
    } else if (this.isLevel) {
      const verdict = this.#position.judge(event);
      if (verdict === "gap") this.fallBehind();
      else if (verdict === "new") this.#take(event);
      if (this.isLevel && this.#sink.isFull()) this.fallBehind();
    } else if (event.type === "end") {
      this.join(null); // nothing else will come of it; what it lacks is in the log
    }
  }

  /** What comes next is read in the log. */
  fallBehind() {
    if (this.isDone) return;
    this.isLevel = false;
    this.#changed();
    if (!this.#isReading && this.#isJoined) void this.#readOn();
  }

  /** @param {Error | null} [error] why, if too early */
  finish(error = null) {
    if (this.isDone) return;
    this.isDone = true;
    this.#leaving.abort();
    this.#sink.finish(error);
    this.#changed();
  }

  #rise() {
    if (this.isLevel || this.isDone) return;
    this.isLevel = true;
    this.#changed();
  }

  /** @param {ScanEvent} event that is new */
  #take(event) {
    this.#position.take(event);
    this.#gaps = 0;
    this.#sink.push(event);
    if (event.type === "end" || (event.type === "reset" && event.data.snapshot === null)) this.finish();
  }

  async #readOn() {
    this.#isReading = true;
    let failures = 0;
    for (let pages = 1; !this.isLevel && !this.isDone; pages += 1) {
      try {
        await this.#sink.room();
        await this.#readPage();
        failures = 0;
        if (pages > PAGES_AT_ONCE) await sleep(this.#env.clock, PAGE_EVERY_MS, this.#leaving.signal);
      } catch (thrown) {
        if (this.isDone) break;
        const error = toError(thrown);
        const isPassing = error instanceof RequestRefused ? error.isPassing : error instanceof Unreachable;
        if (!isPassing) return this.finish(error);
        const floorMs = error instanceof RequestRefused ? (error.retryAfterMs ?? 0) : 0;
        const waitMs = floorMs + backOff(failures, this.#env.random());
        failures += 1;
        await sleep(this.#env.clock, waitMs, this.#leaving.signal).catch(() => {});
      }
    }
    this.#isReading = false;
  }

  async #readPage() {
    const resets = this.#resets;
    const page = await readPage(this.#env, [this.#scan], this.cursor, this.#leaving.signal);
    let isLast = true; // nothing durable was in it, or the progress that comes behind all that is
    for (const event of page.events) {
      await this.#sink.room();
      if (this.isDone || this.#resets !== resets) return;
      if (event.scan !== this.#scan) continue;
      isLast = event.type === "progress";
      const verdict = this.#position.judge(event);
      if (verdict === "gap") return this.#countGap(event);
      if (verdict === "new") this.#take(event);
    }
    if (this.isDone || this.#resets !== resets) return;
    if (page.isClosed) this.finish();
    else if (isLast && isUpTo(this.#stream.tip, this.cursor) && !this.#sink.isFull()) this.#rise();
  }

  /** @param {ScanEvent} event */
  #countGap(event) {
    this.#gaps += 1;
    if (this.#gaps < SAME_GAP_MAX) return;
    const seq = this.#position.seq;
    throw new BrokenStream(
      `The server leaves out events: after event ${seq} of ${this.#scan} came event ${event.seq}.`,
    );
  }
}
