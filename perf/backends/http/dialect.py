"""What a server understands, tried once before anything is timed: its API, its fields, what it tells.

A field that a server refuses is left out, and said; nothing is dropped silently. What was agreed on is part
of what makes two runs comparable.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from perf.backends.http.connection import Connection, Exchange
from perf.backends.http.reply import read_reply
from perf.servers.ready import TargetError
from perf.servers.target import KEY, Api

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]  # text, token ids, or chat messages
PATHS: dict[Api, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
LIMITS: dict[Api, tuple[str, ...]] = {
    "chat": ("max_completion_tokens", "max_tokens"),
    "completions": ("max_tokens",),
}
# What is asked for beside the prompt and the number of tokens; which of it is refused is found out.
WISHES: dict[str, Any] = {
    "stream_options": {"include_usage": True},
    "temperature": 0,
    "seed": 0,
    "ignore_eos": True,
    "return_token_ids": True,
    "return_tokens": True,
}
# What is asked for instead of one that is refused: `transformers serve` takes its generation config as text.
INSTEAD = {"ignore_eos": "generation_config"}
SECOND_BEST = {"generation_config": json.dumps({"eos_token_id": -1, "do_sample": False})}
REFUSED = frozenset({400, 422})
BUSY = frozenset({429, 503})
TRIES, PAUSE_S = 20, 0.5  # of a server that is busy
TRIAL_TOKENS = 4
VERSIONS = (  # where servers tell theirs, and by what key
    ("/version", "version", "vLLM"),
    ("/server_info", "version", "SGLang"),
    ("/props", "build_info", "llama.cpp"),
)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server is asked.

    ids: whether prompts are token ids. limit: the field that bounds the output. fields: the wishes that it
    accepts; refused: those that it does not. tells_ids, tells_usage: what its replies have.
    """

    api: Api
    model: str
    ids: bool
    limit: str
    fields: tuple[str, ...] = tuple(WISHES)
    refused: tuple[str, ...] = ()
    tells_ids: bool = False
    tells_usage: bool = False

    @property
    def path(self) -> str:
        return PATHS[self.api]

    def body(self, prompt: Prompt, tokens: int) -> bytes:
        """Return the JSON of a streamed, greedy request for so many tokens."""
        asked = {"messages" if self.api == "chat" else "prompt": prompt}
        wishes = {name: (WISHES | SECOND_BEST)[name] for name in self.fields}
        what = {"model": self.model, **asked, self.limit: tokens, "stream": True, **wishes}
        return json.dumps(what).encode()

    def plain(self) -> dict[str, str]:
        """Return it as the fingerprint has it: where two differ, their runs are not comparable."""
        return {
            "api": f"{self.api}, {'token ids' if self.ids else 'text'}",
            "refused_fields": ", ".join(self.refused) or "none",
            "fields": ", ".join(self.fields),
            "tells": " and ".join(
                name for name, told in (("token ids", self.tells_ids), ("usage", self.tells_usage)) if told
            ) or "text alone",
        }  # fmt: skip


async def find_model(connection: Connection) -> str:
    """Return the id that the server names first. Raises TargetError if it names none."""
    answer = await connection.get("/v1/models")
    check_key(connection, answer.status)
    found = answer.json.get("data") if isinstance(answer.json, dict) else None
    first = found[0].get("id") if isinstance(found, list) and found and isinstance(found[0], dict) else None
    if answer.status != 200 or not isinstance(first, str):
        raise TargetError(
            f"{connection.target.url} names no model at /v1/models (HTTP {answer.status}): "
            "name it by --served-model"
        )
    return first


async def negotiate(connection: Connection, model: str, prompts: Sequence[tuple[Api, Prompt]]) -> Dialect:
    """Return how the server is asked for the first of these kinds of prompt that it takes.

    Args:
        prompts: one of each kind, the best first.

    Raises:
        TargetError: if it takes none of them, with what it said to each.
    """
    said: dict[str, list[str]] = {}  # the paths that it said it to
    for api, prompt in prompts:
        ids = not isinstance(prompt, str) and not (prompt and isinstance(prompt[0], Mapping))
        for limit in LIMITS[api]:
            found, error = await _agree(connection, Dialect(api, model, ids, limit), prompt)
            if found is not None:
                return found
            said.setdefault(error, []).append(PATHS[api])
            if limit not in error:
                break
    told = "; ".join(f"{' and '.join(dict.fromkeys(paths))}: {error}" for error, paths in said.items())
    way_out = f", asked for the model {model!r} (--served-model names another)"
    raise TargetError(f"{connection.target.url} does not answer as it should: {told}{way_out}")


async def _agree(connection: Connection, dialect: Dialect, prompt: Prompt) -> tuple[Dialect | None, str]:
    """Leave out what the server refuses until it answers; else return what it said.

    Of a server that does not say which field it refuses, the last is left out, then the one before it; once
    it answers, each of them is tried again by itself.
    """
    guessed: list[str] = []
    while True:
        exchange = await _ask(connection, dialect, prompt)
        if exchange.status == 200:
            break
        check_key(connection, exchange.status)
        error = exchange.error or ""
        if exchange.status not in REFUSED or not dialect.fields:
            return None, error
        named = [name for name in dialect.fields if re.search(rf"\b{name}\b", error)]
        if not named:
            named = [dialect.fields[-1]]
            guessed += named
        dialect = _without(dialect, named)
    for name in guessed[:-1]:  # the last one left out is what made it answer
        refused = tuple(other for other in dialect.refused if other != name)
        fuller = replace(dialect, fields=(*dialect.fields, name), refused=refused)
        again = await _ask(connection, fuller, prompt)
        dialect, exchange = (fuller, again) if again.status == 200 else (dialect, exchange)
    reply = read_reply(exchange.parts)
    if reply.error is not None or exchange.error is not None:
        return None, reply.error or exchange.error or ""
    told = reply.token_ids is not None
    return replace(dialect, tells_ids=told, tells_usage=reply.counted_by == "usage"), ""


def _without(dialect: Dialect, names: Sequence[str]) -> Dialect:
    kept = tuple(name for name in dialect.fields if name not in names)
    instead = tuple(INSTEAD[name] for name in names if name in INSTEAD)
    return replace(dialect, fields=(*kept, *instead), refused=(*dialect.refused, *names))


async def _ask(connection: Connection, dialect: Dialect, prompt: Prompt) -> Exchange:
    body = dialect.body(prompt, TRIAL_TOKENS)
    for _ in range(TRIES):
        exchange = await connection.stream(dialect.path, body)
        if exchange.status not in BUSY:
            break
        await asyncio.sleep(PAUSE_S)
    if exchange.status is None:
        raise TargetError(f"{connection.target.url} {exchange.error}")
    return exchange


def check_key(connection: Connection, status: int | None) -> None:
    """Raise TargetError if a status says that the key is wrong, or missing."""
    if status in (401, 403):
        has = "refuses the key" if connection.target.key else "wants a key"
        raise TargetError(f"{connection.target.url} {has} (HTTP {status}): give it in ${KEY}")


async def server_name(connection: Connection) -> str:
    """Return the server's name and version, for a reader; "unknown" where it does not tell them."""
    for path, key, name in VERSIONS:
        answer = await connection.get(path)
        value = answer.json.get(key) if answer.status == 200 and isinstance(answer.json, dict) else None
        if isinstance(value, str | int):
            return f"{name} {value}"
    return "unknown"
