"""Stops that text does not show, stops across `min_new_tokens`, and stops that could never be."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from engine import Engine, EngineConfig, FinishReason, InputError, SamplingParams, sampling
from engine.detokenizer import TextStream, stop_tokens
from engine.models import LoadedModel
from engine.request import RequestOutput, StreamChunk
from engine.step import Choice
from tests.test_detokenizer import byte_level, decoded, letters, many, metaspace, settled_texts, spell, stops

both = pytest.mark.parametrize("config", [
    dict(policy="dynamic", runner="padded"), dict(policy="continuous", runner="packed"),
], ids=["padded", "packed"])  # fmt: skip


@cache
def chatty() -> PreTrainedTokenizerFast:
    """A token a character, special tokens of a chat, and one added token that is none."""
    letters = {letter: number for number, letter in enumerate("?abcdefghijklmnopqrstuvwxyz <>|_.")}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    made.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    made.add_tokens([AddedToken("<tool>", special=False)])
    return made


def ids_of(text: str) -> list[int]:
    return chatty().encode(text)


def spelt(text: str) -> list[int]:
    """One token a character, as a model writes that does not know a special token."""
    return [number for letter in text for number in ids_of(letter)]


Says = Callable[..., Engine]


@pytest.fixture
def says(tiny, monkeypatch) -> Says:
    """`says(ids, **config)` gives an engine whose model likes ids[n] best as output token n, then "z"."""

    def make(ids: Sequence[int], **config) -> Engine:
        loaded = LoadedModel("made", tiny("tiny-llama").model, chatty(), "made")
        engine = Engine(loaded, EngineConfig(**config))
        engine.eos_ids = frozenset({chatty().eos_token_id})

        def sample(logits_RV, requests):
            scripted_RV = torch.zeros_like(logits_RV, dtype=torch.float32)
            scripted_RV[:, ids_of("z")] = 1.0
            for row, request in enumerate(requests):
                if request.output_len < len(ids):
                    scripted_RV[row, ids[request.output_len]] = 9.0
            return sampling.sample(scripted_RV, requests)

        monkeypatch.setattr("engine.backends.sample", sample)
        monkeypatch.setattr("engine.runner.padded.sample", sample)
        return engine

    return make


def outputs(engine: Engine, **params) -> tuple[RequestOutput, list[StreamChunk]]:
    """One request's output, which is the same with and without a stream, and the chunks of the stream."""
    asked = SamplingParams(**{"max_new_tokens": 12, **params})
    (whole,) = engine.generate([[5, 6]], asked, progress=False)
    chunks = list(engine.stream([5, 6], asked))
    output = chunks[-1].output
    assert output is not None
    one, other = ((o.text, o.token_ids, o.finish_reason, o.stop_reason) for o in (whole, output))
    assert one == other
    assert "".join(chunk.text for chunk in chunks) == output.text
    return output, chunks


@both
@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("stop", ["<|im_end|>", "<eos>"])
def test_a_stop_that_is_a_special_token_ends_at_the_token(says, config, stop, ignore_eos):
    engine = says(ids_of(f"ab{stop}cd"), **config)
    output, _ = outputs(engine, stop=("never", stop), ignore_eos=ignore_eos)
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab", FinishReason.STOP, stop)
    assert len(output.token_ids) == 3


@both
def test_it_ends_where_its_characters_are_spelt_out_too(says, config):
    output, _ = outputs(says(spelt("ab<|im_end|>cd"), **config), stop="<|im_end|>", max_new_tokens=20)
    assert (output.text, output.stop_reason) == ("ab", "<|im_end|>")


@both
def test_text_held_before_a_stop_token_comes_with_it(says, config):
    output, _ = outputs(says(ids_of("ab<|im_end|>"), **config), stop=("abc", "<|im_end|>"))
    assert (output.text, output.stop_reason) == ("ab", "<|im_end|>")


@both
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_special_token_is_not_drawn_before_min_new_tokens(says, config, temperature):
    engine = says(ids_of("a<|im_end|>b<|im_end|>"), **config)
    output, _ = outputs(engine, stop="<|im_end|>", min_new_tokens=3, temperature=temperature, top_k=1)
    assert (output.text, output.stop_reason, len(output.token_ids)) == ("azb", "<|im_end|>", 4)


@both
def test_an_added_token_that_text_shows_is_a_string_like_any_other(says, config):
    output, _ = outputs(says(ids_of("a<tool>b"), **config), stop="ool>b")
    assert (output.text, output.stop_reason) == ("a<t", "ool>b")


@pytest.mark.parametrize("stop", ["<|im_end|>\n", "x<eos>", "<|im_start|><|im_end|>", " <|im_end|>"])
def test_a_stop_with_a_special_token_in_it_is_refused(says, stop):
    engine = says([])
    special = re.escape(repr(next(s for s in ("<|im_start|>", "<|im_end|>", "<eos>") if s in stop)))
    message = rf"^stop={re.escape(repr(stop))} has the special token {special} in it"
    with pytest.raises(InputError, match=message) as e:
        engine.add_request([5], SamplingParams(stop=("fine", stop)))
    assert "\n" not in str(e.value)
    assert not engine.has_work


def test_special_tokens_are_found_in_any_kind_of_tokenizer():
    for tokenizer in (byte_level(400), metaspace(), chatty()):
        assert stop_tokens(tokenizer, ["<eos>", "eos", "<eo"]) == {tokenizer.eos_token_id: "<eos>"}
        with pytest.raises(InputError, match=r"^stop='<eos>!' "):
            stop_tokens(tokenizer, ["<eos>!"])
    assert stop_tokens(chatty(), ["<tool>", "<tool>x"]) == {}


@pytest.mark.parametrize("stop", ["\ud83d", "a\ude42b"])
def test_a_stop_that_is_no_text_is_refused(stop):
    with pytest.raises(InputError, match=r"^stop=.* half of a surrogate pair"):
        SamplingParams(stop=stop)


@both
@pytest.mark.parametrize(
    ("text", "stop", "least", "shown", "reason"),
    [
        ("abcdef", "cd", 0, "ab", "cd"),
        ("abcdef", "cd", 3, "ab", "cd"),  # begun with token 3, completed with token 4
        ("abcdef", "cd", 4, "ab", "cd"),  # completed by token number 4 itself
        ("abcdef", "cd", 5, "abcdefzzzzzz", None),  # complete before
        ("abcdef", "abcd", 4, "", "abcd"),
        ("abcdef", "bcde", 5, "a", "bcde"),
        ("abcdef", "bcde", 6, "abcdefzzzzzz", None),
        ("aaaaaa", "aa", 3, "a", "aa"),  # that of tokens 1 and 2 came too early, that of 2 and 3 did not
        ("cdxcdx", "cd", 3, "cdx", "cd"),
        ("abcabd", "abd", 5, "abc", "abd"),
        ("aabaab", "aab", 4, "aab", "aab"),
    ],
)
def test_a_stop_string_counts_by_the_token_that_completes_it(says, config, text, stop, least, shown, reason):
    output, _ = outputs(says(ids_of(text), **config), stop=stop, min_new_tokens=least)
    assert (output.text, output.stop_reason) == (shown, reason)
    assert output.finish_reason == (FinishReason.STOP if reason else FinishReason.LENGTH)
    if reason:
        assert len(output.token_ids) == len(shown) + len(stop)


@both
def test_the_beginning_of_a_stop_is_held_before_the_minimum_and_no_other_text(says, config):
    _, chunks = outputs(says(ids_of("abcdef"), **config), stop="cde", min_new_tokens=5)
    assert [chunk.text for chunk in chunks] == ["a", "b", "", "", ""]
    _, chunks = outputs(says(ids_of("abcxef"), **config), stop="cde", min_new_tokens=5, max_new_tokens=6)
    assert [chunk.text for chunk in chunks] == ["a", "b", "", "cx", "e", "f"]
    _, chunks = outputs(says(ids_of("abcdef"), **config), stop="cde", min_new_tokens=6, max_new_tokens=6)
    assert [chunk.text for chunk in chunks] == ["a", "b", "", "", "cde", "f"], "complete too early"


@both
def test_an_abort_before_the_minimum_gives_what_was_held(says, config):
    engine = says(ids_of("abcdef"), **config)
    request = engine.add_request([5], SamplingParams(12, min_new_tokens=8, stop="cd"))
    for _ in range(3):
        engine.step()
    output = engine.abort(request.id)
    assert (output.text, output.finish_reason) == ("abc"[: len(output.token_ids)], FinishReason.ABORT)


def test_a_stop_that_only_the_last_token_settles_is_a_stop(says, monkeypatch):
    """The last character is unfinished, and shown as broken; a stop string that is in it ends the request."""
    engine = says([])
    tokenizer = byte_level(257)
    a, first = tokenizer.encode("a")[0], tokenizer.encode("日")[0] % 256
    engine.tokenizer = tokenizer
    monkeypatch.setattr("engine.backends.sample", lambda logits, requests: [
        Choice(first if request.output_len else a) for request in requests
    ])  # fmt: skip
    (output,) = engine.generate([[5]], SamplingParams(2, stop="\ufffd"), progress=False)
    assert (output.text, output.finish_reason, output.stop_reason) == ("a", FinishReason.STOP, "\ufffd")


def reference(tokenizer, ids: Sequence[int], stop: Sequence[str], least: int) -> tuple[str, str | None]:
    """Text up to the first match that ends in what token number `least`, or a later one, made certain."""
    texts = ["", *settled_texts(tokenizer, ids)]
    for count in range(1, len(texts)):
        before, text = texts[count - 1 : count + 1]
        starts = [(at, s) for s in stop for at in range(len(text)) if text.startswith(s, at)]
        hits = [(at, s) for at, s in starts if at + len(s) > len(before)]
        if min(count, len(ids)) >= least and hits:
            return text[: min(hits)[0]], min(hits)[1]
    return texts[-1], None


@many
@given(letters, stops, st.integers(0, 12))
def test_any_text_any_stops_any_minimum(ids, stop, least):
    tokenizer = byte_level(400)
    stream, pieces = TextStream(tokenizer, stop), []
    for count, number in enumerate(ids, 1):
        pieces.append(stream.push(number, look=count >= least))
        assert stream.text == "".join(pieces)
        assert decoded(tokenizer, ids[:count]).startswith(stream.text), "nothing is ever taken back"
        if stream.stopped is not None:
            break
    pieces.append(stream.flush())
    text, stopped = reference(tokenizer, ids, stop, least)
    assert (stream.text, stream.stopped) == ("".join(pieces), stopped)
    assert stream.text == text


def test_unlooked_text_is_held_only_where_a_stop_may_begin():
    stream = TextStream(byte_level(400), ("abc", "c"))
    assert [stream.push(number, look=False) for number in spell("xabca")] == ["x", "", "", "abc", ""]
    assert stream.flush() == "a"
    assert stream.stopped is None
