"""From what a workload asks to prompts: token ids of a model, or text where no model is known.

Text and messages go through the tokenizer and its chat template; what is random is drawn here, from ids or
from common words.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from engine.bench.workload_files import BLOCK, Messages, Row
from engine.bench.workload_texts import WORDS
from engine.errors import InputError
from engine.input_processor import InputProcessor

OPTIONS = {"add_generation_prompt": True, "date_string": "1 Jan 2025"}  # not today
ANSWER = "@@ANSWER@@"  # stands for an answer where a conversation is rendered
EARLIER: Messages = ({"role": "assistant", "content": "..."},)  # an answer before that one
BLOCKS = 3  # the stream of seeds that blocks are drawn from; make_workload has those before
Source = str | Messages | None


class Prompts(ABC):
    """Makes the prompts of one workload: of `seed`, from `symbols` where they are random.

    `speaks` says whether text can be asked.
    """

    speaks: bool

    def __init__(self, symbols: Sequence[Any] | np.ndarray, seed: int) -> None:
        self._symbols, self._seed = np.asarray(symbols), seed
        self._blocks: dict[int, list[Any]] = {}

    def draw(self, rng: np.random.Generator, count: int) -> list[Any]:
        """Return so many random ids or words."""
        found: list[Any] = rng.choice(self._symbols, count).tolist()
        return found

    @abstractmethod
    def joined(self, symbols: Sequence[Any]) -> tuple[str | tuple[int, ...], Source]:
        """Return ids or words that were drawn as a prompt, and its source."""

    @abstractmethod
    def tokens_of(self, place: str, answer: str) -> int:
        """Return how many tokens a recorded answer has, at least one."""

    def asked(self, row: Row, history: Messages) -> tuple[str | tuple[int, ...], Source]:
        """Return a row's prompt, of a follow-up only what is new, and its source; `history` is all messages
        before, their answers left out but for a mark between them."""
        if row.kind == "hash_ids":
            blocks = [self._block(number) for number in row.asked]
            return self.joined(list(chain.from_iterable(blocks))[: row.length])
        if row.kind == "token_ids":
            return self.given(row), None
        if row.kind == "prompt":
            return self.text(row), row.asked
        return self.messages(row, history)

    @abstractmethod
    def given(self, row: Row) -> tuple[int, ...]:
        """Return the token ids that a row gives."""

    @abstractmethod
    def text(self, row: Row) -> str | tuple[int, ...]:
        """Return the prompt of a row that gives text, as it is, without a chat template."""

    @abstractmethod
    def messages(self, row: Row, history: Messages) -> tuple[str | tuple[int, ...], Source]:
        """Return the prompt of a row that gives messages, and its source."""

    def _block(self, number: int) -> list[Any]:
        if number not in self._blocks:
            rng = np.random.default_rng([self._seed, BLOCKS, number])
            self._blocks[number] = self.draw(rng, BLOCK)
        return self._blocks[number]


class TextPrompts(Prompts):
    """Prompts for a server whose tokens are not known: text, with the messages it is from.

    Args:
        tokenizer: counts the tokens of recorded answers; None, if there are none.
    """

    speaks = True

    def __init__(self, tokenizer: Any, seed: int) -> None:
        super().__init__(WORDS, seed)
        self._tokenizer = tokenizer

    def joined(self, symbols: Sequence[Any]) -> tuple[str, Source]:
        """Return words as text."""
        text = " ".join(symbols)
        return text, text

    def tokens_of(self, place: str, answer: str) -> int:
        """Return an answer's tokens; raise InputError if nothing can count them."""
        if self._tokenizer is None:
            raise InputError(f"{place}: a recorded answer says how many tokens to ask for: give a tokenizer")
        any_id = 1 << 30
        return _counted(InputProcessor("it", self._tokenizer, any_id, any_id, any_id), place, answer)

    def given(self, row: Row) -> tuple[int, ...]:
        """Return the ids as they are: some servers take them."""
        ids: tuple[int, ...] = row.asked
        return ids

    def text(self, row: Row) -> str:
        """Return the text."""
        return str(row.asked)

    def messages(self, row: Row, history: Messages) -> tuple[str, Source]:
        """Return the messages' text, and the messages."""
        return plain_text(row), row.asked


class TokenPrompts(Prompts):
    """Prompts for a model, as token ids.

    Args:
        vocab_size: ids are below it.
        tokenizer: a Transformers tokenizer, or None. Its special tokens are not drawn.
        max_positions: of a request.
    """

    def __init__(self, vocab_size: int, tokenizer: Any, seed: int, max_positions: int) -> None:
        special = getattr(tokenizer, "all_special_ids", [])
        ids = np.setdiff1d(np.arange(min(10, vocab_size // 2), vocab_size), special)
        if not len(ids):
            raise InputError(f"vocab_size={vocab_size} leaves nothing but the tokenizer's special tokens")
        super().__init__(ids, seed)
        self._input = InputProcessor("the model", tokenizer, vocab_size, vocab_size, max_positions)
        self._tokenizer = tokenizer
        self.speaks = tokenizer is not None

    def joined(self, symbols: Sequence[Any]) -> tuple[tuple[int, ...], Source]:
        """Return the ids; they were made from no text."""
        return tuple(symbols), None

    def tokens_of(self, place: str, answer: str) -> int:
        """Return an answer's tokens; raise InputError if there is no tokenizer."""
        return _counted(self._input, place, answer)

    def given(self, row: Row) -> tuple[int, ...]:
        """Return the ids; raise InputError for those that the model has not."""
        return tuple(self._input.encode(row.asked, f"{row.place}: token_ids"))

    def text(self, row: Row) -> tuple[int, ...]:
        """Return the text's ids; of a follow-up without those of special tokens that begin a text."""
        return self._encoded(row, row.asked)

    def messages(self, row: Row, history: Messages) -> tuple[tuple[int, ...], Source]:
        """Return the messages' ids by the chat template, or as plain text if there is none.

        Of a follow-up, these are the template's tokens from the end of the answer on, so that it is closed as
        the template closes it: the conversation is rendered with a mark for the answer.
        """
        asked, name = row.asked, f"{row.place}: messages"
        if not getattr(self._tokenizer, "chat_template", None):
            text = plain_text(row)
            return self._encoded(row, text), text
        ids = tuple(self._input.tokens(name, lambda: self._rendered(row, history)))
        if not ids:
            raise InputError(f"{name} are nothing in the chat template: give at least one token")
        return ids, asked

    def _rendered(self, row: Row, history: Messages) -> Sequence[int]:
        """Return the ids of a row's messages by the chat template."""
        render = self._tokenizer.apply_chat_template
        ids: Sequence[int]
        if row.follows is None:
            ids = render(list(row.asked), return_dict=False, **OPTIONS)
            return ids
        answer = {"role": "assistant", "content": ANSWER}
        text = render([*history, answer, *row.asked], tokenize=False, **OPTIONS)
        if text.count(ANSWER) != 1:
            problem = "the chat template does not show the answer before them as it is"
            raise InputError(f"{row.place}: messages can't follow: {problem}")
        ids = self._tokenizer(text.partition(ANSWER)[2], add_special_tokens=False).input_ids
        return ids

    def _encoded(self, row: Row, text: str) -> tuple[int, ...]:
        return tuple(self._input.encode(text, f"{row.place}: {row.kind}", continues=row.follows is not None))


def plain_text(row: Row) -> str:
    """Return a row's messages as text where there is no chat template, a blank line before each but the
    first of a conversation."""
    said = [message["content"] for message in row.asked]
    return "\n\n".join(said if row.follows is None else ["", *said])


def history_of(row: Row, before: Messages) -> Messages:
    """Return the messages up to a row's own; `before` is that of the row it follows, or nothing."""
    if row.kind != "messages":
        return ()
    return (*before, *EARLIER, *row.asked) if row.follows is not None else tuple(row.asked)


def _counted(processor: InputProcessor, place: str, answer: str) -> int:
    return len(processor.encode(answer, f"{place}: its answer", continues=True))
