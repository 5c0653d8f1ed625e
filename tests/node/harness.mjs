/** What the tests of the client need: real servers in processes of their own, producers, and proxies that misbehave. */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { connect as connectTcp, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { connect } from "../../static/scanwire.js";

export const TRANSPORTS = ["fetch", "websocket", "eventsource", "poll"];

// No test is about these unless it says so.
const GENEROUS = {
  SUBMIT_PER_MIN: 100000,
  READ_PER_S: 100000,
  READ_BURST: 100000,
  CONNECT_PER_S: 100000,
  CONNECT_BURST: 100000,
  MAX_ACTIVE_PER_CLIENT: 1000,
  MAX_STREAMS_PER_CLIENT: 1000,
  DRAIN_S: 0.05,
  RETRY_MS: 0,
  WORKERS: 1,
};

export async function findPort() {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  return port;
}

// A run that takes too long is ended by a signal, before any test could stop its servers.
const servers = new Set();
const stopAll = () => {
  for (const server of servers) server.process.kill("SIGKILL");
};
process.once("exit", stopAll);
process.once("SIGTERM", () => process.exit(1));

/** A server that can be killed and started again on the same state. */
export class Server {
  static async start(settings = {}) {
    const server = new Server();
    server.stateDir = mkdtempSync(join(tmpdir(), "scanwire-"));
    server.settings = settings;
    server.port = await findPort();
    server.url = `http://127.0.0.1:${server.port}`;
    await server.run();
    return server;
  }

  async run() {
    const env = { ...process.env, SCANWIRE_STATE_DIR: this.stateDir };
    for (const [name, value] of Object.entries({ ...GENEROUS, ...this.settings })) env[`SCANWIRE_${name}`] = `${value}`;
    const command = ["-m", "app", "serve", "--port", `${this.port}`];
    this.process = spawn(process.env.SCANWIRE_TEST_PYTHON ?? "python3", command, { env, stdio: "ignore" });
    this.exited = once(this.process, "exit");
    servers.add(this);
    await until(() => this.isReady(), 30_000);
  }

  async isReady() {
    assert.equal(this.process.exitCode, null, "the server did not start");
    return (await fetch(`${this.url}/readyz`).catch(() => null))?.ok;
  }

  async kill(signal = "SIGKILL") {
    this.process.kill(signal);
    await this.exited;
  }

  async stop() {
    if (this.process.exitCode === null && this.process.signalCode === null) await this.kill();
    servers.delete(this);
    rmSync(this.stateDir, { recursive: true, force: true });
  }

  async get(path) {
    const ask = () => fetch(this.url + path, { headers: { Accept: "application/json" } });
    const answer = await until(async () => {
      const answer = await ask();
      return answer.status === 429 ? null : answer;
    });
    return answer.json();
  }

  /** What is open now on the server, from /metrics. */
  async countStreams() {
    const text = await (await fetch(`${this.url}/metrics`)).text();
    const found = text.matchAll(/^scanwire_subscribers\{[^}]*\} (\S+)$/gm);
    return [...found].reduce((sum, [, count]) => sum + Number(count), 0);
  }

  /** An external scan, which brings what the test says and when. */
  async produce(title = "Test") {
    const body = { scanner: "external", params: { title } };
    const headers = { "Content-Type": "application/json" };
    const answer = await fetch(`${this.url}/v1/scans`, { method: "POST", headers, body: JSON.stringify(body) });
    const scan = await answer.json();
    assert.ok(scan.producer_token, JSON.stringify(scan));
    return new Production(this, scan);
  }
}

export class Production {
  constructor(server, scan) {
    this.server = server;
    this.id = scan.id;
    this.token = scan.producer_token;
    this.rows = [];
  }

  async post(...events) {
    const headers = { "Content-Type": "application/json", Authorization: `Bearer ${this.token}` };
    const path = `${this.server.url}/v1/scans/${this.id}/events`;
    const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(events) });
    assert.equal(answer.status, 202, await answer.text());
  }

  /** One event with so many rows, numbered on. */
  async find(count = 1, extra = {}) {
    const rows = Array.from({ length: count }, (_, place) => ({ i: this.rows.length + place, ...extra }));
    this.rows.push(...rows);
    await this.post({ type: "matches", rows });
  }

  async end(state = "completed") {
    await this.post({ type: "end", state });
  }
}

/** Tests see to it that nothing is left open. */
export function open(t, url, options = {}) {
  const scanwire = connect(url, options);
  t.after(() => scanwire.close());
  return scanwire;
}

/** What a scan gives to listeners: its durable events, and a way to wait for more. */
export function collect(scan) {
  const got = { events: [], rows: [], error: null };
  scan.on("event", (event) => event.type !== "progress" && got.events.push(event));
  scan.on("reset", () => (got.rows = []));
  scan.on("matches", (rows) => got.rows.push(...rows));
  scan.on("error", (error) => (got.error = error));
  return got;
}

/** The log as the server has it: what every reader must have been given, once and in order. */
export async function checkComplete(server, id, events) {
  const expected = [];
  for (let cursor = ""; ; cursor = `?after=${expected.at(-1)}`) {
    const page = await server.get(`/v1/scans/${id}/events${cursor}`);
    const ids = page.events.map((event) => event.id).filter((id) => id !== undefined);
    if (ids.length === 0) break;
    expected.push(...ids);
    if (page.events.at(-1).type === "end") break;
  }
  const durable = events.filter((event) => event.id !== undefined);
  assert.deepEqual(
    durable.map((event) => event.id),
    expected,
  );
  assert.equal(durable.at(-1).type, "end");
}

export async function until(isSo, ms = 10_000) {
  const limit = performance.now() + ms;
  for (;;) {
    const answer = await isSo();
    if (answer) return answer;
    assert.ok(performance.now() < limit, `not so within ${ms} ms: ${isSo}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

/** Time that passes `factor` times as fast. */
export function hurry(factor) {
  return {
    now: () => performance.now() * factor,
    setTimeout: (callback, ms) => setTimeout(callback, ms / factor),
    clearTimeout: (timer) => clearTimeout(timer),
  };
}

/** The names of the states that were shown, without repetitions. */
export function watchStates(scanwire) {
  const states = [];
  scanwire.on("state", (state) => states.push(state));
  return states;
}

/**
 * A TCP proxy. `filter(bytes, connection)` gives what is passed on of an answer, null for nothing; `connection` has
 * the text of the last `request` on it, and both sockets.
 */
export class Proxy {
  connections = new Set();
  requests = [];
  filter = (bytes) => bytes;

  static async start(t, target) {
    const proxy = new Proxy();
    proxy.target = target;
    proxy.server = createServer((socket) => proxy.serve(socket)).listen(0, "127.0.0.1");
    await once(proxy.server, "listening");
    proxy.url = `http://127.0.0.1:${proxy.server.address().port}`;
    t.after(() => proxy.stop());
    return proxy;
  }

  serve(client) {
    const server = connectTcp(this.target.port, "127.0.0.1");
    const connection = { client, server, request: "" };
    this.connections.add(connection);
    client.on("data", (bytes) => {
      const text = bytes.toString("latin1");
      if (/^[A-Z]+ \/\S* HTTP/.test(text)) {
        connection.request = text;
        this.requests.push(text);
      }
      server.write(bytes);
    });
    server.on("data", (bytes) => {
      const passed = this.filter(bytes, connection);
      if (passed !== null && !client.destroyed) client.write(passed);
    });
    const end = () => {
      this.connections.delete(connection);
      client.destroy();
      server.destroy();
    };
    for (const socket of [client, server]) socket.on("error", end).on("close", end);
  }

  /** Connections on which a stream is open. */
  get streams() {
    return [...this.connections].filter(({ request }) => isStream(request));
  }

  cut() {
    for (const { client } of this.streams) client.destroy();
  }

  stop() {
    for (const { client } of this.connections) client.destroy();
    this.server.close();
  }
}

export function isStream(request) {
  return /text\/event-stream|upgrade: websocket|prefer: wait/i.test(request);
}

export function isEventStream(request) {
  return /accept: text\/event-stream/i.test(request);
}

export function isWebSocket(request) {
  return /upgrade: websocket/i.test(request);
}
