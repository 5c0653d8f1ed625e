/** The client against a server, as long as nothing goes wrong. */

import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import { RequestRefused, ResultLost, ScanFailed } from "../../static/scanwire.js";
import { checkComplete, collect, hurry, open, Server, TRANSPORTS, until, watchStates } from "./harness.mjs";

let server;
before(async () => (server = await Server.start({ MAX_EVENTS_BODY_BYTES: 8_000_000 })));
after(() => server.stop());

for (const transport of TRANSPORTS) {
  test(`a scan is followed from its first event to its end by ${transport}`, async (t) => {
    const scanwire = open(t, server.url, { transports: [transport] });
    const states = watchStates(scanwire);
    const scan = await scanwire.submit("gap-up", {}, { reuse: "never" });
    const got = collect(scan);
    const iterated = [];
    for await (const event of scan) if (event.type !== "progress") iterated.push(event);
    const rows = await scan.result();
    assert.ok(rows.length > 0);
    assert.deepEqual(rows, (await server.get(`/v1/scans/${scan.id}/matches`)).rows);
    assert.deepEqual(got.rows, rows);
    await checkComplete(server, scan.id, got.events);
    await checkComplete(server, scan.id, iterated);
    assert.equal(scan.end.state, "completed");
    await until(() => scanwire.state.name === "idle");
    const isOf = ({ name }) => name === (transport === "poll" ? "polling" : "live");
    assert.equal(states.find(isOf)?.transport, transport);
  });

  test(`several scans, taken up one after the other, share one connection by ${transport}`, async (t) => {
    const scanwire = open(t, server.url, { transports: [transport] });
    const productions = [];
    for (let count = 0; count < 4; count += 1) {
      productions.push(await server.produce());
      await productions.at(-1).find(3);
    }
    // What they have found is older than where the stream is by the time that they are taken up.
    const gots = [];
    for (const production of productions.toReversed()) {
      gots.unshift(collect(scanwire.watch(production.id)));
      await until(() => gots[0].rows.length === production.rows.length);
      for (const other of productions) await other.find(2);
    }
    await until(() => gots.every((got, place) => got.rows.length === productions[place].rows.length));
    await until(async () => (await server.countStreams()) === 1, 3000);
    for (const production of productions) await production.end();
    await until(() => gots.every((got) => got.events.at(-1)?.type === "end"));
    for (const [place, got] of gots.entries()) {
      await checkComplete(server, productions[place].id, got.events);
      assert.deepEqual(got.rows, productions[place].rows);
    }
    await until(async () => (await server.countStreams()) === 0);
  });

  test(`a scan is taken up behind a cursor by ${transport}`, async (t) => {
    const production = await server.produce();
    await production.find(5);
    const { cursor } = await server.get(`/v1/scans/${production.id}`);
    const scanwire = open(t, server.url, { transports: [transport] });
    const got = collect(scanwire.watch(production.id, { after: cursor }));
    await production.find(2);
    await production.end();
    await until(() => got.events.at(-1)?.type === "end");
    assert.deepEqual(got.rows, production.rows.slice(5));
    // There is nothing behind the end: an iteration from there ends, and does not wait for ever.
    const { cursor: last } = await server.get(`/v1/scans/${production.id}`);
    for await (const event of scanwire.watch(production.id, { after: last })) assert.fail(event.type);
  });

  test(`who comes late to a scan that is watched already gets all of it by ${transport}`, async (t) => {
    const production = await server.produce();
    const scanwire = open(t, server.url, { transports: [transport] });
    const first = collect(scanwire.watch(production.id));
    // More than a page of the log.
    for (let count = 0; count < 4; count += 1) await production.find(500, { text: "x".repeat(300) });
    await until(() => first.rows.length === 2000);
    const second = collect(scanwire.watch(production.id));
    await until(() => second.rows.length === 2000);
    await production.find(1);
    await production.end();
    await until(() => second.events.at(-1)?.type === "end");
    await checkComplete(server, production.id, first.events);
    await checkComplete(server, production.id, second.events);
  });

  test(`the end is the end: nothing is asked behind it by ${transport}`, async (t) => {
    const asked = [];
    const note = (input, init) => {
      asked.push(String(input));
      return fetch(input, init);
    };
    const production = await server.produce();
    const scanwire = open(t, server.url, { transports: [transport], fetch: note });
    const got = collect(scanwire.watch(production.id));
    await production.end();
    await until(() => got.events.at(-1)?.type === "end" && scanwire.state.name === "idle");
    const before = asked.length;
    await new Promise((resolve) => setTimeout(resolve, 300));
    assert.equal(asked.length, before);
    assert.equal(await server.countStreams(), 0);
  });
}

test("an iteration that is slower than its scan misses nothing, and keeps little", async (t) => {
  const production = await server.produce();
  let pages = 0;
  const count = (input, init) => {
    if (new Headers(init.headers).get("Accept") === "application/json") pages += 1;
    return fetch(input, init);
  };
  const scanwire = open(t, server.url, { fetch: count, clock: hurry(20), firstByteMs: 40_000, heartbeatMs: 300_000 });
  const scan = scanwire.watch(production.id);
  const iterator = scan[Symbol.asyncIterator]();
  const rows = [];
  const take = async () => {
    const { done, value } = await iterator.next();
    if (value?.type === "matches") rows.push(...value.data.rows);
    return !done;
  };
  await take();
  let taken = 0;
  const text = "x".repeat(100);
  for (let count = 0; count < 20; count += 1) await production.find(4900, { text });
  await production.end();
  // Nothing was taken meanwhile: the stream is over, and what was not held is read again.
  await until(() => scanwire.state.name === "idle");
  const before = pages;
  while (await take()) taken += 1;
  assert.ok(taken > 0);
  assert.ok(pages - before > 30, `${pages - before} pages were read`);
  assert.deepEqual(
    rows.map(({ i }) => i),
    Array.from({ length: 20 * 4900 }, (_, i) => i),
  );
});

test("the rows that are held are bounded, and the result is whole all the same", async (t) => {
  const production = await server.produce();
  const scanwire = open(t, server.url, { keepRows: 100 });
  const scan = scanwire.watch(production.id);
  let seen = 0;
  let most = 0;
  scan.on("matches", (rows) => {
    seen += rows.length;
    most = Math.max(most, scan.rows.length);
  });
  for (let count = 0; count < 20; count += 1) await production.find(33);
  await production.end();
  const rows = await scan.result();
  assert.equal(seen, 660);
  assert.equal(scan.matches, 660);
  assert.ok(most <= 125, `${most} rows were held`);
  assert.equal(scan.rows.at(-1).i, 659);
  assert.deepEqual(rows, production.rows);
});

test("a signal ends the watching, and the connection with it", async (t) => {
  const production = await server.produce();
  const scanwire = open(t, server.url);
  const leaving = new AbortController();
  const scan = scanwire.watch(production.id, { signal: leaving.signal });
  const got = collect(scan);
  const result = scan.result();
  await production.find(2);
  await until(() => got.rows.length === 2);
  const iterator = scan[Symbol.asyncIterator]();
  await iterator.next();
  leaving.abort(new Error("enough"));
  await assert.rejects(result, /enough/);
  await assert.rejects(
    (async () => {
      while (!(await iterator.next()).done);
    })(),
    /enough/,
  );
  assert.match(got.error.message, /enough/);
  await until(async () => (await server.countStreams()) === 0);
  assert.equal(scanwire.state.name, "idle");
  await assert.rejects(scanwire.submit("gap-up", {}, { signal: leaving.signal }), /enough/);
});

test("leaving an iteration ends its watching", async (t) => {
  const production = await server.produce();
  const scanwire = open(t, server.url);
  for await (const event of scanwire.watch(production.id)) if (event.type === "started") break;
  await until(async () => (await server.countStreams()) === 0);
});

test("closing the client ends everything quietly, and results are told so", async (t) => {
  const production = await server.produce();
  const scanwire = open(t, server.url);
  const scan = scanwire.watch(production.id);
  const events = [];
  const iterating = (async () => {
    for await (const event of scan) events.push(event);
  })();
  const result = scan.result();
  await until(() => events.length > 0);
  scanwire.close();
  await iterating;
  await assert.rejects(result, ResultLost);
  assert.equal(scanwire.state.name, "closed");
  await until(async () => (await server.countStreams()) === 0);
});

test("a scan can be cancelled, and its matches are its result", async (t) => {
  const production = await server.produce();
  const scanwire = open(t, server.url);
  const scan = scanwire.watch(production.id);
  await production.find(3);
  const snapshot = await scan.cancel();
  assert.equal(snapshot.id, production.id);
  assert.deepEqual(await scan.result(), production.rows);
  assert.equal(scan.end.state, "cancelled");
});

test("the result of a failed scan is its error", async (t) => {
  const production = await server.produce();
  const scan = open(t, server.url).watch(production.id);
  await production.post({ type: "end", state: "failed", error: "The printer is empty." });
  await assert.rejects(
    scan.result(),
    (failure) => failure instanceof ScanFailed && /printer is empty/.test(failure.message),
  );
});

test("scanners and scans are listed", async (t) => {
  const scanwire = open(t, server.url);
  const { scanners, features } = await scanwire.scanners();
  assert.ok(scanners.some(({ name, params }) => name === "gap-up" && params.properties) && features.range_atr);
  const scan = await scanwire.submit("gap-up", {}, { reuse: "never" });
  const { scans, next } = await scanwire.list({ limit: 1 });
  assert.equal(scans[0].id, scan.id);
  assert.ok(next);
  const { scans: others } = await scanwire.list({ limit: 3, before: scan.id });
  assert.equal(others.length, 3);
  assert.ok(others.every(({ id }) => id !== scan.id));
});

test("a refusal is told with its problem", async (t) => {
  const scanwire = open(t, server.url);
  await assert.rejects(scanwire.submit("gap-up", { nonsense: 1 }), (error) => {
    return error instanceof RequestRefused && error.status === 422 && error.problem.errors.length > 0;
  });
});

for (const transport of TRANSPORTS) {
  test(`a scan that is not known fails alone by ${transport}`, async (t) => {
    const production = await server.produce();
    const scanwire = open(t, server.url, { transports: [transport] });
    const unknown = scanwire.watch("s_AAAAAAAAAAAAAAAAAAAAAA");
    const [bad, good] = [collect(unknown), collect(scanwire.watch(production.id))];
    await until(() => bad.error);
    assert.equal(bad.error.status, 404);
    await production.find(2);
    await production.end();
    await until(() => good.events.at(-1)?.type === "end");
    assert.deepEqual(good.rows, production.rows);
    await assert.rejects(unknown.result(), { status: 404 });
  });
}
