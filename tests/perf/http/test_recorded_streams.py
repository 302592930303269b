"""Streams that real servers sent, of eight tokens each, as they were recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf.backends.http.reply import read_reply

STREAMS = Path(__file__).parents[1] / "data" / "streams"
TOKENS = 8


@pytest.mark.parametrize("path", sorted(STREAMS.glob("*.txt")), ids=lambda path: path.stem)
def test_a_real_stream_is_read(path: Path) -> None:
    body = path.read_bytes().partition(b"\n\n" if b"\r\n\r\n" not in path.read_bytes() else b"\r\n\r\n")[2]
    frames = [frame + b"\n\n" for frame in body.split(b"\n\n") if frame.strip()]
    reply = read_reply([(float(at), frame) for at, frame in enumerate(frames)])
    assert reply.error is None
    assert reply.tokens == TOKENS
    assert reply.finish_reason == "length"
    assert len(reply.chunk_times) == TOKENS
    assert reply.chunks_are_tokens
    assert reply.text.strip()
    is_chat = path.stem.endswith("chat")
    assert reply.chunk_times[0] == (1.0 if is_chat else 0.0)  # the role alone is no token


def test_there_are_streams_of_three_servers() -> None:
    assert len(list(STREAMS.glob("*.txt"))) == 6
