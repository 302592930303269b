"""Server-sent events, however a connection divides them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from perf.backends.http.events import events

STREAM = (
    b": a comment\n\ndata: one\n\n"
    b"event: message\r\nid: 7\r\ndata:two\r\n\r\n"
    b"data: three\ndata:  and more\n\n"
    b'error: {"message": "no"}\n\n'
    b"data: \xc3\xa9\n\ndata: [DONE]\n\n"
)
FOUND = [  # the end of each in the stream, its kind and text
    (b"one\n\n", "data", "one"),
    (b"two\r\n\r\n", "data", "two"),
    (b"more\n\n", "data", "three\n and more"),
    (b"}\n\n", "error", '{"message": "no"}'),
    (b"\xa9\n\n", "data", "é"),
    (b"[DONE]\n\n", "data", "[DONE]"),
]


@given(st.sets(st.integers(1, len(STREAM) - 1)))
def test_a_stream_is_the_same_however_it_is_divided(cuts: set[int]) -> None:
    places = [*sorted(cuts), len(STREAM)]
    parts = [(float(end), STREAM[begin:end]) for begin, end in pairwise([0, *places])]
    ends = [STREAM.index(end) + len(end) for end, _, _ in FOUND]
    times = [min(place for place in places if place >= end) for end in ends]
    expected = [(at, kind, text) for at, (_, kind, text) in zip(times, FOUND, strict=True)]
    assert list(events(parts)) == expected


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_an_event_that_the_stream_cuts_short_is_given(end: bytes) -> None:
    assert list(events([(1.0, b"data: [DONE]" + end)])) == [(1.0, "data", "[DONE]")]


def test_an_event_is_timed_by_its_end() -> None:
    parts = [(1.0, b"data: a"), (2.0, b"\n"), (3.0, b"\ndata: b\n\n")]
    assert list(events(parts)) == [(3.0, "data", "a"), (3.0, "data", "b")]


def test_nothing_is_no_event() -> None:
    assert list(events([])) == []
    assert list(events([(1.0, b": ping\n\n\n\n")])) == []
