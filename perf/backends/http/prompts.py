"""A workload's prompts in the form that a server takes: token ids, text, or chat messages.

Each round begins every prompt in a way of its own, the same in any process, so that no round finds what an
earlier one left in the server's prefix cache; what prompts of one round share, they still share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine import InputError, WorkItem
from perf.backends.http.dialect import Dialect, Prompt
from perf.backends.http.reply import Reply
from perf.servers.target import Api

FRESH = 8  # token ids at the beginning that a round draws anew
SHORT = 16  # token ids or characters of the prompt by which a server is tried
Messages = tuple[Mapping[str, str], ...]


class Prompts:
    """Prompts of a workload.

    tokenizer: of the model that is served, as Transformers has it; None if it is not known here.
    """

    def __init__(self, items: Sequence[WorkItem], tokenizer: Any = None, seed: int = 0) -> None:
        self.items, self.tokenizer, self.seed = items, tokenizer, seed
        self.has_ids = not any(isinstance(item.prompt, str) for item in items)
        self.has_text = tokenizer is not None or all(_source(item) is not None for item in items)
        self.is_chat = any(isinstance(_source(item), tuple) for item in items)
        self._pool: list[int] = (
            sorted({int(token) for item in items for token in item.prompt}) if self.has_ids else []
        )

    def kinds(self, api: Api | None) -> list[tuple[Api, Prompt]]:
        """Return a short prompt of every kind that these can be sent as, the best first: as chat if they are
        chats, as token ids if they are those."""
        found: list[tuple[Api, Prompt]] = []
        for of, ids in (("chat", False), ("completions", True), ("completions", False)):
            possible = self.has_ids if ids else self.has_text
            if possible and api in (None, of):
                dialect = Dialect(of, "", ids, "")  # type: ignore[arg-type]
                found.append((dialect.api, self.trial(dialect)))
        if not found:
            raise InputError(
                "the workload is of token ids and the server takes text: give the model that is served by "
                "--model, so that its tokenizer is known"
            )
        if not self.is_chat and found[0][0] == "chat":
            found.append(found.pop(0))
        return found

    def trial(self, dialect: Dialect) -> Prompt:
        """Return a short prompt of the kind that a server is asked in."""
        first = self.items[0]
        if dialect.ids:
            return [int(token) for token in first.prompt[:SHORT]]
        text = self.text(first)[:SHORT] or "Hello"
        return [{"role": "user", "content": text}] if dialect.api == "chat" else text

    def text(self, item: WorkItem) -> str:
        """Return an item's own text; of messages, their contents in a row."""
        if isinstance(item.prompt, str):
            return item.prompt
        source = _source(item)
        if isinstance(source, str):
            return source
        if source is not None:
            return "\n".join(message["content"] for message in source)
        return str(self.tokenizer.decode(list(item.prompt)))

    def messages(self, item: WorkItem) -> list[dict[str, str]]:
        """Return an item's own messages; a text is the user's."""
        source = _source(item)
        if isinstance(source, tuple):
            return [dict(message) for message in source]
        return [{"role": "user", "content": self.text(item)}]

    def drawn(self, number: int) -> tuple[list[int], str]:
        """Return what a round begins its prompts with: token ids that occur in them, and a word."""
        draw = np.random.default_rng([self.seed, number])
        word = f"[{draw.integers(1 << 32):08x}] "
        return (draw.choice(self._pool, FRESH).tolist() if self._pool else []), word


class RoundPrompts:
    """Prompts of one round, as a server is asked."""

    def __init__(self, prompts: Prompts, dialect: Dialect, number: int) -> None:
        self._prompts, self.dialect = prompts, dialect
        self._ids, self._word = prompts.drawn(number)

    @property
    def items(self) -> Sequence[WorkItem]:
        return self._prompts.items

    def body(self, index: int, replies: Sequence[Reply | None]) -> bytes:
        """Return a request's JSON; `replies` has those of all that have ended."""
        return self.dialect.body(
            self.whole(index, replies), self.items[index].params.resolved().max_new_tokens
        )

    def whole(self, index: int, replies: Sequence[Reply | None]) -> Prompt:
        """Return a request's prompt; of one that follows another, with all that was said before."""
        if self.dialect.ids:
            return self.token_ids(index, replies)
        item = self.items[index]
        if item.follows is None:
            return self._begun(item)
        before, reply = self.whole(item.follows, replies), replies[item.follows]
        assert reply is not None  # it has ended
        if self.dialect.api == "chat":
            answer = {"role": "assistant", "content": reply.text}
            return [*before, answer, *self._prompts.messages(item)]
        return f"{before}{reply.text}{self._prompts.text(item)}"

    def token_ids(self, index: int, replies: Sequence[Reply | None]) -> list[int]:
        """Return a request's whole prompt as token ids, where the server is asked in them."""
        item = self.items[index]
        own = [int(token) for token in item.prompt]
        if item.follows is None:
            fresh = min(FRESH, len(own) // 2)
            return [*self._ids[:fresh], *own[fresh:]]
        reply = replies[item.follows]
        assert reply is not None  # it has ended
        if reply.token_ids is None:
            raise InputError(
                "the server tells no token ids, so a conversation of token ids cannot go on: give --api chat"
            )
        return [*self.token_ids(item.follows, replies), *reply.token_ids, *own]

    def _begun(self, item: WorkItem) -> Prompt:
        if self.dialect.api == "completions":
            return self._word + self._prompts.text(item)
        first, *others = self._prompts.messages(item)
        return [{**first, "content": self._word + first["content"]}, *others]


def _source(item: WorkItem) -> str | Messages | None:
    """Return the text or the messages that a prompt was made from; None if it is token ids by itself."""
    return item.source if item.source is not None else item.prompt if isinstance(item.prompt, str) else None
