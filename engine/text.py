"""Tokens to text as they come: whole characters only, and nothing that might be part of a stop string."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT = 6


class TextStream:
    """Incremental detokenisation of one request, with stop strings.

    A token may carry a part of a character, and a tokenizer may join or strip at borders, so each piece is the
    difference between two decodings that share a few tokens of context (the method of Hugging Face's
    text-generation-inference). Text that ends in an unfinished character, or in what could become a stop string, is
    held back until it is decided.

    Args:
        tokenizer: any Transformers tokenizer.
        stop: strings that end the text; neither they nor what follows is ever given out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()) -> None:
        self._decode = partial(decode, tokenizer)
        self._stop = stop
        self._ids: list[int] = []
        self._start = 0  # first token of the context
        self._read = 0  # tokens whose text is settled
        self._held = ""
        self._given: list[str] = []
        self.stopped: str | None = None

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._given)

    def push(self, token_id: int, look: bool = True) -> str:
        """Add a token; returns the text that is certain now. Sets `stopped` when a stop string is complete.

        `look=False` gives the text out without looking for stop strings in it.
        """
        self._ids.append(token_id)
        return self._give(self._settle(final=False), final=not look, look=look)

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        return self._give(self._settle(final=True), final=True, look=True)

    def _settle(self, final: bool) -> str:
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if not final and (len(text) <= len(known) or text.endswith("\N{REPLACEMENT CHARACTER}")):
            return ""
        self._read = len(self._ids)
        self._start = max(self._start, self._read - _CONTEXT)
        # A context that begins inside a character would decode it differently with and without its first byte.
        while self._start and self._decode(self._ids[self._start : self._read]).startswith("\N{REPLACEMENT CHARACTER}"):
            self._start -= 1
        return text[len(known) :]

    def _give(self, piece: str, final: bool, look: bool) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + piece
        hits = [(text.index(stop), stop) for stop in self._stop if look and stop in text]
        if hits:
            at, self.stopped = min(hits)
            text, self._held = text[:at], ""
        else:
            keep = 0 if final else _unfinished(text, self._stop)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self._given.append(text)
        return text


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of these tokens, without special ones."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _unfinished(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string."""
    longest = min(len(text), max(map(len, stop), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
