// @ts-check
/**
 * The ways from the server's log to here. Each is a function that brings the events of some scans behind a cursor,
 * until it cannot go on, and says how that was: it returns when the server has no more of these scans, and else throws
 *
 * - WrongWay: something holds it back, or it cannot be had in this way;
 * - Unreachable: the connection broke, or ended before the scans did;
 * - RequestRefused, BrokenStream, Exhausted;
 * - the reason of its signal.
 */

import { BrokenStream, Exhausted, RequestRefused, ScanwireError, toError, Unreachable, WrongWay } from "./errors.js";
import { Deadline, sleep } from "./env.js";
import { readEvent, SseParser } from "./eventstream.js";

/** @import { Problem, ScanEvent, Transport } from "../scanwire.d.ts" */
/** @import { Env } from "./env.js" */

/**
 * @typedef {object} Opening what is to be brought, and who takes it
 * @property {readonly string[]} scans
 * @property {() => string | null} cursor behind which; it moves with what is taken
 * @property {() => void} opened called with the first sign of life
 * @property {(event: ScanEvent) => void} take
 * @property {(ms: number) => void} retry called with the wait before a reconnect that the server asks for
 */

/** @typedef {(env: Env, opening: Opening, signal: AbortSignal) => Promise<void>} Bring */

/**
 * @typedef {object} Page
 * @property {ScanEvent[]} events
 * @property {boolean} isClosed nothing more will come of these scans
 * @property {number | null} pollAfterMs null when the server is too old to say
 * @property {boolean} wasHeld the server held the poll open: nothing else happened meanwhile
 */

const SSE = "text/event-stream";
const SILENT_HEARTBEATS = 3; // a stream that was silent for so many is broken
const REQUEST_MS = 30_000;
const LONG_POLL_S = 25;
const HELD_POLL_MS = 1000; // the longest wait after a poll that the server held open
const PONG_MS = 10_000;
const OLD_POLL = { first: 5000, growth: 1.2, most: 30_000, attempts: 100 }; // of a server that gives no hints
const EVENT_TYPES = ["queued", "started", "progress", "matches", "cancelling", "end", "reset", "throttled", "bye"];

/** @type {Record<Transport, Bring>} */
export const TRANSPORTS = {
  fetch: bringByFetch,
  websocket: bringByWebSocket,
  eventsource: bringByEventSource,
  poll: bringByPolls,
};

/**
 * Whether this way exists here at all. A native EventSource can carry no key.
 * @param {Env} env
 * @param {Transport} name
 */
export function isThere(env, name) {
  if (name === "fetch") return "body" in Response.prototype; // else streams cannot be read
  if (name === "websocket") return env.WebSocket !== undefined;
  if (name === "eventsource") return env.EventSource !== undefined && env.apiKey === null;
  return true;
}

/**
 * The first of some ways that gives a sign of life.
 * @param {Env} env
 * @param {readonly Transport[]} names
 * @param {readonly string[]} scans
 * @param {string | null} cursor
 * @param {AbortSignal} signal
 * @returns {Promise<Transport | null>}
 */
export async function findWay(env, names, scans, cursor, signal) {
  for (const name of names) {
    const probe = new Deadline(env.clock, signal);
    let works = false;
    const opened = () => {
      works = true;
      probe.close();
    };
    const opening = { scans, cursor: () => cursor, opened, take: () => {}, retry: () => {} };
    await TRANSPORTS[name](env, opening, probe.signal).catch(() => {}); // why not, does not matter
    probe.close();
    if (works || signal.aborted) return works ? name : null;
  }
  return null;
}

/**
 * The answer to one request, whatever its status. Throws Unreachable.
 * @param {Env} env
 * @param {string} path
 * @param {RequestInit & { signal?: AbortSignal, waitMs?: number }} [init]
 */
export async function request(env, path, { signal, waitMs = REQUEST_MS, ...init } = {}) {
  const deadline = new Deadline(env.clock, signal);
  deadline.expect(waitMs, () => new Unreachable(`No answer from ${env.url} for ${waitMs / 1000} s.`));
  try {
    const answer = await ask(env, path, init, deadline.signal);
    // The body is read before the deadline goes.
    return { answer, text: await answer.text() };
  } catch (error) {
    throw explain(env, error, deadline.signal);
  } finally {
    deadline.close();
  }
}

/**
 * @param {Env} env
 * @param {string} path
 * @param {RequestInit} init
 * @param {AbortSignal} signal
 */
function ask(env, path, init, signal) {
  const headers = new Headers(init.headers);
  if (env.apiKey !== null) headers.set("Authorization", `Bearer ${env.apiKey}`);
  return env.fetch(env.url + path, { ...init, headers, signal, cache: "no-store" });
}

/**
 * What a failed fetch or read comes to.
 * @param {Env} env
 * @param {unknown} error
 * @param {AbortSignal} signal
 */
function explain(env, error, signal) {
  if (signal.aborted) return signal.reason;
  if (error instanceof ScanwireError) return error;
  return new Unreachable(`No Scanwire server can be reached at ${env.url}: ${toError(error).message}.`);
}

/**
 * The refusal in an answer; one is made up when something else than Scanwire refused.
 * @param {Response} answer
 * @param {string} text
 */
export function readRefusal(answer, text) {
  /** @type {Problem} */
  let problem = { status: answer.status, detail: `The server answered ${answer.status} ${answer.statusText}.` };
  try {
    const told = JSON.parse(text);
    if (typeof told === "object" && told !== null) problem = told;
  } catch {} // not JSON, so not Scanwire
  return new RequestRefused(problem, answer.status, readWait(problem, answer.headers.get("Retry-After")));
}

/**
 * @param {Problem} problem
 * @param {string | null} retryAfter seconds, or a date (RFC 9110)
 */
function readWait(problem, retryAfter) {
  if (typeof problem.retry_after_s === "number") return problem.retry_after_s * 1000;
  if (retryAfter === null) return null;
  const ms = /^\d{1,9}$/.test(retryAfter) ? Number(retryAfter) * 1000 : Date.parse(retryAfter) - Date.now();
  return Number.isNaN(ms) ? null : Math.max(0, ms);
}

/**
 * @param {readonly string[]} scans
 * @param {string | null} cursor
 */
function eventsPath(scans, cursor) {
  const query = new URLSearchParams();
  if (scans.length > 1) for (const scan of scans) query.append("scan", scan);
  if (cursor !== null) query.set("after", cursor);
  const path = scans.length > 1 ? "/v1/events" : `/v1/scans/${encodeURIComponent(scans[0])}/events`;
  return `${path}?${query}`.replace(/\?$/, "");
}

/**
 * Events behind a cursor, in one request; waits for them when `waits`.
 * @param {Env} env
 * @param {readonly string[]} scans
 * @param {string | null} cursor
 * @param {AbortSignal} [signal]
 * @returns {Promise<Page>}
 */
export async function readPage(env, scans, cursor, signal, waits = false) {
  /** @type {Record<string, string>} */
  const headers = { Accept: "application/json", ...(waits && { Prefer: `wait=${LONG_POLL_S}` }) };
  const waitMs = waits ? LONG_POLL_S * 1000 + SILENT_HEARTBEATS * env.heartbeatMs : REQUEST_MS;
  const { answer, text } = await request(env, eventsPath(scans, cursor), { headers, signal, waitMs });
  if (answer.status === 204) return { events: [], isClosed: true, pollAfterMs: null, wasHeld: false };
  if (!answer.ok) throw readRefusal(answer, text);
  let page;
  try {
    page = JSON.parse(text);
  } catch {} // told below
  if (!Array.isArray(page?.events)) throw new BrokenStream("This is not a page of events.");
  const hint = page.poll_after_s;
  return {
    events: page.events.map(readEvent),
    isClosed: page.closed === true,
    pollAfterMs: typeof hint === "number" ? hint * 1000 : null,
    wasHeld: answer.headers.has("Preference-Applied"),
  };
}

/** @type {Bring} */
async function bringByFetch(env, opening, signal) {
  const deadline = new Deadline(env.clock, signal);
  const held = () => new WrongWay(`Something on the way holds the stream back: no byte for ${env.firstByteMs} ms.`);
  const silent = () => new Unreachable("The connection broke: it was silent.");
  deadline.expect(env.firstByteMs, held);
  try {
    const init = { headers: { Accept: SSE } };
    const answer = await ask(env, eventsPath(opening.scans, opening.cursor()), init, deadline.signal);
    if (answer.status === 204) return;
    if (!answer.ok) {
      const refusal = readRefusal(answer, await answer.text());
      throw [406, 415].includes(refusal.status) ? new WrongWay(refusal.message) : refusal;
    }
    const type = answer.headers.get("Content-Type")?.split(";")[0].trim().toLowerCase();
    if (type !== SSE) throw new WrongWay(`The server answered with ${type ?? "nothing"} instead of ${SSE}.`);
    const reader = answer.body?.getReader();
    if (reader === undefined) throw new WrongWay("Streams cannot be read here.");
    const parser = new SseParser();
    let isOpen = false;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Unreachable("The connection ended before the scan did.");
      deadline.expect(SILENT_HEARTBEATS * env.heartbeatMs, silent);
      if (!isOpen) opening.opened();
      isOpen = true;
      const messages = parser.feed(value);
      if (parser.retryMs !== null) opening.retry(parser.retryMs);
      for (const { data } of messages) {
        opening.take(readEvent(data));
        signal.throwIfAborted();
      }
    }
  } catch (error) {
    throw explain(env, error, deadline.signal);
  } finally {
    deadline.close();
  }
}

/**
 * A promise for what is told by callbacks, with the deadline that they move on.
 * @param {Env} env
 * @param {AbortSignal} signal
 * @param {(deadline: Deadline, fail: (error: Error) => void) => () => void} start gives what closes it
 * @returns {Promise<void>}
 */
async function listen(env, signal, start) {
  const deadline = new Deadline(env.clock, signal);
  let close = () => {};
  try {
    await new Promise((_, reject) => {
      signal.throwIfAborted();
      deadline.signal.addEventListener("abort", () => reject(deadline.signal.reason), { once: true });
      close = start(deadline, reject);
    });
  } finally {
    deadline.close();
    close();
  }
}

/** @type {Bring} */
function bringByWebSocket(env, opening, signal) {
  return listen(env, signal, (deadline, fail) => {
    if (env.WebSocket === undefined) throw new WrongWay("There are no WebSockets here.");
    const query = new URLSearchParams(opening.scans.map((scan) => ["scan", scan]));
    const cursor = opening.cursor();
    if (cursor !== null) query.set("after", cursor);
    // A browser can set no headers on a WebSocket.
    const protocols = ["scanwire.v1", ...(env.apiKey === null ? [] : [`scanwire.key.${env.apiKey}`])];
    const socket = new env.WebSocket(`${env.url.replace(/^http/, "ws")}/v1/ws?${query}`, protocols);
    deadline.expect(env.firstByteMs, () => new WrongWay("The WebSocket is held back."));
    /** @type {unknown} */
    let asking;
    // Heartbeats of a WebSocket are not shown to scripts, so silence is broken by a question.
    const listenOn = () => {
      const silent = () => new Unreachable("The connection broke: it was silent.");
      deadline.expect(env.heartbeatMs + PONG_MS, silent);
      env.clock.clearTimeout(asking);
      asking = env.clock.setTimeout(() => socket.send('{"op":"ping"}'), env.heartbeatMs);
    };
    socket.onopen = () => {
      isOpen = true;
      listenOn();
      opening.opened();
    };
    socket.onmessage = ({ data }) => {
      listenOn();
      try {
        const message = JSON.parse(String(data));
        if (message?.type !== undefined) opening.take(readEvent(message));
      } catch (error) {
        fail(error instanceof SyntaxError ? new BrokenStream("This is not an event.") : toError(error));
      }
    };
    socket.onclose = ({ code, reason }) => fail(readClose(code, reason));
    // Not every engine follows a refused handshake with a close.
    let isOpen = false;
    socket.onerror = () => isOpen || fail(new Unreachable("The WebSocket cannot be opened."));
    return () => {
      env.clock.clearTimeout(asking);
      socket.onopen = socket.onmessage = socket.onerror = socket.onclose = null;
      socket.close();
    };
  });
}

/**
 * @param {number} code see app/api/websocket.py for what each asks of a client
 * @param {string} reason
 */
function readClose(code, reason) {
  const detail = reason || "The connection ended before the scan did.";
  if (code === 1008) return new RequestRefused({ detail }, 403);
  if (code === 1013 || code === 4429) return new RequestRefused({ detail }, code === 1013 ? 503 : 429);
  return new Unreachable(detail);
}

/** @type {Bring} */
function bringByEventSource(env, opening, signal) {
  return listen(env, signal, (deadline, fail) => {
    if (env.EventSource === undefined) throw new WrongWay("There is no EventSource here.");
    const source = new env.EventSource(env.url + eventsPath(opening.scans, opening.cursor()));
    deadline.expect(env.firstByteMs, () => new WrongWay("The EventSource is held back."));
    // Heartbeats are not shown to scripts, and it cannot ask: when it was silent for so long, it is opened anew.
    const listenOn = () => {
      deadline.expect(SILENT_HEARTBEATS * env.heartbeatMs, () => new Unreachable("The connection was silent."));
    };
    source.onopen = () => {
      listenOn();
      opening.opened();
    };
    source.onerror = () => fail(new Unreachable("The connection ended before the scan did."));
    for (const type of EVENT_TYPES) {
      source.addEventListener(type, ({ data }) => {
        listenOn();
        try {
          opening.take(readEvent(data));
        } catch (error) {
          fail(toError(error));
        }
      });
    }
    return () => source.close();
  });
}

/** @type {Bring} */
async function bringByPolls(env, opening, signal) {
  let isOpen = false;
  let attempts = 0;
  let oldMs = OLD_POLL.first;
  for (;;) {
    // The first one is answered at once, so that it shows whether polls get through.
    const page = await readPage(env, opening.scans, opening.cursor(), signal, isOpen);
    const isFirst = !isOpen;
    if (isFirst) opening.opened();
    isOpen = true;
    for (const event of page.events) {
      opening.take(event);
      signal.throwIfAborted();
    }
    if (page.isClosed) return;
    if (isFirst && page.pollAfterMs !== null) continue;
    if (page.pollAfterMs === null) {
      if (page.events.some((event) => event.id !== undefined)) [attempts, oldMs] = [0, OLD_POLL.first];
      attempts += 1;
      if (attempts >= OLD_POLL.attempts) throw new Exhausted(`Nothing new came of ${attempts} polls.`);
      await sleep(env.clock, oldMs, signal);
      oldMs = Math.min(OLD_POLL.most, oldMs * OLD_POLL.growth);
    } else {
      await sleep(env.clock, page.wasHeld ? Math.min(page.pollAfterMs, HELD_POLL_MS) : page.pollAfterMs, signal);
    }
  }
}
