// @ts-check
/** The server that this page came from: the one client, the key that it may need, and what is fetched beside it. */

import { connect, RequestRefused, Unreachable } from "../scanwire.js";

/** @import { Problem } from "../scanwire.d.ts" */

const KEY = "scanwire.key";
const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 30_000;

/** @type {string | null} */
const apiKey = readKey();

export const scanwire = connect(undefined, apiKey === null ? {} : { apiKey });

function readKey() {
  try {
    const key = sessionStorage.getItem(KEY);
    return key !== null && /^[\x21-\x7e]+$/.test(key) ? key : null;
  } catch {
    return null; // a browser that keeps nothing
  }
}

export const hasKey = () => apiKey !== null;

/** @param {string} key used from now on, in this tab */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
  location.reload();
}

/**
 * A request of this page's own. Raises RequestRefused, Unreachable.
 * @param {string} path
 * @param {AbortSignal} [signal]
 */
export async function get(path, signal) {
  /** @type {Response} */
  let answer;
  try {
    answer = await fetch(path, { headers: apiKey === null ? {} : { "X-API-Key": apiKey }, signal: signal ?? null });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Unreachable("The server cannot be reached.");
  }
  if (answer.ok) return answer;
  /** @type {Problem} */
  const problem = await answer.json().catch(() => ({}));
  const retry = problem.retry_after_s ?? Number(answer.headers.get("Retry-After") ?? NaN);
  throw new RequestRefused(problem, answer.status, Number.isFinite(retry) ? retry * 1000 : null);
}

/**
 * Saves a file that only a key opens: a link cannot send one.
 * @param {string} path
 * @param {string} name
 */
export async function download(path, name) {
  const answer = await get(path);
  const sent = /filename="([^"]+)"/.exec(answer.headers.get("Content-Disposition") ?? "")?.[1];
  const address = URL.createObjectURL(await answer.blob());
  const link = document.createElement("a");
  link.href = address;
  link.download = sent ?? name;
  link.click();
  URL.revokeObjectURL(address);
}

/**
 * Asks until there is an answer that will not get better by asking again.
 * @template Answer
 * @param {() => Promise<Answer>} ask
 * @param {(error: Error, untilMs: number) => void} waiting
 * @param {AbortSignal} [signal]
 * @returns {Promise<Answer>}
 */
export async function keepAsking(ask, waiting, signal) {
  for (let waitMs = FIRST_WAIT_MS; ; waitMs = Math.min(waitMs * 2, LONGEST_WAIT_MS)) {
    try {
      return await ask();
    } catch (error) {
      const isPassing = error instanceof Unreachable || (error instanceof RequestRefused && isWorthWaiting(error));
      if (!isPassing || signal?.aborted) throw error;
      const floorMs = error instanceof RequestRefused ? (error.retryAfterMs ?? 0) : 0;
      const untilMs = Date.now() + Math.max(floorMs, waitMs * (0.5 + Math.random() / 2));
      waiting(error, untilMs);
      await waitUntil(untilMs, floorMs === 0, signal);
    }
  }
}

/** @param {RequestRefused} refusal */
export const isWorthWaiting = (refusal) => refusal.status === 429 || refusal.status >= 500;

/**
 * @param {number} untilMs
 * @param {boolean} isEager a network that comes back ends the wait
 * @param {AbortSignal} [signal]
 */
function waitUntil(untilMs, isEager, signal) {
  return /** @type {Promise<void>} */ (
    new Promise((resolve, reject) => {
      const done = () => {
        clearTimeout(timer);
        removeEventListener("online", done);
        signal?.removeEventListener("abort", done);
        if (signal?.aborted) reject(signal.reason);
        else resolve();
      };
      const timer = setTimeout(done, untilMs - Date.now());
      if (isEager) addEventListener("online", done);
      signal?.addEventListener("abort", done);
    })
  );
}
