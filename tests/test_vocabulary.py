"""Token ids by a model's weights: what its files say of EOS, padding and sizes need not be so."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from engine import Engine, EngineConfig, InputError, LoadedModel, SamplingParams
from engine.models import load
from tests.gguf_writer import tiny

PROMPT = [5, 6, 7, 8]
WAYS = [EngineConfig(policy="continuous"), EngineConfig(policy="sequential"), EngineConfig(runner="packed")]


def loaded(kind: str = "llama", eos: Any = None, **changes: Any) -> LoadedModel:
    model = tiny(kind, **changes)
    model.generation_config.eos_token_id = eos
    return LoadedModel("made", model, None, "made")


def generated(model: Any, prompt: list[int] = PROMPT, **options: Any) -> list[int]:
    """Return what `model.generate` gives, greedily."""
    ids = torch.tensor([prompt])
    given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **given)[0, len(prompt) :].tolist()


def third_token(kind: str = "llama") -> int:
    """A token of the greedy answer that is none of those before it, to be an EOS."""
    return generated(loaded(kind).model, eos_token_id=None)[2]


def answers(engine: Engine, **params: Any) -> list[list[int]]:
    asked = SamplingParams(max_new_tokens=12, **params)
    outputs = engine.generate([PROMPT, [9] * 30, PROMPT], asked, progress=False)
    assert all(output.error is None for output in outputs)
    return [list(output.token_ids) for output in outputs]


# EOS


@pytest.mark.parametrize("config", WAYS, ids=lambda config: f"{config.policy}-{config.runner}")
@pytest.mark.parametrize("eos", [50256, -1, [50256, -1], [10**12]], ids=str)
def test_an_eos_that_is_no_token_ends_nothing_and_bans_nothing(eos: Any, config: EngineConfig) -> None:
    made: Any = loaded("gpt2", eos)
    made.model.lm_head.weight.data[255] *= 2  # the last token is in the running: a ban would show
    with pytest.warns(UserWarning, match=r"made: eos_token_id has (50256|-1|10{12}).* a vocabulary of 256"):
        engine = Engine(made, config)
    assert engine.eos_ids == frozenset()
    plain = generated(made.model, eos_token_id=None)
    assert 255 in plain[:5]
    assert answers(engine)[0] == plain
    assert answers(engine, min_new_tokens=5)[0] == plain


@pytest.mark.parametrize("bad", [[50256], [-1], [None], [True], [2.5], ["7"], [float("nan")]], ids=str)
def test_the_good_ones_of_a_list_count(bad: list) -> None:
    token = third_token()
    named = "" if bad == [None] else repr(bad[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = Engine(loaded(eos=[*bad, token]))
    said = [str(each.message) for each in caught if "eos_token_id" in str(each.message)]
    assert [named in text for text in said] == [True] * bool(named)
    assert engine.eos_ids == {token}
    for least in (0, 5):
        expected = generated(engine.model, eos_token_id=token, min_new_tokens=least)
        assert answers(engine, min_new_tokens=least)[0] == expected


def test_forms_that_generate_takes_are_taken_alike(recwarn: pytest.WarningsRecorder) -> None:
    token = third_token()
    for eos in (token, [token], float(token), [[token]], (token,), torch.tensor([token]), np.int64(token)):
        engine = Engine(loaded(eos=eos))
        assert engine.eos_ids == {token}
        assert answers(engine)[0] == generated(engine.model, eos_token_id=token)
    assert Engine(loaded(eos=[[token], [3, 4]])).eos_ids == {token, 3, 4}
    for eos in (None, [], [[]]):
        assert Engine(loaded(eos=eos)).eos_ids == frozenset()
    assert not recwarn.list


@pytest.mark.parametrize("eos", [True, False, 2.5, "2", {"a": 1}, -2.0, float("inf")], ids=str)
def test_what_is_no_id_is_none(eos: Any) -> None:
    with pytest.warns(UserWarning, match=r"eos_token_id has .*: outputs end at their limits"):
        assert Engine(loaded(eos=eos)).eos_ids == frozenset()


def test_a_stored_generation_config_counts_before_the_config(tmp_path: Path) -> None:
    tiny(eos_token_id=2).save_pretrained(tmp_path)
    stated = tmp_path / "generation_config.json"
    stated.write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert Engine(load(str(tmp_path))).eos_ids == {7, 8}
    stated.unlink()
    assert Engine(load(str(tmp_path))).eos_ids == {2}


# Padding


@pytest.mark.parametrize("pad", [300, -1])
def test_a_padding_id_that_is_no_token_is_left_out(pad: int, tmp_path: Path) -> None:
    made = tiny()
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
    with pytest.warns(UserWarning, match=rf"pad_token_id {pad} is no token of a vocabulary of 256"):
        found = load(str(tmp_path)).model
    assert found.config.pad_token_id is None
    assert torch.equal(found(torch.tensor([PROMPT])).logits, made(torch.tensor([PROMPT])).logits)


# Sizes


@pytest.mark.parametrize("stated", [64, 100000])
@pytest.mark.parametrize("config", WAYS, ids=lambda config: f"{config.policy}-{config.runner}")
def test_the_weights_say_how_many_tokens_there_are(stated: int, config: EngineConfig) -> None:
    made = loaded()
    made.model.config.vocab_size = stated
    engine = Engine(made, config)
    assert (engine.vocab_size, engine.output_size) == (256, 256)
    assert answers(engine, stop_token_ids=[255])[0] == generated(made.model, eos_token_id=255)
    assert engine.config.runner == {"sequential": "padded"}.get(config.policy, "packed")
    for ids, name in (([256], "prompt has token id 256"), ([-1], "prompt has token id -1")):
        with pytest.raises(InputError, match=rf"{name}; the ids of made are 0 to 255"):
            engine.add_request(ids)
    with pytest.raises(InputError, match=r"stop_token_ids has token id 256; .* 0 to 255"):
        engine.add_request(PROMPT, SamplingParams(stop_token_ids=[256]))


def more_rows(rows: int, outputs: int) -> LoadedModel:
    """A model that reads `rows` tokens and gives `outputs`."""
    made = loaded()
    model: Any = made.model
    model.model.embed_tokens = torch.nn.Embedding.from_pretrained(torch.randn(rows, 64) * 0.3)
    model.lm_head = torch.nn.Linear(64, outputs, bias=False).requires_grad_(False)
    return made


def test_tokens_that_are_only_read() -> None:
    made = more_rows(300, 256)
    engine = Engine(made, EngineConfig(policy="sequential"))
    assert (engine.vocab_size, engine.output_size) == (300, 256)
    asked = SamplingParams(max_new_tokens=6, ignore_eos=True)
    output = engine.generate([[299, 5]], asked, progress=False)[0]
    assert list(output.token_ids) == generated(made.model, [299, 5], max_new_tokens=6, eos_token_id=None)
    with pytest.raises(InputError, match=r"stop_token_ids has token id 299; .* 0 to 255"):
        engine.add_request([5], SamplingParams(stop_token_ids=[299]))
    unseen = SamplingParams(max_new_tokens=1, ignore_eos=True, repetition_penalty=1e6)
    penalised = engine.generate([[299, 5]], unseen, progress=False)[0]  # it has no logit to divide
    assert penalised.token_ids == output.token_ids[:1] != (5,)
    drawn = engine.generate([[5]], SamplingParams(temperature=1.0, top_k=280, seed=1), progress=False)[0]
    assert drawn.error is None


def test_a_stop_string_that_is_a_token_beyond_the_vocabulary_bans_nothing() -> None:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(256)}, "w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=["<far>"])
    assert tokenizer.convert_tokens_to_ids("<far>") == 256
    made = loaded()
    for config in WAYS:
        engine = Engine(LoadedModel("made", made.model, tokenizer, "made"), config)
        assert answers(engine, stop="<far>", min_new_tokens=4)[0] == generated(made.model, eos_token_id=None)


def test_tokens_that_it_could_give_and_not_read_are_refused() -> None:
    with pytest.raises(InputError, match=r"made has logits for 300 tokens and an embedding of 256"):
        Engine(more_rows(256, 300))
