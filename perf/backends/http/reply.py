"""One answer of a server, read from the bytes of its stream after the request has ended.

What counts as what (the sources are named in perf/README.md, "Any server"): the first token is the first
chunk with text, reasoning, a tool call or token ids, never one with a role or usage alone; the end is the
last of those chunks, not `[DONE]`; the number of output tokens is the server's own (`usage`), else the number
of ids that it gave, else a tokenizer's count of the text, else the number of chunks, and said which.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perf.backends.http.events import ERROR, events

DONE = "[DONE]"
LONGEST = 300  # characters of a server's error that are shown
TEXTS = ("content", "reasoning_content", "reasoning")  # of a chat delta
Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; times are `time.perf_counter` seconds.

    chunk_times: of each chunk with content. token_ids: None if the server gave none, or not of every chunk.
    tokens: how many there are. counted_by: "usage", "ids", "tokenizer" or "chunks". finish_reason: None if
    it never came. cached_tokens, prompt_tokens: as the server says; None if it does not. error: why the
    request failed; None if it did not.
    """

    chunk_times: tuple[float, ...] = ()
    token_ids: tuple[int, ...] | None = None
    text: str = ""
    tokens: int = 0
    counted_by: str = "usage"
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    system_fingerprint: str | None = None
    error: str | None = None

    @property
    def chunks_are_tokens(self) -> bool:
        """Return whether each chunk is one token, so that the gaps between them are ITL; an end-of-sequence
        token that was counted may have had no chunk."""
        unseen = 1 if self.finish_reason == "stop" else 0
        return self.tokens - unseen <= len(self.chunk_times) <= self.tokens


def read_reply(parts: Sequence[tuple[float, bytes]], tokenize: Tokenize | None = None) -> Reply:
    """Return the answer in a stream of chat or completion chunks.

    Args:
        parts: what was read of the body, and when.
        tokenize: counts the text's tokens, where the server does not tell.
    """
    times: list[float] = []
    texts: list[str] = []
    ids: list[int] | None = []
    done = False
    finish = name = None
    usage: Mapping[str, Any] = {}
    for at, kind, data in events(parts):
        if data.strip() == DONE:
            done = True
            continue
        try:
            chunk = json.loads(data)
        except ValueError:
            return Reply(tuple(times), error=f"sent what is no JSON: {shorten(data)}")
        if kind == ERROR or not isinstance(chunk, dict) or chunk.get("error") or chunk.get("object") == ERROR:
            return Reply(tuple(times), error=f"reported in its stream: {error_text(chunk)}")
        usage = chunk["usage"] if isinstance(chunk.get("usage"), dict) else usage
        name = chunk.get("system_fingerprint") or name
        for choice in chunk.get("choices") or ():
            finish = choice.get("finish_reason") or finish
            text, given, has_content = _content(choice)
            if has_content:
                times.append(at)
                texts.append(text)
                ids = None if ids is None or given is None else [*ids, *given]
    error = None
    if not done and finish is None:
        error = f"ended its stream after {len(times)} chunks without a finish_reason or [DONE]"
    elif not times:
        error = "gave no text and no tokens"
    ids = ids if times else None
    tokens, counted_by = _count(usage, ids, "".join(texts), len(times), tokenize)
    details = usage.get("prompt_tokens_details")
    return Reply(
        tuple(times), None if ids is None else tuple(ids), "".join(texts), tokens, counted_by, finish,
        _amount(usage.get("prompt_tokens")),
        _amount(details.get("cached_tokens")) if isinstance(details, dict) else None, name, error,
    )  # fmt: skip


def _content(choice: Mapping[str, Any]) -> tuple[str, list[int] | None, bool]:
    """Return a chunk's text, its token ids if it has any, and whether anything of the answer is in it."""
    given = choice.get("token_ids") or choice.get("tokens")
    given = [int(token) for token in given] if isinstance(given, list) and given else None
    delta = choice.get("delta")
    if isinstance(delta, dict):
        text = "".join(delta[key] for key in TEXTS if isinstance(delta.get(key), str))
        return text, given, bool(text or given or delta.get("tool_calls"))
    text = choice.get("text") or ""
    return text, given, bool(text or given)


def _count(
    usage: Mapping[str, Any], ids: Sequence[int] | None, text: str, chunks: int, tokenize: Tokenize | None
) -> tuple[int, str]:
    told = _amount(usage.get("completion_tokens"))
    if told is not None:
        return told, "usage"
    if ids:
        return len(ids), "ids"
    if tokenize is not None:
        return len(tokenize(text)), "tokenizer"
    return chunks, "chunks"


def _amount(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def error_text(body: object) -> str:
    """Return the message in a server's error, whatever its shape: `{"error": {"message": ...}}` and its
    relatives."""
    found = body
    while isinstance(found, dict):
        inner = next((found[key] for key in ("error", "message", "detail") if found.get(key)), None)
        found = json.dumps(found) if inner is None else inner
    return shorten(found if isinstance(found, str) else json.dumps(found))


def shorten(text: str) -> str:
    """Return a text of others on one line, cut to what a message can hold."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."
