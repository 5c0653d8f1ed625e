/** The parts of the client that need no server: parsing, order, backoff, the choice of a transport. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { backOff } from "../../static/scanwire/env.js";
import { isUpTo, Position, readEvent, SseParser } from "../../static/scanwire/eventstream.js";
import { Ladder } from "../../static/scanwire/ladder.js";
import { Patience } from "../../static/scanwire/patience.js";
import { Buffer as EventBuffer } from "../../static/scanwire/sinks.js";

const encoder = new TextEncoder();

function parse(text, pieces = [text]) {
  const parser = new SseParser();
  const messages = pieces.flatMap((piece) => parser.feed(typeof piece === "string" ? encoder.encode(piece) : piece));
  return { messages, parser };
}

// Each: what it shows, the body, and what an EventSource dispatches as [type, data, id].
const STREAMS = [
  [
    "an event ends with an empty line",
    "data:a\n\ndata: b\n\n",
    [
      ["message", "a", ""],
      ["message", "b", ""],
    ],
  ],
  ["what the end cuts off is never given", "data:a\n\ndata:b\n", [["message", "a", ""]]],
  [
    "one space behind the colon goes, and no more",
    "data:  a\n\ndata:\tb\n\n",
    [
      ["message", " a", ""],
      ["message", "\tb", ""],
    ],
  ],
  ["lines of data are joined by line feeds", "data:a\ndata\ndata:b\n\n", [["message", "a\n\nb", ""]]],
  ["an empty data field is an event", "data\n\n", [["message", "", ""]]],
  ["two of them are a line feed", "data:\ndata:\n\n", [["message", "\n", ""]]],
  ["without data there is no event, and its type is forgotten", "event:x\n\ndata:a\n\n", [["message", "a", ""]]],
  [
    "the type holds for one event",
    "event:x\ndata:a\n\ndata:b\n\n",
    [
      ["x", "a", ""],
      ["message", "b", ""],
    ],
  ],
  ["the last type counts", "event:x\nevent:y\ndata:a\n\n", [["y", "a", ""]]],
  ["an empty type is the usual one", "event:x\nevent\ndata:a\n\n", [["message", "a", ""]]],
  [
    "comments and unknown fields mean nothing",
    ":\n: c\ndatax:1\n data:2\nDATA:3\ndata:a\n:x\n\n",
    [["message", "a", ""]],
  ],
  ["CR ends a line", "data:a\rdata:b\r\r", [["message", "a\nb", ""]]],
  ["CRLF ends one line", "data:a\r\ndata:b\r\n\r\n", [["message", "a\nb", ""]]],
  [
    "line ends may be mixed",
    "data:a\n\rdata:b\r\n\ndata:c\r\r\n",
    [
      ["message", "a", ""],
      ["message", "b", ""],
      ["message", "c", ""],
    ],
  ],
  [
    "other separators end none",
    "data:a\u0085b\u2028c\u2029d\u000be\u000cf\n\n",
    [["message", "a\u0085b\u2028c\u2029d\u000be\u000cf", ""]],
  ],
  ["one BOM at the start is dropped", "\ufeffdata:a\n\n", [["message", "a", ""]]],
  ["a second one is part of the field's name", "\ufeff\ufeffdata:a\n\ndata:b\n\n", [["message", "b", ""]]],
  [
    "an id stays for those that follow",
    "id:1\ndata:a\n\ndata:b\n\n",
    [
      ["message", "a", "1"],
      ["message", "b", "1"],
    ],
  ],
  [
    "an empty id takes it away",
    "id:1\ndata:a\n\nid\ndata:b\n\n",
    [
      ["message", "a", "1"],
      ["message", "b", ""],
    ],
  ],
  [
    "an id with NULL counts for nothing",
    "id:1\ndata:a\n\nid:2\0x\ndata:b\n\n",
    [
      ["message", "a", "1"],
      ["message", "b", "1"],
    ],
  ],
  ["NULL elsewhere is a character", "data:\0\n\n", [["message", "\0", ""]]],
  ["an id alone is kept for the next event", "id:7\n\ndata:a\n\n", [["message", "a", "7"]]],
  [
    "a line of colons",
    "data::\n\n::\ndata:b:c\n\n",
    [
      ["message", ":", ""],
      ["message", "b:c", ""],
    ],
  ],
  ["any text", "data:ä€😀\n\n", [["message", "ä€😀", ""]]],
];

for (const [rule, body, expected] of STREAMS) {
  test(`event stream: ${rule}`, () => {
    const read = ({ messages }) => messages.map(({ type, data, id }) => [type, data, id]);
    assert.deepEqual(read(parse(body)), expected);
    // However it is cut into pieces, within characters and line ends too.
    const bytes = encoder.encode(body);
    assert.deepEqual(
      read(
        parse(
          "",
          Array.from(bytes, (_, place) => bytes.subarray(place, place + 1)),
        ),
      ),
      expected,
    );
    for (let cut = 1; cut < bytes.length; cut += 1) {
      assert.deepEqual(read(parse("", [bytes.subarray(0, cut), new Uint8Array(), bytes.subarray(cut)])), expected);
    }
  });
}

test("event stream: retry takes digits and nothing else", () => {
  const readRetry = (text) => parse(text).parser.retryMs;
  assert.equal(readRetry("retry:1500\n"), 1500);
  assert.equal(readRetry("retry: 0\n"), 0);
  for (const wrong of ["1000x", "-1", "+1", "1.5", "", "  7", "1e3", "١"])
    assert.equal(readRetry(`retry:${wrong}\n`), null);
  assert.equal(readRetry("retry:20\nretry:x\n"), 20);
  assert.equal(readRetry("retry:99999999999999999999\n"), 600_000);
});

test("event stream: the id is taken over at the empty line", () => {
  const parser = new SseParser();
  parser.feed(encoder.encode("id:1\n"));
  assert.equal(parser.lastEventId, "");
  parser.feed(encoder.encode("\n"));
  assert.equal(parser.lastEventId, "1");
});

test("event stream: an endless event is refused, in one line or in many", () => {
  const parser = () => new SseParser(1000);
  assert.throws(() => parser().feed(encoder.encode(`data:${"x".repeat(2000)}`)), { name: "BrokenStream" });
  assert.throws(() => parser().feed(encoder.encode("data:xxxx\n".repeat(300))), { name: "BrokenStream" });
  assert.equal(parser().feed(encoder.encode("data:xxxx\n\n".repeat(300))).length, 300);
});

test("what is no event is refused", () => {
  const event = { type: "end", seq: 1, ts: 1, data: {}, id: "k3f9-1", scan: "s" };
  assert.deepEqual(readEvent(JSON.stringify(event)), event);
  for (const wrong of ["", "1", "null", "[]", "{}", '{"type":"end"}'])
    assert.throws(() => readEvent(wrong), { name: "BrokenStream" });
  for (const part of [{ seq: "1" }, { data: null }, { data: 1 }, { type: 1 }, { id: 7 }, { id: "K-1" }, { seq: 1.5 }]) {
    assert.throws(() => readEvent({ ...event, ...part }), { name: "BrokenStream" });
  }
});

const durable = (seq, n = seq * 10, type = "matches") => ({ type, seq, id: `test-${n}`, scan: "s", ts: 0, data: {} });
const progress = (seq) => ({ type: "progress", seq, scan: "s", ts: 0, data: {} });

test("order: each durable event is new once, and a hole is a gap", () => {
  const position = new Position(null);
  assert.equal(position.judge(durable(2)), "gap");
  for (const seq of [1, 2, 3]) {
    assert.equal(position.judge(durable(seq)), "new");
    position.take(durable(seq));
    assert.equal(position.judge(durable(seq)), "old");
  }
  assert.equal(position.judge(durable(1)), "old");
  assert.equal(position.judge(durable(3, 99)), "old");
  assert.equal(position.judge(durable(5)), "gap");
  assert.deepEqual([position.judge(progress(3)), position.judge(progress(2))], ["new", "old"]);
  assert.equal(position.cursor, "test-30");
});

test("order: behind a foreign cursor, what comes first is the first", () => {
  const position = new Position("test-30");
  assert.equal(position.judge(durable(3, 30)), "old");
  assert.equal(position.judge(durable(9, 31)), "new");
  position.take(durable(9, 31));
  assert.equal(position.judge(durable(11, 40)), "gap");
});

test("order: a reset tells everything again, and an end may be all there is", () => {
  const position = new Position("test-30");
  position.take({ type: "reset", seq: 0, scan: "s", ts: 0, data: {} });
  assert.equal(position.judge(durable(1, 5)), "new");
  assert.equal(position.judge(durable(2, 5)), "gap");
  assert.equal(position.judge(durable(7, 50, "end")), "new");
});

test("order: cursors compare within an epoch alone", () => {
  assert.equal(isUpTo(null, null), true);
  assert.equal(isUpTo("aaaa-1", null), false);
  assert.deepEqual([isUpTo("aaaa-2", "aaaa-10"), isUpTo("aaaa-10", "aaaa-2")], [true, false]);
  assert.equal(isUpTo("aaaa-1", "bbbb-2"), false);
  assert.equal(isUpTo("lost", "aaaa-2"), false);
});

test("backoff is anything up to a ceiling that doubles from 0.5 to 30 s", () => {
  assert.deepEqual(
    [0, 1, 2, 3, 6, 7, 99].map((failures) => backOff(failures, 1)),
    [500, 1000, 2000, 4000, 30_000, 30_000, 30_000],
  );
  assert.equal(backOff(3, 0), 0);
});

test("a transport that worked is left after the second failure, one that never did after the first", () => {
  const ladder = new Ladder(["fetch", "websocket", "poll"]);
  assert.equal(ladder.blame(true), true);
  assert.equal(ladder.current, "websocket");
  ladder.note("websocket");
  assert.deepEqual(
    [ladder.blame(false), ladder.current, ladder.blame(false), ladder.current],
    [false, "websocket", true, "poll"],
  );
  assert.deepEqual(ladder.better, ["fetch", "websocket"]);
  assert.deepEqual([ladder.blame(false), ladder.current], [false, "fetch"]);
});

test("what holds back one long answer holds back the other", () => {
  const ladder = new Ladder(["fetch", "websocket", "eventsource", "poll"]);
  ladder.blame(true);
  ladder.blame(false);
  assert.equal(ladder.current, "poll");
  assert.deepEqual(ladder.better, ["fetch", "websocket"]);
});

test("a buffer that nobody reads is full, holds the latest progress, and has room when all was taken", async () => {
  const buffer = new EventBuffer();
  for (let done = 0; done < 5000; done += 1) buffer.push(progress(done));
  assert.equal(buffer.isFull(), false);
  for (let seq = 1; seq < 1000; seq += 1) buffer.push(durable(seq, seq, "queued"));
  assert.equal(buffer.isFull(), true);
  let hasRoom = false;
  const room = buffer.room().then(() => (hasRoom = true));
  assert.equal((await buffer.take()).value.seq, 4999);
  for (let seq = 1; seq < 999; seq += 1) await buffer.take();
  assert.equal(hasRoom, false);
  assert.equal((await buffer.take()).value.seq, 999);
  await room;
  buffer.push({ ...durable(1), data: { rows: Array(20_000).fill({}) } });
  assert.equal(buffer.isFull(), true);
});

test("patience ends when all waits without anything new would take too long, and a connection that held renews it", () => {
  let now = 0;
  const env = { clock: { now: () => now }, random: () => 1, heartbeatMs: 15_000, patienceMs: 10_000 };
  const patience = new Patience(env);
  const fail = (floorMs = 0) => {
    const waitMs = patience.spend(now, floorMs);
    now += waitMs ?? 0;
    return waitMs;
  };
  assert.deepEqual([fail(), fail(), fail(), fail(), fail()], [500, 1000, 2000, 4000, null]);
  patience.renew();
  assert.deepEqual([fail(3000), fail()], [3500, 1000]);
  patience.retryMs = 2000;
  assert.equal(fail(100), 4000);
  now += 20_000;
  assert.equal(patience.spend(now - 16_000, 0), 2500);
});
