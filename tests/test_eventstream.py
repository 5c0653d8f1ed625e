"""Bytes to events: however a body is cut into pieces, and whatever is missing from it."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.eventstream import Gap, Garbled, NdjsonDecoder, ScanEvent, Sequence, SseDecoder
from tests.scripted import SCAN, encode, make_event, make_events, make_reset, make_signal

EVENTS = make_events(3)
LINE_ENDS = st.sampled_from(["\n", "\r", "\r\n"])
CUTS = st.lists(st.integers(min_value=0, max_value=1200), max_size=40)


def cut(body: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(place, len(body)) for place in places), len(body)]
    return [body[start:end] for start, end in pairwise(edges)]


def parse(event: dict[str, object]) -> ScanEvent:
    return ScanEvent.parse(json.dumps(event).encode())


@given(CUTS, LINE_ENDS, st.booleans())
def test_a_stream_cut_into_any_pieces_gives_the_same_events(places: list[int], end: str, has_mark: bool) -> None:
    lines = [": hello", "retry: 1500", ""]
    for event in EVENTS:
        text = json.dumps(event, ensure_ascii=False)
        lines += [f"event: {event['type']}", f"id: {event['id']}", f"data: {text}", ""]
    body = ("\ufeff" * has_mark + "".join(line + end for line in lines)).encode()
    decoder = SseDecoder()
    received = [event for piece in cut(body, places) for event in decoder.feed(piece)]
    assert [json.loads(event.json) for event in received] == EVENTS
    assert decoder.retry_s == 1.5


@given(CUTS)
def test_ndjson_cut_into_any_pieces_gives_the_same_events(places: list[int]) -> None:
    decoder = NdjsonDecoder()
    body = encode(EVENTS, "application/x-ndjson")
    received = [event for piece in cut(body, places) for event in decoder.feed(piece)]
    assert [json.loads(event.json) for event in received] == EVENTS


@pytest.mark.parametrize(
    ("body", "frames"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data:a\ndata: b\n\n", [b"a\nb"]),  # several lines are joined, one space is taken off
        (b"data:  a\n\n", [b" a"]),
        (b"data\n\n", [b""]),
        (b"data: a\n", []),  # cut off before its end
        (b"event: x\nid: 3\n\n", []),  # an event without data is none
        (b": data: a\n\n", []),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [b"a"]),  # a mark within the stream belongs to the field's name
        (b"DATA: a\nretry: soon\ndata: b\n\n", [b"b"]),
        ("data: a\u2028b\u0085c\n\n".encode(), ["a\u2028b\u0085c".encode()]),
        (b"data: a\r\rdata: b\r\n\r\ndata: c\n\r", [b"a", b"b", b"c"]),
    ],
)
def test_sse_fields_are_read_as_the_standard_says(body: bytes, frames: list[bytes]) -> None:
    assert SseDecoder().feed_frames(body) == frames
    whole = SseDecoder()
    assert [frame for byte in body for frame in whole.feed_frames(bytes([byte]))] == frames


@pytest.mark.parametrize("body", [b"data: " + b"x" * 200, b"data: x\n" * 60, b":" + b"x" * 200 + b"\n"])
def test_a_frame_over_the_bound_is_refused_before_it_ends(body: bytes) -> None:
    decoder = SseDecoder(max_frame_bytes=100)

    def feed_slowly() -> None:
        for byte in body:
            decoder.feed_frames(bytes([byte]))

    with pytest.raises(Garbled, match="longer than 100 bytes"):
        feed_slowly()


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", '{"type":1,"seq":1,"ts":1,"data":{}}', "null"])
def test_what_is_not_an_event_is_refused(text: str) -> None:
    with pytest.raises(Garbled):
        ScanEvent.parse(text.encode())


def test_an_id_without_a_number_is_refused() -> None:
    with pytest.raises(Garbled):
        parse(make_event(1, "queued", {}, id="nonsense"))


def test_each_durable_event_is_admitted_once_and_the_cursor_follows() -> None:
    sequence = Sequence([SCAN], None)
    admitted = [event["seq"] for event in [*EVENTS[:3], *EVENTS[1:]] if sequence.admit(parse(event))]
    assert admitted == [1, 2, 3, 4, 5, 6]
    assert sequence.cursor == "test-6"
    assert sequence.open == ()


def test_a_gap_is_found_and_leaves_the_cursor_where_it_was() -> None:
    sequence = Sequence([SCAN], None)
    assert sequence.admit(parse(EVENTS[0]))
    with pytest.raises(Gap):
        sequence.admit(parse(EVENTS[2]))
    assert sequence.cursor == "test-1"
    assert sequence.admit(parse(EVENTS[1]))


def test_from_a_cursor_on_the_first_event_may_have_any_number() -> None:
    sequence = Sequence([SCAN], "test-3")
    assert sequence.admit(parse(EVENTS[3]))


def test_of_a_scan_past_its_retention_the_end_alone_is_no_gap() -> None:
    sequence = Sequence([SCAN], None)
    assert sequence.admit(parse(EVENTS[-1]))


def test_a_reset_starts_the_scan_anew() -> None:
    sequence = Sequence([SCAN], None)
    for event in EVENTS[:4]:
        sequence.admit(parse(event))
    assert sequence.admit(parse(make_reset({"id": SCAN})))
    assert sequence.cursor is None
    assert [sequence.admit(parse(event)) for event in EVENTS] == [True] * len(EVENTS)


def test_a_reset_without_a_snapshot_closes_the_scan() -> None:
    sequence = Sequence([SCAN, "s_other"], None)
    assert sequence.admit(parse(make_reset(None)))
    assert sequence.open == ("s_other",)


def test_progress_is_shown_unless_it_is_from_before_what_was_read() -> None:
    sequence = Sequence([SCAN], None)
    for event in EVENTS[:3]:
        sequence.admit(parse(event))
    progress = {"scan": SCAN, "type": "progress", "ts": 1, "data": {"done": 1}}
    assert sequence.admit(parse({**progress, "seq": 3}))
    assert not sequence.admit(parse({**progress, "seq": 2}))


def test_events_of_the_connection_and_of_other_scans_are_not_shown() -> None:
    sequence = Sequence([SCAN], None)
    assert not sequence.admit(parse(make_signal("bye", {})))
    assert not sequence.admit(parse(make_event(1, "queued", {}, scan="s_other")))
