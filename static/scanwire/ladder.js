// @ts-check
/** Which transport to use: the first that gets through, and from time to time a better one. */

/** @import { Transport } from "../scanwire.d.ts" */

/** @type {Partial<Record<Transport, Transport>>} what holds one back holds back the other: both are one long answer */
const SAME_WAY = { fetch: "eventsource", eventsource: "fetch" };

export class Ladder {
  #rungs;
  #place = 0;
  #hasWorked = false; // the present one; then one failure is the connection's, not the transport's
  #strikes = 0;
  /** @type {Set<Transport>} */
  #held = new Set();

  /** @param {Transport[]} rungs the best first */
  constructor(rungs) {
    this.#rungs = rungs;
  }

  get current() {
    return this.#rungs[this.#place];
  }

  /** Those that are better than the present one, the best first. */
  get better() {
    return this.#rungs.slice(0, this.#place).filter((name) => !this.#held.has(name));
  }

  /** @param {Transport} name it has brought something */
  note(name) {
    this.#place = this.#rungs.indexOf(name);
    this.#hasWorked = true;
    this.#strikes = 0;
    const same = SAME_WAY[name];
    if (same !== undefined) this.#held.delete(same);
    this.#held.delete(name);
  }

  /**
   * The present one brought nothing, though the server can be reached. Gives whether the next attempt is another's.
   * @param {boolean} isHeld something on the way holds it back
   */
  blame(isHeld) {
    this.#strikes += 1;
    if (this.#hasWorked && this.#strikes < 2) return false;
    const same = SAME_WAY[this.current];
    if (isHeld && same !== undefined) this.#held.add(same);
    this.#hasWorked = false;
    this.#strikes = 0;
    const next = this.#rungs.findIndex((name, place) => place > this.#place && !this.#held.has(name));
    if (next < 0) this.#held.clear();
    this.#place = Math.max(next, 0);
    return next >= 0;
  }
}
