// @ts-check
/** What one page watches: its readers by scan, and the link that brings them the stream. */

import { RequestRefused, Unreachable, BrokenStream, ScanwireError } from "./errors.js";
import { readCursor } from "./eventstream.js";
import { Link } from "./link.js";
import { Reader } from "./reader.js";

/** @import { State } from "../scanwire.d.ts" */
/** @import { Env, Settings } from "./env.js" */
/** @import { Failure, Told } from "./hub.js" */
/** @import { Surroundings } from "./link.js" */
/** @import { Sink, Stream } from "./reader.js" */

/** @typedef {{ readers: Set<Reader>, stream: Stream, isJoined: boolean }} Watched */

const LOST = "lost"; // compares with no cursor: where the stream is, for a reader that comes later

export class Session {
  /** @type {Env} */
  env;
  #link;
  /** @type {Map<string, Watched>} */
  #scans = new Map();
  /** @type {Omit<State, "behind">} */
  #told = { name: "idle", transport: null, until: null, reason: null };
  #isClosed = false;
  /** @type {State} */
  state = { ...this.#told, behind: 0 };
  /** @type {Set<(state: State) => void>} */
  listeners = new Set();

  /**
   * @param {Settings} settings
   * @param {Env} env
   * @param {"worker" | "leader" | "none"} mode
   * @param {Surroundings} around
   */
  constructor(settings, env, mode, around) {
    this.env = env;
    const hear = (/** @type {Told} */ told) => this.#hear(told);
    this.#link = new Link(settings, env, mode, around, hear, () => this.#describe());
  }

  /**
   * @param {string} scan
   * @param {string | null} after
   * @param {Sink} sink
   */
  read(scan, after, sink) {
    if (this.#isClosed) throw new ScanwireError("This client was closed.");
    const watched = this.#scans.get(scan) ?? { readers: new Set(), stream: { tip: null, seq: 0 }, isJoined: false };
    const reader = new Reader(this.env, scan, after, watched.stream, sink, () => {
      if (reader.isDone) this.#leave(scan, reader);
      this.#show();
    });
    watched.readers.add(reader);
    if (!this.#scans.has(scan)) {
      this.#scans.set(scan, watched);
      this.#link.update();
    } else if (watched.isJoined) {
      reader.join(LOST);
    }
    return reader;
  }

  wake() {
    this.#link.wake();
  }

  close() {
    this.#isClosed = true;
    for (const { readers } of [...this.#scans.values()]) for (const reader of [...readers]) reader.finish();
    this.#link.close();
    this.#told = { name: "closed", transport: null, until: null, reason: "This client was closed." };
    this.#show();
  }

  /**
   * @param {string} scan
   * @param {Reader} reader
   */
  #leave(scan, reader) {
    const watched = this.#scans.get(scan);
    if (!watched?.readers.delete(reader) || watched.readers.size > 0) return;
    this.#scans.delete(scan);
    if (!this.#isClosed) this.#link.update();
  }

  /** Each scan with the cursor of whoever has read least. */
  #describe() {
    /** @type {Record<string, string | null>} */
    const scans = {};
    for (const [scan, { readers }] of this.#scans) {
      const cursors = [...readers].map((reader) => reader.cursor);
      const places = cursors.map((cursor) => readCursor(cursor)?.n ?? 0);
      scans[scan] = cursors[places.indexOf(Math.min(...places))] ?? null;
    }
    return scans;
  }

  /** @param {Told} told */
  #hear(told) {
    if (told.op === "state") {
      this.#told = told.state;
      this.#show();
    } else if (told.op === "event") {
      const { event } = told;
      const watched = this.#scans.get(event.scan ?? "");
      if (watched === undefined) return;
      if (event.id !== undefined) Object.assign(watched.stream, { tip: event.id, seq: event.seq });
      if (event.type === "reset") Object.assign(watched.stream, { tip: null, seq: 0 });
      for (const reader of [...watched.readers]) reader.offer(event);
    } else if (told.op === "joined") {
      const watched = this.#scans.get(told.scan);
      if (watched === undefined) return;
      watched.isJoined = true;
      for (const reader of [...watched.readers]) reader.join(told.from);
    } else if (told.op === "closed") {
      // What they lack, if anything, is in the log.
      for (const scan of told.scans) {
        for (const reader of [...(this.#scans.get(scan)?.readers ?? [])]) {
          reader.join(LOST);
        }
      }
    } else if (told.op === "failed") {
      const error = readFailure(told.error);
      for (const reader of [...(this.#scans.get(told.scan)?.readers ?? [])]) reader.finish(error);
    }
  }

  #show() {
    let behind = 0;
    for (const { readers } of this.#scans.values()) {
      for (const reader of readers) behind = Math.max(behind, reader.behind);
    }
    const name = this.#told.name === "live" && behind > 0 ? "catching-up" : this.#told.name;
    const state = { ...this.#told, name, behind };
    const isNews = /** @type {(keyof State)[]} */ (Object.keys(state)).some((key) => state[key] !== this.state[key]);
    this.state = state;
    if (isNews) for (const listener of [...this.listeners]) listener(state);
  }
}

/**
 * The error that a hub told of.
 * @param {Failure} failure
 */
function readFailure({ name, message, problem, status }) {
  if (problem !== undefined) return new RequestRefused(problem, status ?? 0);
  return new (name === "BrokenStream" ? BrokenStream : Unreachable)(message);
}
