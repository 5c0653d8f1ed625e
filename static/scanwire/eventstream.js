// @ts-check
/**
 * From bytes to events on the reading side. Nothing here waits or knows where the bytes come from.
 *
 * `SseParser` takes a body in whatever pieces it arrives. `Position` says of each event of one scan whether it is new,
 * and finds what is missing.
 */

import { BrokenStream } from "./errors.js";

/** @import { ScanEvent } from "../scanwire.d.ts" */

export const MAX_FRAME_CHARS = 16 * 2 ** 20; // of one event; the service's largest have some 200 KB
export const MAX_RETRY_MS = 10 * 60_000; // no server may send a client away for longer than this

/** @typedef {{ type: string, data: string, id: string }} Message what an EventSource would dispatch */

/** Server-sent events, to the letter of WHATWG HTML 9.2.6. An event that the end of the body cuts off is never given. */
export class SseParser {
  #decoder = new TextDecoder(); // drops one BOM at the start, and keeps a character that was cut for the next piece
  #maxChars;
  #line = ""; // of which the end has not come yet
  #skipsLf = false; // a line feed that comes next belongs to the carriage return before it
  /** @type {string[]} */
  #data = [];
  #size = 0;
  #type = "";
  #id = ""; // as the fields say; `lastEventId` takes it over with the event
  lastEventId = "";
  /** The wait before a reconnect that the server asked for, if any. @type {number | null} */
  retryMs = null;

  constructor(maxChars = MAX_FRAME_CHARS) {
    this.#maxChars = maxChars;
  }

  /**
   * The events that are complete now. Throws BrokenStream when one is too long.
   * @param {Uint8Array} bytes
   */
  feed(bytes) {
    /** @type {Message[]} */
    const messages = [];
    let text = this.#decoder.decode(bytes, { stream: true });
    if (text === "") return messages;
    if (this.#skipsLf && text.startsWith("\n")) text = text.slice(1);
    this.#skipsLf = text.endsWith("\r");
    const lines = text.split(/\r\n|\r|\n/);
    const rest = /** @type {string} */ (lines.pop());
    for (const [place, line] of lines.entries()) {
      const message = this.#take(place === 0 ? this.#line + line : line);
      if (message !== null) messages.push(message);
    }
    this.#line = lines.length ? rest : this.#line + rest;
    if (this.#line.length + this.#size > this.#maxChars) this.#refuse();
    return messages;
  }

  /** @param {string} line */
  #take(line) {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
    if (field === "data") {
      this.#data.push(value);
      this.#size += value.length + 1;
      if (this.#size > this.#maxChars) this.#refuse();
    } else if (field === "event") {
      this.#type = value;
    } else if (field === "id") {
      if (!value.includes("\0")) this.#id = value;
    } else if (field === "retry" && /^[0-9]+$/.test(value)) {
      this.retryMs = Math.min(Number(value), MAX_RETRY_MS);
    }
    return null;
  }

  #dispatch() {
    this.lastEventId = this.#id;
    // An empty `data` field is data, and no such field is none.
    const isEvent = this.#data.length > 0;
    const message = { type: this.#type || "message", data: this.#data.join("\n"), id: this.lastEventId };
    this.#data = [];
    this.#size = 0;
    this.#type = "";
    return isEvent ? message : null;
  }

  #refuse() {
    throw new BrokenStream(`An event is longer than ${this.#maxChars} characters.`);
  }
}

/**
 * One event from its JSON, or from what that parses to. Throws BrokenStream.
 * @param {unknown} given
 * @returns {ScanEvent}
 */
export function readEvent(given) {
  /** @type {any} */
  let event = given;
  if (typeof given === "string") {
    try {
      event = JSON.parse(given);
    } catch {
      event = null;
    }
  }
  const isEvent =
    typeof event?.type === "string" &&
    Number.isSafeInteger(event.seq) &&
    typeof event.data === "object" &&
    event.data !== null &&
    (event.id === undefined || readCursor(event.id) !== null);
  if (!isEvent) throw new BrokenStream(`This is not an event: ${String(given).slice(0, 80)}`);
  return event;
}

/**
 * @param {unknown} text
 * @returns {{ epoch: string, n: number } | null}
 */
export function readCursor(text) {
  const match = typeof text === "string" ? /^([a-z0-9]{4,16})-(\d{1,18})$/.exec(text) : null;
  return match && { epoch: match[1], n: Number(match[2]) };
}

/**
 * Whether everything behind `later` comes after everything up to `earlier`; null is the start.
 * @param {string | null} earlier
 * @param {string | null} later
 */
export function isUpTo(earlier, later) {
  if (earlier === null) return true;
  const [one, other] = [readCursor(earlier), readCursor(later)];
  return one !== null && other !== null && one.epoch === other.epoch && one.n <= other.n;
}

/** How far the events of one scan have been read. */
export class Position {
  /**
   * `seq` is null while it is unknown: whatever comes first behind a foreign cursor is the first.
   * @param {string | null} cursor
   */
  constructor(cursor) {
    this.cursor = cursor;
    /** @type {number | null} */
    this.seq = cursor === null ? 0 : null;
  }

  /**
   * What an event is from here: `new` and next in order, `old`, or behind a `gap`.
   * @param {ScanEvent} event
   * @returns {"new" | "old" | "gap"}
   */
  judge(event) {
    if (event.type === "reset") return "new";
    if (event.id === undefined) return this.seq === null || event.seq >= this.seq ? "new" : "old";
    if (isUpTo(event.id, this.cursor)) return "old";
    if (this.seq === null) return "new";
    if (event.seq <= this.seq) return "old";
    // Of a scan past its retention only the end is left, and that is not a gap.
    const isAllThereIs = this.seq === 0 && event.type === "end";
    return event.seq === this.seq + 1 || isAllThereIs ? "new" : "gap";
  }

  /**
   * Goes behind an event that is new.
   * @param {ScanEvent} event
   */
  take(event) {
    if (event.type === "reset") {
      // Everything that is kept is told again from here; what was received counts for nothing.
      this.cursor = null;
      this.seq = 0;
    } else if (event.id !== undefined) {
      this.cursor = event.id;
      this.seq = event.seq;
    }
  }
}
