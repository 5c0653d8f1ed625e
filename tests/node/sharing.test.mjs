/**
 * Many tabs, one connection. The locks and the SharedWorker of a browser are played here, by the rules of their
 * specifications; the channel between the tabs, the client and the server are real.
 */

import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import { makeEnv, readSettings } from "../../static/scanwire/env.js";
import { Hub } from "../../static/scanwire/hub.js";
import { Scan } from "../../static/scanwire/scan.js";
import { Session } from "../../static/scanwire/session.js";
import { checkComplete, collect, Server, until } from "./harness.mjs";

let server;
before(async () => (server = await Server.start()));
after(() => server.stop());

/** Web Locks, exclusive ones: a queue by name, `signal` and `steal`. */
class Locks {
  #queues = new Map();

  request(name, options, work) {
    const queue = this.#queues.get(name) ?? [];
    this.#queues.set(name, queue);
    return new Promise((resolve, reject) => {
      const entry = { resolve, reject, work, isHeld: false, tab: options.tab };
      const abort = () => {
        if (entry.isHeld || !queue.includes(entry)) return;
        queue.splice(queue.indexOf(entry), 1);
        reject(options.signal.reason);
      };
      options.signal?.addEventListener("abort", abort, { once: true });
      if (options.steal) {
        if (queue[0]?.isHeld) queue.shift().reject(new DOMException("stolen", "AbortError"));
        queue.unshift(entry);
      } else {
        queue.push(entry);
      }
      this.#grant(queue);
    });
  }

  /** The tab that leads. */
  get holder() {
    return [...this.#queues.values()].flat().find(({ isHeld }) => isHeld)?.tab;
  }

  async #grant(queue) {
    const [entry] = queue;
    if (entry === undefined || entry.isHeld) return;
    entry.isHeld = true;
    await null;
    const result = await entry.work({});
    entry.resolve(result);
    if (queue[0] === entry) queue.shift();
    this.#grant(queue);
  }
}

/** The parts of a tab's browser; tests press its buttons. */
class Tab {
  constructor(t, mode, shared, settings = {}) {
    this.window = new EventTarget();
    this.document = new EventTarget();
    this.document.visibilityState = "visible";
    this.isFrozen = false;
    const tab = this;
    // A frozen page runs nothing: no timers, and no messages.
    class Channel extends BroadcastChannel {
      set onmessage(listen) {
        super.onmessage = (event) => tab.isFrozen || listen(event);
      }
      postMessage(message) {
        if (!tab.isFrozen) super.postMessage(message);
      }
    }
    const clock = {
      now: () => performance.now(),
      setTimeout: (callback, ms) => setTimeout(() => tab.isFrozen || callback(), ms),
      clearTimeout: (timer) => clearTimeout(timer),
    };
    const locks = shared.locks && {
      request: (name, options, work) => shared.locks.request(name, { ...options, tab }, work),
    };
    const around = { ...shared, locks, BroadcastChannel: Channel, document: this.document, window: this.window };
    const all = { ...readSettings(server.url, {}), ...settings };
    this.asked = [];
    const ask = (input, init) => {
      this.asked.push(String(input));
      return this.isFrozen ? new Promise(() => {}) : fetch(input, init);
    };
    this.env = makeEnv(all, { clock, fetch: ask });
    this.session = new Session(all, this.env, mode, around);
    t.after(() => this.session.close());
  }

  watch(id, after) {
    this.scan = new Scan(this.session, () => assert.fail("nothing is asked"), id, { after, keepRows: 1000 });
    this.got = collect(this.scan);
    return this.got;
  }

  hide() {
    this.window.dispatchEvent(new Event("pagehide"));
  }

  show() {
    this.window.dispatchEvent(new Event("pageshow"));
  }
}

/** SharedWorkers that run in here; `kill` ends one as a browser does: without a word. */
class Workers {
  hubs = new Map();
  started = 0;
  isBroken = false;

  get SharedWorker() {
    const workers = this;
    return class {
      constructor(_, { name }) {
        if (workers.isBroken) throw new DOMException("forbidden", "SecurityError");
        const { port1, port2 } = new MessageChannel();
        this.port = port1;
        const way = { post: (told) => port2.postMessage(told) };
        port2.onmessage = ({ data }) => {
          if (way.isDead) return;
          if (!workers.hubs.has(name)) {
            workers.started += 1;
            workers.hubs.set(name, { hub: new Hub(makeEnv(data.settings)), ways: [] });
          }
          const { hub, ways } = workers.hubs.get(name);
          ways.push(way);
          hub.hear(way, data.said);
        };
        workers.ports ??= [];
        workers.ports.push(port1, port2);
      }
    };
  }

  kill() {
    for (const { hub, ways } of this.hubs.values()) {
      for (const way of ways) way.isDead = true;
      hub.close();
    }
    this.hubs.clear();
  }

  stop() {
    this.kill();
    for (const port of this.ports ?? []) port.close();
  }
}

function openTabs(t, mode, count, settings) {
  const workers = new Workers();
  t.after(() => workers.stop());
  const shared = { SharedWorker: workers.SharedWorker, locks: new Locks() };
  const tabs = Array.from({ length: count }, () => new Tab(t, mode, shared, settings));
  return { tabs, workers, shared };
}

const haveAll = (tabs, production) => until(() => tabs.every(({ got }) => got.rows.length === production.rows.length));

async function finish(tabs, production) {
  await production.end();
  await until(() => tabs.every(({ got }) => got.events.at(-1)?.type === "end"));
  for (const { got } of tabs) {
    await checkComplete(server, production.id, got.events);
    assert.deepEqual(got.rows, production.rows);
  }
}

// Each test has its own group of tabs.
let groups = 0;
const ownGroup = () => ({ patienceMs: 1e9 + (groups += 1) });

for (const mode of ["worker", "leader"]) {
  test(`twelve tabs on one scan have one connection, by ${mode}`, async (t) => {
    const production = await server.produce();
    const { tabs } = openTabs(t, mode, 12, ownGroup());
    for (const tab of tabs) tab.watch(production.id);
    await production.find(3);
    await haveAll(tabs, production);
    assert.equal(await server.countStreams(), 1);
    for (const tab of tabs) assert.equal(tab.session.state.name, "live");
    await finish(tabs, production);
    await until(async () => (await server.countStreams()) === 0);
  });

  test(`tabs with scans of their own share the connection, and one that comes late has everything, by ${mode}`, async (t) => {
    const settings = ownGroup();
    const { tabs, shared } = openTabs(t, mode, 3, settings);
    const productions = [];
    for (const tab of tabs) {
      const production = await server.produce();
      productions.push(production);
      tab.watch(production.id);
      await production.find(2);
      await haveAll([tab], production);
    }
    await until(async () => (await server.countStreams()) === 1);
    const late = new Tab(t, mode, shared, settings);
    late.watch(productions[0].id);
    await haveAll([late], productions[0]);
    assert.equal(await server.countStreams(), 1);
    await productions[0].find(1);
    await finish([tabs[0], late], productions[0]);
    await finish([tabs[1]], productions[1]);
    await finish([tabs[2]], productions[2]);
  });

  test(`a tab that is closed or goes into the back/forward cache gives back all, and takes it up again, by ${mode}`, async (t) => {
    const production = await server.produce();
    const { tabs } = openTabs(t, mode, 2, ownGroup());
    for (const tab of tabs) tab.watch(production.id);
    await production.find(1);
    await haveAll(tabs, production);
    const began = performance.now();
    tabs[0].hide();
    await production.find(2);
    await haveAll([tabs[1]], production);
    assert.ok(performance.now() - began < 2000);
    assert.equal(tabs[0].got.rows.length, 1);
    tabs[0].show();
    await haveAll(tabs, production);
    await production.find(1);
    await finish(tabs, production);
    await until(async () => (await server.countStreams()) === 0);
  });

  test(`the last tab that leaves closes the connection, by ${mode}`, async (t) => {
    const production = await server.produce();
    const { tabs } = openTabs(t, mode, 3, ownGroup());
    for (const tab of tabs) tab.watch(production.id);
    await production.find(1);
    await haveAll(tabs, production);
    for (const tab of tabs) tab.hide();
    await until(async () => (await server.countStreams()) === 0);
  });
}

test("a leader that is frozen five times costs the others two seconds at most, and no event", async (t) => {
  const production = await server.produce();
  const { tabs, shared } = openTabs(t, "leader", 7, ownGroup());
  for (const tab of tabs) tab.watch(production.id);
  await production.find(1);
  await haveAll(tabs, production);
  const awake = [...tabs];
  for (let count = 0; count < 5; count += 1) {
    const leader = await until(() => awake.find((tab) => tab === shared.locks.holder));
    leader.isFrozen = true;
    awake.splice(awake.indexOf(leader), 1);
    const began = performance.now();
    await production.find(2);
    await haveAll(awake, production);
    const took = performance.now() - began;
    assert.ok(took < 2000, `it took ${took} ms`);
    t.diagnostic(`${Math.round(took)} ms`);
  }
  for (const tab of tabs) tab.isFrozen = false;
  for (const tab of tabs) tab.document.dispatchEvent(new Event("visibilitychange"));
  await finish(tabs, production);
});

test("a worker that is killed is replaced within two seconds, and no event is lost", async (t) => {
  const production = await server.produce();
  const { tabs, workers } = openTabs(t, "worker", 4, ownGroup());
  for (const tab of tabs) tab.watch(production.id);
  await production.find(1);
  await haveAll(tabs, production);
  const began = performance.now();
  workers.kill();
  await production.find(2);
  await haveAll(tabs, production);
  assert.ok(performance.now() - began < 2000);
  assert.equal(workers.started, 2);
  await until(async () => (await server.countStreams()) === 1);
  await finish(tabs, production);
});

test("where workers are forbidden a tab leads, and without locks each has its own", async (t) => {
  const production = await server.produce();
  const { tabs, workers, shared } = openTabs(t, "worker", 0);
  workers.isBroken = true;
  const settings = ownGroup();
  for (let count = 0; count < 3; count += 1) tabs.push(new Tab(t, "worker", shared, settings));
  for (const tab of tabs) tab.watch(production.id);
  await production.find(1);
  await haveAll(tabs, production);
  assert.equal(await server.countStreams(), 1);
  const lonely = [new Tab(t, "worker", {}, settings), new Tab(t, "worker", {}, settings)];
  for (const tab of lonely) tab.watch(production.id);
  await haveAll(lonely, production);
  assert.equal(await server.countStreams(), 3);
  await finish([...tabs, ...lonely], production);
});

test("tabs with other settings share nothing", async (t) => {
  const production = await server.produce();
  const { tabs, shared } = openTabs(t, "leader", 1, ownGroup());
  tabs.push(new Tab(t, "leader", shared, ownGroup()));
  for (const tab of tabs) tab.watch(production.id);
  await production.find(1);
  await haveAll(tabs, production);
  assert.equal(await server.countStreams(), 2);
  await finish(tabs, production);
});

test("a page that is shown again, or finds another network, tries again at once", async (t) => {
  const own = await Server.start({ RETRY_MS: 60_000 });
  t.after(() => own.stop());
  const production = await own.produce();
  const tab = new Tab(t, "none", {}, { ...ownGroup(), url: own.url });
  tab.watch(production.id);
  await production.find(1);
  await haveAll([tab], production);
  for (const [target, type] of [
    [tab.window, "online"],
    [tab.document, "visibilitychange"],
  ]) {
    await own.kill();
    await until(() => tab.session.state.name === "offline");
    assert.ok(tab.session.state.until - Date.now() > 50_000);
    await own.run();
    await production.find(1);
    target.dispatchEvent(new Event(type));
    await haveAll([tab], production);
  }
  // With another network the connection that looks open is dead.
  await new Promise((resolve) => setTimeout(resolve, 1100));
  const opens = () => tab.asked.filter((url) => /events/.test(url)).length;
  const before = opens();
  tab.window.dispatchEvent(new Event("online"));
  await until(() => opens() > before && tab.session.state.name === "live");
});
