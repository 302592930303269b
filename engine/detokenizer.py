"""Tokens to text as they come: whole characters only, and nothing that might be part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from engine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 6  # tokens at least, and up to twice as many
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Incremental detokenisation of one request, with stop strings.

    A token may carry a part of a character, and a tokenizer may join or strip at borders, so each piece is
    the difference between two decodings that share a few tokens of context (the method of Hugging Face's
    text-generation-inference). Text that ends in an unfinished character, or in what could become a stop
    string, is held back until it is decided.

    What counts is the token that completes a stop string: one that was complete before stops were looked for
    is text like any other, and one that began before and is completed after ends the text where it begins.
    Its beginning was held back, so nothing that was given out is ever taken back.

    Args:
        tokenizer: any Transformers tokenizer.
        stop: strings that end the text; neither they nor what follows is ever given out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()) -> None:
        self._decode = partial(decode, tokenizer)
        self._stop = stop
        self._ids: list[int] = []
        self._start = 0  # first token of the context
        self._known = ""  # text of the context
        self._held = ""  # in it no stop string counts any more: whatever is complete came too early
        self._looks = True
        self._given: list[str] = []
        self.stopped: str | None = None

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._given)

    def push(self, token_id: int, look: bool = True) -> str:
        """Add a token and return the text that is certain now; set `stopped` if it completes a stop string.

        `look=False` passes over a stop string that this token completes.
        """
        self._ids.append(token_id)
        self._looks = look
        return self._give(self._decoded(final=False), final=False)

    def flush(self) -> str:
        """Return the rest, when no more tokens come; stop strings count if they did for the last token."""
        return self._give(self._decoded(final=True), final=True)

    def _decoded(self, final: bool) -> str:
        """Return the text of the tokens since the last call; nothing while it ends inside a character."""
        text = self._decode(self._ids[self._start :])
        if not final and (len(text) <= len(self._known) or text.endswith(UNFINISHED)):
            return ""
        piece, self._known = text[len(self._known) :], text
        if len(self._ids) - self._start > 2 * CONTEXT:
            self._begin(len(self._ids) - CONTEXT)
        # A context that begins inside a character decodes it differently with its first byte and without.
        while self._start and self._known.startswith(UNFINISHED):
            self._begin(self._start - 1)
        return piece

    def _begin(self, start: int) -> None:
        """Let the context be the tokens from this one on."""
        self._start, self._known = start, self._decode(self._ids[start:])

    def _give(self, piece: str, final: bool) -> str:
        if self.stopped is not None:
            return ""
        known, text = len(self._held), self._held + piece
        stops = self._stop if self._looks else ()
        hits = [(at, stop) for stop in stops if (at := text.find(stop, max(0, known + 1 - len(stop)))) >= 0]
        if hits:
            at, self.stopped = min(hits)
            text, self._held = text[:at], ""
        else:
            keep = 0 if final else _unfinished(text, self._stop)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self._given.append(text)
        return text


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text of these tokens, without special ones."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> dict[int, str]:
    """Return the stop strings that are one special token, by its id: text does not show such a token.

    Raises:
        InputError: for a string that has a special token in it and more: no text is ever like that.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token): number for number, token in added.items() if token.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    found = {}
    for string in stop:
        inside = {text: token for text, token in special.items() if text and text in string}
        hidden = {text: token for text, token in inside.items() if not decode(tokenizer, [token])}
        if string in hidden:
            found[hidden[string]] = string
        elif hidden:
            longest = max(hidden, key=len)
            problem = f"has the special token {longest!r} in it, which text does not show"
            way_out = "give that token alone, or its id in stop_token_ids"
            raise InputError(f"stop={string!r} {problem}: {way_out}")
    return found


def _unfinished(text: str, stop: tuple[str, ...]) -> int:
    """Return the length of the longest end of `text` that begins a stop string, and is not all of it."""
    longest = min(len(text), max(map(len, stop), default=1) - 1)
    ends = (n for n in range(longest, 0, -1) if any(len(s) > n and s.startswith(text[-n:]) for s in stop))
    return next(ends, 0)
