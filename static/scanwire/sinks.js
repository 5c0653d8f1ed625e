// @ts-check
/** Who takes the events of a reader: an iteration, which may be slower than they come. */

/** @import { ScanEvent } from "../scanwire.d.ts" */

const MAX_EVENTS = 1000; // that wait to be taken; then nothing is read until they are
const MAX_ROWS = 20_000;

/** Holds what was read and not taken yet, within bounds; of progress the latest. */
export class Buffer {
  /** @type {ScanEvent[]} */
  #events = [];
  #rows = 0;
  /** @type {Error | null} */
  #error = null;
  #isFinished = false;
  /** @type {(() => void) | null} */
  #wakeTaker = null;
  /** @type {(() => void) | null} */
  #wakeReader = null;

  /** @param {ScanEvent} event */
  push(event) {
    const last = this.#events.at(-1);
    if (event.type === "progress" && last?.type === "progress") this.#events.pop();
    if (event.type === "reset") [this.#events, this.#rows] = [[], 0];
    this.#events.push(event);
    this.#rows += countRows(event);
    this.#wakeTaker?.();
  }

  isFull() {
    return !this.#isFinished && (this.#events.length >= MAX_EVENTS || this.#rows >= MAX_ROWS);
  }

  /** @returns {Promise<void>} */
  async room() {
    // Read on when all was taken: each time there is a page to be asked for.
    if (this.isFull()) await new Promise((resolve) => (this.#wakeReader = () => resolve(undefined)));
  }

  /** @param {Error | null} error */
  finish(error) {
    this.#isFinished = true;
    this.#error = error;
    this.#wakeTaker?.();
    this.#wakeReader?.();
  }

  /**
   * The next event; what was read before an error is given first.
   * @returns {Promise<IteratorResult<ScanEvent, undefined>>}
   */
  async take() {
    while (this.#events.length === 0) {
      if (this.#error !== null) throw this.#error;
      if (this.#isFinished) return { done: true, value: undefined };
      await new Promise((resolve) => (this.#wakeTaker = () => resolve(undefined)));
    }
    const value = /** @type {ScanEvent} */ (this.#events.shift());
    this.#rows -= countRows(value);
    if (this.#events.length === 0) this.#wakeReader?.();
    return { done: false, value };
  }
}

/** @param {ScanEvent} event */
function countRows(event) {
  return event.type === "matches" ? event.data.rows.length : 0;
}
