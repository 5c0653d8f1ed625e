/** The client over connections that break, hold back, lose and repeat, and servers that stop, die and refuse. */

import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import { ResultLost } from "../../static/scanwire.js";
import {
  checkComplete,
  collect,
  hurry,
  isEventStream,
  isStream,
  isWebSocket,
  open,
  Proxy,
  Server,
  TRANSPORTS,
  until,
  watchStates,
} from "./harness.mjs";

let server;
before(async () => (server = await Server.start()));
after(() => server.stop());

async function follow(t, url, options) {
  const production = await server.produce();
  const scanwire = open(t, url, options);
  const states = watchStates(scanwire);
  const scan = scanwire.watch(production.id);
  const got = collect(scan);
  const check = async () => {
    await production.end();
    await until(() => got.error ?? got.events.at(-1)?.type === "end");
    assert.equal(got.error, null);
    await checkComplete(server, production.id, got.events);
    assert.deepEqual(got.rows, production.rows);
    assert.deepEqual(await scan.result(), production.rows);
  };
  const find = async (count, options) => {
    await production.find(count, options);
    await until(() => got.rows.length === production.rows.length);
  };
  return { production, scanwire, states, scan, got, check, find };
}

for (const transport of TRANSPORTS) {
  test(`a connection that is cut again and again loses and repeats nothing by ${transport}`, async (t) => {
    const proxy = await Proxy.start(t, server);
    const { production, find, check } = await follow(t, proxy.url, { transports: [transport], clock: hurry(10) });
    for (let count = 0; count < 6; count += 1) {
      await find(2);
      proxy.cut();
      await production.find(1);
    }
    assert.match(proxy.requests.filter(isStream).at(-1), /after=[a-z0-9]+-\d+/);
    await check();
  });

  test(`a cursor of another epoch is answered with a reset by ${transport}`, async (t) => {
    const production = await server.produce();
    await production.find(3);
    const scanwire = open(t, server.url, { transports: [transport] });
    const got = collect(scanwire.watch(production.id, { after: "another-7" }));
    await until(() => got.rows.length === 3);
    await production.find(1);
    await production.end();
    await until(() => got.events.at(-1).type === "end");
    assert.deepEqual([got.events[0].type, got.events[0].data.reason], ["reset", "epoch"]);
    assert.equal(got.events.filter(({ type }) => type === "reset").length, 1);
    await checkComplete(server, production.id, got.events);
  });
}

test("a server that is killed and started again goes on where it was, by each transport", async (t) => {
  const own = await Server.start();
  t.after(() => own.stop());
  const production = await own.produce();
  const readers = TRANSPORTS.map((transport) => {
    const scanwire = open(t, own.url, { transports: [transport], random: () => 0.1 });
    return { transport, scanwire, got: collect(scanwire.watch(production.id)) };
  });
  await production.find(3);
  for (const { got } of readers) await until(() => got.rows.length === 3);
  await own.kill();
  for (const { scanwire } of readers) {
    await until(() => scanwire.state.name === "offline");
    assert.ok(scanwire.state.until > Date.now() - 1000 && scanwire.state.reason.length > 0);
  }
  await own.run();
  await production.find(2);
  await production.end();
  for (const { transport, scanwire, got } of readers) {
    await until(() => got.events.at(-1)?.type === "end", 20_000);
    assert.equal(scanwire.state.transport ?? transport, transport);
    await checkComplete(own, production.id, got.events);
    assert.deepEqual(got.rows, production.rows, transport);
  }
});

test("a stream cut after any byte loses and repeats nothing", async (t) => {
  const production = await server.produce();
  await production.find(2);
  await production.find(2);
  await production.end();
  const proxy = await Proxy.start(t, server);
  let left = 0;
  proxy.filter = (bytes, connection) => {
    if (!isEventStream(connection.request)) return bytes;
    const passed = bytes.subarray(0, left);
    left -= passed.length;
    if (passed.length < bytes.length) {
      left = Infinity;
      connection.client.end(passed);
      return null;
    }
    return passed;
  };
  for (let cut = 200; cut < 2000; cut += 97) {
    left = cut;
    const scanwire = open(t, proxy.url, {
      transports: ["fetch"],
      clock: hurry(100),
      firstByteMs: 200_000,
      random: () => 0,
    });
    const got = collect(scanwire.watch(production.id));
    await until(() => got.events.at(-1)?.type === "end");
    await checkComplete(server, production.id, got.events);
    scanwire.close();
  }
});

test("a proxy that buffers is found out after two seconds, and the next transport brings everything", async (t) => {
  const proxy = await Proxy.start(t, server);
  proxy.filter = (bytes, { request }) => (isEventStream(request) ? null : bytes);
  const began = performance.now();
  const { scanwire, find, check } = await follow(t, proxy.url);
  await find(1);
  const took = performance.now() - began;
  assert.ok(took > 1900 && took < 3500, `it took ${took} ms`);
  assert.equal(scanwire.state.transport, "websocket");
  await find(2);
  await check();
});

test("a proxy that passes the head and buffers the body is found out as well", async (t) => {
  const proxy = await Proxy.start(t, server);
  proxy.filter = (bytes, connection) => {
    if (!isEventStream(connection.request)) return bytes;
    const head = connection.hasHead ? -4 : bytes.indexOf("\r\n\r\n");
    connection.hasHead = true;
    return head < 0 ? null : bytes.subarray(0, head + 4);
  };
  const { scanwire, find, check } = await follow(t, proxy.url);
  await find(1);
  assert.equal(scanwire.state.transport, "websocket");
  await check();
});

test("where neither streams nor WebSockets get through, it polls, and wastes no time on the other stream", async (t) => {
  const proxy = await Proxy.start(t, server);
  proxy.filter = (bytes, { request, client }) => {
    if (isWebSocket(request)) client.destroy();
    return isEventStream(request) || isWebSocket(request) ? null : bytes;
  };
  const began = performance.now();
  const { scanwire, find, check } = await follow(t, proxy.url);
  await find(1);
  assert.ok(performance.now() - began < 3900);
  assert.equal(scanwire.state.name, "polling");
  await find(2);
  await check();
});

test("a better transport is tried again after a while, beside the present one", async (t) => {
  const proxy = await Proxy.start(t, server);
  let isHeld = true;
  proxy.filter = (bytes, { request }) => (isHeld && isEventStream(request) ? null : bytes);
  const options = { firstByteMs: 300, retryBetterMs: 400 };
  const { scanwire, states, find, check } = await follow(t, proxy.url, options);
  await find(1);
  assert.equal(scanwire.state.transport, "websocket");
  const attempts = () => proxy.requests.filter(isEventStream).length;
  await until(() => attempts() >= 3);
  // It was tried, and nobody noticed.
  assert.equal(scanwire.state.transport, "websocket");
  await find(1);
  isHeld = false;
  await until(() => scanwire.state.transport === "fetch" && scanwire.state.name === "live");
  await find(1);
  assert.ok(states.every(({ name }) => ["idle", "connecting", "live", "catching-up"].includes(name)));
  await check();
});

test("the transport changes in mid-scan when the way there changes", async (t) => {
  const proxy = await Proxy.start(t, server);
  let isHeld = false;
  proxy.filter = (bytes, { request }) => (isHeld && isEventStream(request) ? null : bytes);
  const { production, scanwire, find, check } = await follow(t, proxy.url, { firstByteMs: 300, random: () => 0.1 });
  await find(3);
  assert.equal(scanwire.state.transport, "fetch");
  isHeld = true;
  proxy.cut();
  await production.find(2);
  await until(() => scanwire.state.transport === "websocket" && scanwire.state.name === "live");
  await find(1);
  proxy.cut();
  await find(1);
  await check();
});

for (const transport of ["fetch", "websocket"]) {
  test(`an event that is lost on the way is read again by ${transport}`, async (t) => {
    const proxy = await Proxy.start(t, server);
    let lost = 0;
    proxy.filter = (bytes, { request }) => {
      if (!isStream(request) || !bytes.includes('"seq":3,')) return bytes;
      lost += 1;
      return null;
    };
    const { production, got, find, check } = await follow(t, proxy.url, { transports: [transport] });
    await find(1);
    const shown = got.rows.length;
    await production.find(1); // seq 3
    await until(() => lost === 1);
    assert.equal(got.rows.length, shown);
    await find(1);
    await find(1);
    await check();
    assert.equal(proxy.requests.filter(isStream).length, 1);
  });

  test(`an event that comes twice is shown once by ${transport}`, async (t) => {
    const proxy = await Proxy.start(t, server);
    let repeated = 0;
    proxy.filter = (bytes, { request }) => {
      if (!isStream(request) || !bytes.includes('"type":"matches"')) return bytes;
      repeated += 1;
      return Buffer.concat([bytes, bytes]);
    };
    const { find, check } = await follow(t, proxy.url, { transports: [transport] });
    for (let count = 0; count < 4; count += 1) await find(1);
    assert.ok(repeated >= 4);
    await check();
  });
}

test("a stream that falls silent is left after three heartbeats", async (t) => {
  const proxy = await Proxy.start(t, server);
  let isSilent = false;
  proxy.filter = (bytes, connection) => (isSilent && connection.isOld ? null : bytes);
  const { production, got, find, check } = await follow(t, proxy.url, { transports: ["fetch"], heartbeatMs: 200 });
  await find(1);
  for (const connection of proxy.connections) connection.isOld = true;
  isSilent = true;
  const began = performance.now();
  await production.find(1);
  await until(() => got.rows.length === 2);
  assert.ok(performance.now() - began < 2000);
  await check();
});

test("a WebSocket that falls silent is asked, and left when it does not answer", async (t) => {
  const proxy = await Proxy.start(t, server);
  let isSilent = false;
  proxy.filter = (bytes, connection) => (isSilent && connection.isOld ? null : bytes);
  const options = { transports: ["websocket"], heartbeatMs: 15_000, clock: hurry(20), firstByteMs: 40_000 };
  const { production, scanwire, got, find, check } = await follow(t, proxy.url, options);
  await find(1);
  const upgrades = () => proxy.requests.filter(isWebSocket).length;
  // It answers: over several heartbeats nothing is opened anew.
  await new Promise((resolve) => setTimeout(resolve, 3000));
  assert.equal(upgrades(), 1);
  for (const connection of proxy.connections) connection.isOld = true;
  isSilent = true;
  await production.find(1);
  await until(() => got.rows.length === 2);
  assert.equal(upgrades(), 2);
  assert.equal(scanwire.state.transport, "websocket");
  await check();
});

test("a server that stops says bye, and is found again, by each stream", async (t) => {
  const own = await Server.start();
  t.after(() => own.stop());
  const production = await own.produce();
  const readers = TRANSPORTS.slice(0, 3).map((transport) => {
    const scanwire = open(t, own.url, { transports: [transport], random: () => 0.1 });
    return { transport, states: watchStates(scanwire), got: collect(scanwire.watch(production.id)) };
  });
  await production.find(2);
  for (const { got } of readers) await until(() => got.rows.length === 2);
  await own.kill("SIGTERM");
  for (const { states } of readers) await until(() => states.some(({ reason }) => reason === "The server is stopping."));
  await own.run();
  await production.find(1);
  await production.end();
  for (const { transport, got } of readers) {
    await until(() => got.events.at(-1)?.type === "end", 20_000);
    await checkComplete(own, production.id, got.events);
    assert.deepEqual(got.rows, production.rows, transport);
  }
});

for (const transport of TRANSPORTS) {
  test(`a server that throttles is obeyed, and everything comes all the same by ${transport}`, async (t) => {
    const bound = transport === "poll" ? { READ_PER_S: 2, READ_BURST: 1 } : { CONNECT_PER_S: 2, CONNECT_BURST: 1 };
    const own = await Server.start(bound);
    t.after(() => own.stop());
    const production = await own.produce();
    const scanwire = open(t, own.url, { transports: [transport], random: () => 0 });
    const states = watchStates(scanwire);
    // Empties the bucket.
    const path = transport === "poll" ? `/v1/scans/${production.id}` : `/v1/scans/${production.id}/events`;
    const leaving = new AbortController();
    const headers = { Accept: transport === "poll" ? "application/json" : "text/event-stream" };
    for (let count = 0; count < 3; count += 1) await fetch(own.url + path, { headers, signal: leaving.signal });
    leaving.abort();
    const got = collect(scanwire.watch(production.id));
    await production.find(2);
    await until(() => got.rows.length === 2, 15_000);
    await production.end();
    await until(() => got.events.at(-1)?.type === "end", 15_000);
    await checkComplete(own, production.id, got.events);
    const throttled = states.filter(({ name }) => name === "throttled");
    // A refused handshake is not shown to scripts, and a plain request charges another bucket.
    if (transport !== "websocket") assert.ok(throttled.length > 0, JSON.stringify(states));
    assert.ok(throttled.length < 4, JSON.stringify(states));
  });
}

test("what is past its retention is a reset and the end, and its rows are lost", async (t) => {
  const own = await Server.start({ RETENTION_S: 0.3, REAP_EVERY_S: 0.1 });
  t.after(() => own.stop());
  const production = await own.produce();
  await production.find(2);
  await production.end();
  const isTrimmed = async () => (await fetch(`${own.url}/v1/scans/${production.id}/matches`)).status === 410;
  await until(isTrimmed);
  for (const transport of TRANSPORTS) {
    const scanwire = open(t, own.url, { transports: [transport] });
    const scan = scanwire.watch(production.id);
    const got = collect(scan);
    await until(() => got.events.at(-1)?.type === "end");
    assert.deepEqual(
      got.events.map(({ type }) => type),
      ["reset", "end"],
    );
    await assert.rejects(scan.result(), ResultLost);
  }
});

test("a key is sent on every transport that can carry it, and a wrong one closes the connection", async (t) => {
  const key = "a-key";
  const digest = Buffer.from(await crypto.subtle.digest("SHA-256", Buffer.from(key))).toString("hex");
  const own = await Server.start({ API_KEYS: `test:${digest}` });
  t.after(() => own.stop());
  for (const transport of ["fetch", "websocket", "poll"]) {
    const scanwire = open(t, own.url, { apiKey: key, transports: [transport] });
    const scan = await scanwire.submit("gap-up", {}, { reuse: "never" });
    assert.ok((await scan.result()).length > 0);
    const stranger = open(t, own.url, { apiKey: "wrong", transports: [transport] });
    const got = collect(stranger.watch(scan.id));
    await until(() => got.error);
    assert.equal(got.error.status, 401);
    assert.equal(stranger.state.name, "closed");
    assert.match(stranger.state.reason, /key/);
  }
});
