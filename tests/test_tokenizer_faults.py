"""Texts that a tokenizer can't encode, and tokens of its own that the model lacks, are told to the caller."""

from __future__ import annotations

import dataclasses

import pytest

from engine import Engine
from tests.test_detokenizer import byte_level
from tests.test_input import refused


class Picky:
    """A tokenizer that can't take some texts."""

    chat_template = "any"

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, text: str):
        raise self.error

    def apply_chat_template(self, *args, **options):
        raise self.error


class Panic(BaseException):
    """As pyo3 raises where Rust code panics: no Exception."""


@pytest.mark.parametrize("error", [ValueError("no\nsuch"), IndexError(5), Panic("unwrapped")], ids=repr)
def test_a_text_that_the_tokenizer_cannot_take_is_the_callers_fault(tiny, error):
    engine = Engine(dataclasses.replace(tiny().loaded, tokenizer=Picky(error)))
    told = f"is text that the tokenizer .* can't encode: {type(error).__name__}"
    refused(engine, lambda: engine.add_request("some text"), f"^prompt {told}")
    refused(engine, lambda: engine.chat("some text"), f"^message {told}")


def test_a_tokenizer_is_interrupted_like_anything_else(tiny):
    engine = Engine(dataclasses.replace(tiny().loaded, tokenizer=Picky(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        engine.add_request("some text")


def test_a_token_of_the_tokenizers_own_that_the_model_lacks(tiny):
    tokenizer = byte_level(300)  # of 300 tokens, and the model has 256
    engine = Engine(dataclasses.replace(tiny().loaded, tokenizer=tokenizer))
    text = next(t for t in ("the end", "quick brown", "lazy dog") if max(tokenizer(t).input_ids) >= 256)
    refused(
        engine,
        lambda: engine.add_request(text),
        r"^prompt has .*, token \d+ of the tokenizer; the ids of .* are 0 to 255: resize",
    )
