// @ts-check
/** What the client fails with. The tree is drawn in scanwire.d.ts. */

/** @import { End, Problem } from "../scanwire.d.ts" */

export class ScanwireError extends Error {
  /** @param {string} message */
  constructor(message) {
    super(message);
    this.name = new.target.name;
  }
}

export class RequestRefused extends ScanwireError {
  /**
   * @param {Problem} problem
   * @param {number} status
   * @param {number | null} [retryAfterMs]
   */
  constructor(problem, status, retryAfterMs = null) {
    super(String(problem.detail || problem.title || `The server answered ${status}.`));
    this.problem = problem;
    this.status = status;
    this.retryAfterMs = retryAfterMs;
  }

  /** The same request may do better later. */
  get isPassing() {
    return [408, 425, 429, 500, 502, 503, 504].includes(this.status);
  }
}

export class Unreachable extends ScanwireError {}

/** An old server was asked often enough. */
export class Exhausted extends Unreachable {}

export class BrokenStream extends ScanwireError {}

export class ResultLost extends ScanwireError {}

export class ScanFailed extends ScanwireError {
  /** @param {End} end */
  constructor(end) {
    super(String(end.error?.detail || end.error?.title || `The scan ended as ${end.state}.`));
    this.end = end;
  }
}

/** A stream cannot be had in this way: something holds it back, or turns it into something else. Never shown. */
export class WrongWay extends ScanwireError {}

/** @param {unknown} thrown */
export function toError(thrown) {
  return thrown instanceof Error ? thrown : new ScanwireError(String(thrown));
}
