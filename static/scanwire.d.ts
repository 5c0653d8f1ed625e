/**
 * Scanwire in JavaScript: submit a scan, be told what it finds, and never lose an event to a broken connection.
 *
 *     import { connect } from "/static/scanwire.js";
 *
 *     const scanwire = connect();
 *     const scan = await scanwire.submit("gap-up", { start: "2012-01-01" });
 *     for await (const event of scan) console.log(event.type, event.data);
 *     const rows = await scan.result();
 *
 * Runs in pages, workers, Node and Deno. What can go wrong:
 *
 *     ScanwireError
 *     ├── RequestRefused    the server said no, and why: `problem`, `status`, `retryAfterMs`
 *     ├── Unreachable       no connection, or none that brought anything new, for `patienceMs`
 *     ├── BrokenStream      the server goes on leaving out events, or sends what are none
 *     ├── ResultLost        the rows of a scan are not kept any more, or are not the ones that it found
 *     └── ScanFailed        the scan ended as failed or lost: `end`
 */

/** A client of the server at `url`; in a page, of the server that the page came from when none is given. */
export function connect(url?: string | URL, options?: ConnectOptions): Scanwire;

export interface ConnectOptions {
  /** For servers that ask for one. It travels as a header, and for a WebSocket as a subprotocol; never in a URL. */
  apiKey?: string;
  /** In the order in which they are tried; "fetch" is server-sent events read with `fetch`. */
  transports?: readonly Transport[];
  /**
   * How the tabs of a browser share one connection: "auto" is a SharedWorker, else a leader among the tabs, else each
   * its own. Outside of pages, and with parts of your own (below), it is always "none".
   */
  share?: "auto" | "worker" | "leader" | "none";
  /** The newest rows that `Scan.rows` holds; 100,000 by default, which is all that a server keeps. */
  keepRows?: number;
  /** How long to go on without anything new before watching ends with Unreachable; for ever by default. */
  patienceMs?: number;
  /** The server's; three of them without a byte, and a connection is broken. 15,000 by default. */
  heartbeatMs?: number;
  /** A stream without its first byte after this is held back by a proxy. 2,000 by default. */
  firstByteMs?: number;
  /** How long a second-best transport is used before the better ones are tried again. 300,000 by default. */
  retryBetterMs?: number;
  fetch?: typeof globalThis.fetch;
  WebSocket?: typeof globalThis.WebSocket;
  EventSource?: typeof globalThis.EventSource;
  clock?: Clock;
  /** Gives numbers in [0, 1). */
  random?: () => number;
}

export type Transport = "fetch" | "websocket" | "eventsource" | "poll";

/** Time in milliseconds from any moment on. */
export interface Clock {
  now(): number;
  setTimeout(callback: () => void, ms: number): unknown;
  clearTimeout(timer: unknown): void;
}

/** How the one connection is doing. */
export interface State {
  /**
   * `idle`: nothing is watched · `live`: events come as they happen · `catching-up`: they do, and what came before is
   * being read · `polling`: they are asked for · `offline`: the next attempt is at `until` · `throttled`: the server
   * sent us away until then · `closed`: refused or closed, see `reason`.
   */
  name: "idle" | "connecting" | "live" | "catching-up" | "polling" | "offline" | "throttled" | "closed";
  transport: Transport | null;
  /** When the next attempt is made, as `Date.now()` tells time; null when none is waited for. */
  until: number | null;
  /** Why, in one sentence that may be shown to people. */
  reason: string | null;
  /** Durable events that are known of and not given yet, on the scan that is furthest behind. */
  behind: number;
}

export interface Scanwire {
  readonly url: string;
  readonly state: State;
  /**
   * A scan that the server has accepted; over breaking connections it is submitted once all the same. `signal` ends the
   * request, and later the watching of the scan; it does not cancel the scan.
   */
  submit(scanner: string, params?: Record<string, unknown>, options?: SubmitOptions): Promise<Scan>;
  /** A scan that exists already. Without a cursor in `after` its events come from the first on. */
  watch(id: string, options?: WatchOptions): Scan;
  /** Each scanner with the JSON Schema of its parameters, and the names that `where` knows. */
  scanners(options?: RequestOptions): Promise<Scanners>;
  /** This client's own scans, newest first; `before` is the id where a page starts. */
  list(options?: ListOptions): Promise<{ scans: Snapshot[]; next: string | null }>;
  /** Calls back at every change of the connection's state, and once at the start. Gives the function that ends it. */
  on(type: "state", listener: (state: State) => void): () => void;
  /** Tries again now, where the connection waits for no other reason than its own patience. */
  reconnect(): void;
  /** Ends all watching. */
  close(): void;
}

export interface RequestOptions {
  signal?: AbortSignal;
}

export interface SubmitOptions extends RequestOptions {
  /** "never" forces a run of its own. */
  reuse?: "auto" | "never";
  cancelWhenUnwatchedS?: number;
  idempotencyKey?: string;
}

export interface WatchOptions extends RequestOptions {
  after?: string;
}

export interface ListOptions extends RequestOptions {
  limit?: number;
  before?: string;
}

/**
 * One scan. Watching begins with the first `on`, `result` or iteration. Iterating gives its events from the first (or
 * from `after`) to the end, however often it is done and however slowly: what an iteration does not take is not kept,
 * but read again.
 */
export interface Scan extends AsyncIterable<ScanEvent> {
  readonly id: string;
  /** The answer to the submission, or the last one of `look` or `cancel`. */
  readonly snapshot: Snapshot | null;
  /** The newest `keepRows` rows of those that were received. */
  readonly rows: readonly Row[];
  /** How many rows were received, whether they are held or not. */
  readonly matches: number;
  /** The latest, once watching has begun. */
  readonly progress: Progress | null;
  /** How the scan ended, once it has. */
  readonly end: End | null;
  /** What ended the watching too early, if anything did. */
  readonly error: Error | null;
  /**
   * Calls back for each event of a type, in order, once each. "matches" gives the rows and the event, "event" every
   * event, "error" what ended the watching too early. After "reset" everything that is kept of the scan comes again.
   */
  on(type: "matches", listener: (rows: Row[], event: ScanEvent) => void): () => void;
  on(type: "progress", listener: (progress: Progress, event: ScanEvent) => void): () => void;
  on(type: "end", listener: (end: End, event: ScanEvent) => void): () => void;
  on(type: "error", listener: (error: Error) => void): () => void;
  on(type: "event", listener: (event: ScanEvent) => void): () => void;
  on(type: "queued" | "started" | "cancelling" | "reset", listener: (data: any, event: ScanEvent) => void): () => void;
  /** Every row, once the scan has ended. Rejects with ScanFailed, ResultLost, or what ended the watching. */
  result(): Promise<Row[]>;
  /** The snapshot after cancelling; of a finished scan the final one. */
  cancel(options?: RequestOptions): Promise<Snapshot>;
  /** Its snapshot now, in one request. */
  look(options?: RequestOptions): Promise<Snapshot>;
  /** Ends all watching of it here. The scan goes on. */
  close(): void;
}

export type Row = Record<string, string | number | boolean | null>;

export interface ScanEvent {
  /** The cursor that stands right behind this event; ephemeral events (`progress`, `reset`) have none. */
  id?: string;
  scan: string | null;
  /** 1, 2, 3 … over the durable events of one scan. */
  seq: number;
  type: string;
  /** Milliseconds since 1970, on the server's clock. */
  ts: number;
  data: any;
}

export interface Progress {
  done: number;
  total: number | null;
  unit: string;
  /** Units per second. */
  rate: number | null;
  /** Until the end, from low to high. */
  eta_s: [number, number] | null;
  matches: number;
  phase: string;
}

export interface End {
  state: "completed" | "failed" | "cancelled" | "lost";
  matches: number;
  last_seq: number;
  digest: string;
  elapsed_s: number;
  skipped: { symbol: string; reason: string }[];
  skipped_symbols: number;
  error: Problem | null;
  truncated: boolean;
}

export interface Snapshot {
  id: string;
  scanner: string;
  params: Record<string, unknown>;
  state: "queued" | "running" | "cancelling" | "completed" | "failed" | "cancelled" | "lost";
  position: number | null;
  /** Until the start, from low to high, while it is queued. */
  eta_s: [number, number] | null;
  progress: Progress | null;
  matches: number;
  cursor: string;
  created_ts: number;
  started_ts: number | null;
  finished_ts: number | null;
  data_version: string;
  attempt: number;
  joined: boolean;
  poll_after_s: number | null;
  links: Record<string, string>;
  end: End | null;
  /** Of an `external` scan, in the answer to its submission alone. */
  producer_token?: string;
}

export interface Scanners {
  scanners: {
    name: string;
    title: string;
    summary: string;
    unit: string;
    params: Record<string, any>;
    presets: Record<string, Record<string, unknown>>;
    columns: Record<string, string>;
    is_external: boolean;
  }[];
  features: Record<string, string>;
}

/** The problem object of a refusal (RFC 9457). */
export interface Problem {
  type?: string;
  title?: string;
  status?: number;
  detail?: string;
  retry_after_s?: number;
  errors?: { field: string; message: string }[];
  [member: string]: unknown;
}

/** What happened, in one sentence that may be shown to people. */
export class ScanwireError extends Error {}

export class RequestRefused extends ScanwireError {
  constructor(problem: Problem, status: number, retryAfterMs?: number | null);
  readonly problem: Problem;
  readonly status: number;
  /** How long to wait before the same request may do better. */
  readonly retryAfterMs: number | null;
}

export class Unreachable extends ScanwireError {}
export class BrokenStream extends ScanwireError {}
export class ResultLost extends ScanwireError {}

export class ScanFailed extends ScanwireError {
  constructor(end: End);
  readonly end: End;
}
