// @ts-check
/** How long to wait before the next attempt, and when to give up. */

import { backOff } from "./env.js";

/** @import { Env } from "./env.js" */

export class Patience {
  #env;
  #failures = 0; // in a row, without anything new
  #since = 0; // of those
  /** The wait before a reconnect that the server asked for. */
  retryMs = 0;

  /** @param {Pick<Env, "clock" | "random" | "heartbeatMs" | "patienceMs">} env */
  constructor(env) {
    this.#env = env;
  }

  /** Something new came. */
  renew() {
    this.#failures = 0;
  }

  /**
   * The wait after an attempt that failed, in milliseconds; null when that would be past all patience.
   * @param {number} began when the attempt was made
   * @param {number} floorMs what the server asks for this time
   */
  spend(began, floorMs) {
    const { clock, random, heartbeatMs, patienceMs } = this.#env;
    const now = clock.now();
    // One that held for a while was no failure.
    if (now - began > heartbeatMs) this.renew();
    if (this.#failures === 0) this.#since = now;
    const waitMs = Math.max(floorMs, this.retryMs) + backOff(this.#failures, random());
    this.#failures += 1;
    return now + waitMs - this.#since > patienceMs ? null : waitMs;
  }
}
