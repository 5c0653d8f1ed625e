/** The client against a server that answers by a script: for what a good one never does, and for how long it waits. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer } from "node:http";
import { test } from "node:test";

import { BrokenStream, RequestRefused, Unreachable } from "../../static/scanwire.js";
import { collect, findPort, hurry, open, until } from "./harness.mjs";

const SCAN = "s_scripted";

const makeEvent = (seq, type = "matches", data = { rows: [{ i: seq }] }) => {
  return { id: `test-${seq}`, scan: SCAN, seq, type, ts: 1, data };
};
const END = { state: "completed", matches: 3, last_seq: 5, error: null };
const EVENTS = [makeEvent(1, "started", {}), makeEvent(2), makeEvent(3), makeEvent(4), makeEvent(5, "end", END)];
const signal = (type, data) => ({ scan: null, seq: 0, type, ts: 1, data });

const readAfter = (request) => Number(/after=test-(\d+)/.exec(request.url)?.[1] ?? 0);
const isPage = (request) => request.headers.accept === "application/json";

/** A stream of events, those behind the cursor that was asked for; it is cut off at its end. */
const tell =
  (events, before = ": ok\n\n") =>
  (request, response) => {
    response.writeHead(200, { "Content-Type": "text/event-stream" });
    const fresh = events.filter(({ id }) => id === undefined || Number(id.slice(5)) > readAfter(request));
    response.write(before + fresh.map((event) => `data: ${JSON.stringify(event)}\n\n`).join(""));
    setTimeout(() => response.destroy(), 5);
  };

const refuse =
  (status, problem, headers = {}) =>
  (_, response) => {
    response.writeHead(status, { "Content-Type": "application/problem+json", ...headers });
    response.end(JSON.stringify(problem));
  };

const page = (request, response, events, rest) => {
  response.writeHead(200, { "Content-Type": "application/json" });
  const fresh = events.filter(({ id }) => Number(id.slice(5)) > readAfter(request));
  response.end(JSON.stringify({ events: fresh, cursor: "test-5", ...rest }));
};

/** Streams are answered by the script, one after the other and the last one again; pages by `pages`. */
async function play(
  t,
  script,
  options = {},
  pages = (request, response) => page(request, response, [], { closed: false, poll_after_s: 1 }),
) {
  const asked = [];
  const server = createServer((request, response) => {
    asked.push(request);
    if (isPage(request) && options.transports?.[0] !== "poll") return pages(request, response);
    const answer = script.length > 1 ? script.shift() : script[0];
    return answer(request, response);
  }).listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => server.close() && server.closeAllConnections());
  const url = `http://127.0.0.1:${server.address().port}`;
  // Slow enough for this machine: the deadlines are not what is tested here.
  const patient = { firstByteMs: 200_000, heartbeatMs: 1e6 };
  const scanwire = open(t, url, {
    transports: ["fetch"],
    random: () => 0.5,
    clock: hurry(100),
    ...patient,
    ...options,
  });
  const waits = [];
  scanwire.on("state", ({ name, until }) => until !== null && waits.push([name, until - Date.now()]));
  const scan = scanwire.watch(SCAN);
  return {
    scanwire,
    scan,
    got: collect(scan),
    waits,
    asked,
    streams: () => asked.filter((request) => !isPage(request)),
  };
}

const isOver = (got) => until(() => got.error ?? got.events.at(-1)?.type === "end");

function checkWaits(waits, expected) {
  assert.deepEqual(
    waits.map(([name, ms]) => [name, Math.round(ms / 50) * 50]),
    expected,
  );
}

const PASSING = [
  ["bye", tell([signal("bye", { reconnect_ms: 4200 })]), "offline", 4200],
  ["throttled", tell([signal("throttled", { retry_after_s: 7.5 })]), "throttled", 7500],
  [
    "a refusal with retry_after_s",
    refuse(503, { detail: "full", retry_after_s: 3.2 }, { "Retry-After": "4" }),
    "throttled",
    3200,
  ],
  ["a refusal with Retry-After", refuse(429, {}, { "Retry-After": "9" }), "throttled", 9000],
  ["a date that is over", refuse(503, {}, { "Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT" }), "offline", 0],
  ["a gateway's own error", refuse(502, "nonsense"), "offline", 0],
  ["retry", tell(EVENTS.slice(0, 2), "retry: 6000\n\n"), "offline", 6000],
];
for (const [what, answer, name, floorMs] of PASSING) {
  test(`the wait that the server asks for is the least: ${what}`, async (t) => {
    const { got, waits } = await play(t, [answer, tell(EVENTS)]);
    await isOver(got);
    checkWaits(waits, [[name, floorMs + 250]]);
    assert.deepEqual(got.events, EVENTS);
  });
}

test("waits between failures double up to 30 s, by full jitter, and something new makes them short again", async (t) => {
  const nothing = tell([]);
  const script = [nothing, nothing, nothing, tell(EVENTS.slice(0, 2)), nothing, tell(EVENTS)];
  const { got, waits } = await play(t, script);
  await isOver(got);
  checkWaits(
    waits,
    [250, 500, 1000, 250, 500].map((ms) => ["offline", ms]),
  );
  assert.deepEqual(got.events, EVENTS);
});

test("a server that is not there is tried for as long as patience lasts", async (t) => {
  const options = { transports: ["fetch"], clock: hurry(200), random: () => 0.5, patienceMs: 100_000 };
  const scanwire = open(t, `http://127.0.0.1:${await findPort()}`, options);
  const waits = [];
  scanwire.on("state", ({ name, until }) => until !== null && waits.push([name, until - Date.now()]));
  const got = collect(scanwire.watch(SCAN));
  await isOver(got);
  assert.ok(got.error instanceof Unreachable, String(got.error));
  checkWaits(
    waits.slice(0, 8),
    [250, 500, 1000, 2000, 4000, 8000, 15_000, 15_000].map((ms) => ["offline", ms]),
  );
  assert.equal(scanwire.state.name, "closed");
});

test("to reconnect ends the client's own waiting, and not the server's", async (t) => {
  const { scanwire, got } = await play(t, [tell([], "retry: 600000\n\n"), tell(EVENTS)], { clock: hurry(1) });
  await until(() => scanwire.state.name === "offline");
  scanwire.reconnect();
  await isOver(got);
  assert.deepEqual(got.events, EVENTS);

  const refused = await play(t, [refuse(429, { retry_after_s: 0.6 }), tell(EVENTS)], {
    clock: hurry(1),
    random: () => 0,
  });
  const began = performance.now();
  await until(() => refused.scanwire.state.name === "throttled");
  refused.scanwire.reconnect();
  await isOver(refused.got);
  assert.ok(performance.now() - began > 550);
});

test("a refusal that waiting does not help ends the watching", async (t) => {
  const { scanwire, got, streams } = await play(t, [refuse(403, { detail: "Not you." })]);
  await isOver(got);
  assert.ok(got.error instanceof RequestRefused);
  assert.deepEqual([scanwire.state.name, scanwire.state.reason, streams().length], ["closed", "Not you.", 1]);
});

for (const [what, answer] of [
  ["406", refuse(406, {})],
  ["another type", (_, response) => response.writeHead(200, { "Content-Type": "text/html" }).end("<h1>Hello</h1>")],
]) {
  test(`a stream that cannot be had is replaced by the next transport: ${what}`, async (t) => {
    const polls = (request, response) => page(request, response, EVENTS, { closed: true, poll_after_s: null });
    const { got, waits } = await play(t, [answer], { transports: ["fetch", "poll"] }, polls);
    await isOver(got);
    assert.deepEqual(got.events, EVENTS);
    assert.deepEqual(waits, []);
  });
}

test("a hole that the log has as well is an error and not a loss", async (t) => {
  const holed = EVENTS.filter(({ seq }) => seq !== 3);
  const pages = (request, response) => page(request, response, holed, { closed: true, poll_after_s: null });
  const { got, asked } = await play(t, [tell(holed)], {}, pages);
  await isOver(got);
  assert.ok(got.error instanceof BrokenStream, String(got.error));
  assert.match(got.error.message, /after event 2 .* came event 4/);
  assert.equal(asked.filter(isPage).length, 3);
  assert.deepEqual(got.events, EVENTS.slice(0, 2));
});

test("what is no event is read again from the last good cursor", async (t) => {
  const garbled = (request, response) => {
    tell(EVENTS.slice(0, 3))(request, response);
    response.write('data: {"type":"matches"}\n\n');
  };
  const { got, streams } = await play(t, [garbled, tell(EVENTS)]);
  await isOver(got);
  assert.deepEqual(got.events, EVENTS);
  assert.deepEqual(streams().map(readAfter), [0, 3]);
});

test("a connection that breaks behind a reset starts from the first event", async (t) => {
  const reset = { scan: SCAN, seq: 0, type: "reset", ts: 1, data: { reason: "epoch", snapshot: { id: SCAN } } };
  const { got, streams } = await play(t, [tell(EVENTS.slice(0, 4)), tell([reset]), tell(EVENTS)]);
  await isOver(got);
  assert.deepEqual(got.events, [...EVENTS.slice(0, 4), reset, ...EVENTS]);
  assert.deepEqual(streams().map(readAfter), [0, 4, 0]);
});

test("no content means that all was given", async (t) => {
  const empty = (_, response) => response.writeHead(204).end();
  const pages = (request, response) => page(request, response, EVENTS, { closed: true, poll_after_s: null });
  const { got } = await play(t, [empty], {}, pages);
  await isOver(got);
  assert.deepEqual(got.events, EVENTS);
});

test("polls come when the server said", async (t) => {
  const moments = [];
  const clock = hurry(20);
  const poll = (count, rest) => (request, response) => {
    moments.push(clock.now());
    page(request, response, EVENTS.slice(0, count), { closed: count === 5, ...rest });
  };
  const script = [
    poll(2, { poll_after_s: 9 }),
    poll(2, { poll_after_s: 4 }),
    poll(3, { poll_after_s: 6 }),
    poll(5, { poll_after_s: null }),
  ];
  const { got, asked } = await play(t, script, { transports: ["poll"], clock });
  await isOver(got);
  assert.deepEqual(got.events, EVENTS);
  assert.deepEqual(asked.map(readAfter), [0, 2, 2, 3]);
  // The first answer comes at once; from the second on the server may hold the poll.
  assert.deepEqual(
    asked.map(({ headers }) => headers.prefer),
    [undefined, "wait=25", "wait=25", "wait=25"],
  );
  const gaps = moments.slice(1).map((moment, place) => moment - moments[place]);
  assert.ok(gaps[1] >= 4000 && gaps[2] >= 6000, String(gaps));
});

test("an old server that gives no hints is polled every 5 to 30 s, and a hundred times at most", async (t) => {
  const waits = [];
  const clock = hurry(3000);
  const slow = {
    ...clock,
    setTimeout: (callback, ms) => {
      waits.push(ms);
      return clock.setTimeout(callback, ms > 30_000 ? 1e9 : ms);
    },
  };
  const polls = (request, response) => page(request, response, [], { closed: false });
  const { got, asked } = await play(t, [polls], { transports: ["poll"], clock: slow, firstByteMs: 1e6 });
  await isOver(got);
  assert.match(got.error.message, /100 polls/);
  assert.equal(asked.length, 100);
  const between = waits.filter((ms) => ms >= 5000 && ms < 30_000);
  assert.deepEqual(between.slice(0, 4).map(Math.round), [5000, 6000, 7200, 8640]);
  assert.ok(waits.filter((ms) => ms === 30_000).length >= 89);
});
