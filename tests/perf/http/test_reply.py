"""What a stream of chunks says, with the shapes that servers send."""

from __future__ import annotations

import json
from typing import Any

import pytest

from perf.backends.http.reply import LONGEST, error_text, read_reply, shorten


def stream(*chunks: object) -> list[tuple[float, bytes]]:
    """Each chunk as an event, the first at 1 s, and one a second."""
    texts = (chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in chunks)
    return [(float(number), f"data: {text}\n\n".encode()) for number, text in enumerate(texts, 1)]


def chat(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def text(words: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": words, "finish_reason": finish, **more}]}


USAGE = {"usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}}


def test_the_first_token_is_not_the_role_and_the_end_is_not_done() -> None:
    reply = read_reply(
        stream(
            chat(role="assistant", content=""), chat(content="a"), chat(content="b"), chat("length"),
            {"choices": [], **USAGE}, "[DONE]",
        )
    )  # fmt: skip
    assert reply.chunk_times == (2.0, 3.0)
    assert (reply.text, reply.tokens, reply.counted_by, reply.finish_reason) == ("ab", 2, "usage", "length")
    assert (reply.prompt_tokens, reply.cached_tokens, reply.error) == (9, 4, None)
    assert reply.chunks_are_tokens


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"tool_calls": [{"function": {"name": "f"}}]},
        {"content": "a"},
    ],
)
def test_reasoning_and_tool_calls_are_tokens(delta: dict[str, Any]) -> None:
    reply = read_reply(stream(chat(role="assistant"), chat(**delta), chat("stop"), "[DONE]"))
    assert reply.chunk_times == (2.0,)


def test_token_ids_are_tokens_without_any_text() -> None:
    chunks = [text("", token_ids=[5]), text("b", token_ids=[6, 7]), text("", "length"), "[DONE]"]
    reply = read_reply(stream(*chunks))
    assert reply.token_ids == (5, 6, 7)
    assert (reply.chunk_times, reply.tokens, reply.counted_by) == ((1.0, 2.0), 3, "ids")
    assert not reply.chunks_are_tokens


def test_ids_of_some_chunks_alone_are_none() -> None:
    reply = read_reply(stream(text("a", token_ids=[5]), text("b"), text("", "length"), "[DONE]"))
    assert reply.token_ids is None
    assert (reply.tokens, reply.counted_by) == (2, "chunks")


def test_usage_in_the_chunk_that_finishes() -> None:
    reply = read_reply(stream(text("a"), {**text("b", "length"), **USAGE}, "[DONE]"))
    assert (reply.tokens, reply.counted_by) == (2, "usage")


def test_a_tokenizer_counts_where_the_server_does_not() -> None:
    reply = read_reply(stream(text("a b"), text(" c", "length"), "[DONE]"), str.split)  # type: ignore[arg-type]
    assert (reply.tokens, reply.counted_by) == (3, "tokenizer")


def test_an_unseen_end_of_sequence_is_counted_and_has_no_chunk() -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 3}}
    assert read_reply(stream(text("a"), text("b"), text("", "stop"), usage)).chunks_are_tokens
    assert not read_reply(stream(text("a"), text("b"), text("", "length"), usage)).chunks_are_tokens


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ([text("a"), {"error": {"message": "worker died", "code": 500}}, "[DONE]"], "worker died"),
        ([text("a"), {"object": "error", "message": "old shape"}], "old shape"),
        ([text("a"), text("b")], "after 2 chunks without a finish_reason or [DONE]"),
        ([], "after 0 chunks"),
        ([text("", "length"), "[DONE]"], "no text and no tokens"),
        ([text("a"), "{oops"], "no JSON: {oops"),
        ([text("a"), "[1, 2]"], "reported in its stream: [1, 2]"),
    ],
)
def test_what_is_no_answer_says_why(chunks: list[object], said: str) -> None:
    assert said in str(read_reply(stream(*chunks)).error)


def test_an_error_line_of_its_own_kind() -> None:
    parts = [(1.0, b'data: {"choices": [{"text": "a"}]}\n\nerror: {"message": "slot lost"}\n\n')]
    assert "slot lost" in str(read_reply(parts).error)


@pytest.mark.parametrize("end", [[text("b", "length")], [text("b"), "[DONE]"]])
def test_either_a_reason_or_done_ends_a_stream(end: list[object]) -> None:
    assert read_reply(stream(text("a"), *end)).error is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "m", "type": "t"}}, "m"),
        ({"error": "m"}, "m"),
        ({"detail": "m"}, "m"),
        ({"object": "error", "message": "m"}, "m"),
        ({"detail": [{"loc": ["body"], "msg": "m"}]}, '[{"loc": ["body"], "msg": "m"}]'),
        ({"x": 1}, '{"x": 1}'),
        ("two\nlines", "two lines"),
    ],
)
def test_an_error_of_any_shape_is_one_line(body: object, said: str) -> None:
    assert error_text(body) == said


def test_a_long_error_is_cut() -> None:
    assert len(shorten("x" * 1000)) == LONGEST
