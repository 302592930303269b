"""A model's generation_config: the defaults that it gives to requests, and what is not taken."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from engine import Engine, EngineConfig, InputError, LoadedModel, SamplingParams, make_workload
from engine.models import ModelError, load
from engine.request import Request, ResolvedParams
from tests.gguf_writer import tiny

PROMPTS = [[5, 6, 7, 8], list(range(20, 60)), [9] * 12]
QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0}


def loaded(**stated: Any) -> LoadedModel:
    model = tiny("qwen2")
    model.generation_config = GenerationConfig(eos_token_id=2, **stated)
    return LoadedModel("made", model, None, "made")


def generated(made: LoadedModel, prompt: list[int], **options: Any) -> tuple[int, ...]:
    """Return what `model.generate` gives by the model's generation_config and these options."""
    ids, model = torch.tensor([prompt]), made.model  # type: Any, Any
    given = {"pad_token_id": 0, "max_new_tokens": 16, **options}
    return tuple(model.generate(ids, attention_mask=torch.ones_like(ids), **given)[0, len(prompt) :].tolist())


def answers(engine: Engine, params: SamplingParams) -> list[tuple[int, ...]]:
    outputs = engine.generate(PROMPTS, params, progress=False)
    assert all(output.error is None for output in outputs)
    return [output.token_ids for output in outputs]


def resolved(engine: Engine, params: SamplingParams | None = None) -> ResolvedParams:
    request = engine.add_request([5], params)
    engine.abort(request.id)
    return request.params


# What is taken


@pytest.mark.parametrize("policy", ["sequential", "dynamic", "continuous"])
def test_its_repetition_penalty_gives_the_tokens_of_generate(policy: str) -> None:
    made = loaded(repetition_penalty=1.3)
    engine = Engine(made, EngineConfig(policy=policy))
    found = answers(engine, SamplingParams(max_new_tokens=16))
    assert found == [generated(made, prompt) for prompt in PROMPTS]
    plain = [generated(made, prompt, repetition_penalty=1.0) for prompt in PROMPTS]
    assert found != plain
    assert answers(engine, SamplingParams(max_new_tokens=16, repetition_penalty=1.0)) == plain
    none = Engine(made, EngineConfig(policy=policy, generation_config="none"))
    assert answers(none, SamplingParams(max_new_tokens=16)) == plain


def test_what_a_request_states_wins_and_the_rest_is_the_models() -> None:
    engine = Engine(loaded(**QWEN, max_new_tokens=9, min_p=0.05))
    assert resolved(engine) == ResolvedParams(9, 0, 0.7, 20, 0.8, 0.05, 1.1)
    assert resolved(engine, SamplingParams()) == resolved(engine)
    some = SamplingParams(5, top_k=0, min_p=0.0)
    assert resolved(engine, some) == ResolvedParams(5, 0, 0.7, 0, 0.8, 0.0, 1.1)
    stated = SamplingParams(64, 0, 0.0, 0, 1.0, 0.0, 1.0)
    assert resolved(engine, stated) == ResolvedParams()
    none = Engine(engine.loaded, EngineConfig(generation_config="none"))
    assert resolved(none) == ResolvedParams()


def test_do_sample_draws_where_a_request_states_no_temperature() -> None:
    engine = Engine(loaded(**{**QWEN, "temperature": 1.5, "top_k": 40, "top_p": 1.0}))
    drawn = {answers(engine, SamplingParams(max_new_tokens=8, seed=seed))[0] for seed in range(4)}
    assert len(drawn) > 1
    stated = SamplingParams(8, 0, 1.5, 40, 1.0, 0.0, 1.1, seed=3)
    assert answers(engine, SamplingParams(max_new_tokens=8, seed=3)) == answers(engine, stated)
    greedy = [generated(engine.loaded, prompt, do_sample=False) for prompt in PROMPTS]
    assert answers(engine, SamplingParams(max_new_tokens=16, temperature=0.0)) == greedy


def test_the_files_filters_bound_what_is_drawn() -> None:
    engine = Engine(loaded(do_sample=True, top_k=2))
    assert resolved(engine).temperature == 1.0
    logits = engine.model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    outputs = engine.generate([PROMPTS[0]] * 40, SamplingParams(max_new_tokens=1), progress=False)
    counts = Counter(output.token_ids[0] for output in outputs)
    assert set(counts) <= set(logits.topk(2).indices.tolist())


@pytest.mark.parametrize("do_sample", [None, False])
def test_without_do_sample_a_temperature_does_not_draw(do_sample: bool | None) -> None:
    made = loaded(do_sample=do_sample, temperature=0.6, top_p=0.9, top_k=3)
    engine = Engine(made)
    greedy = [generated(made, prompt) for prompt in PROMPTS]
    assert answers(engine, SamplingParams(max_new_tokens=16)) == greedy
    drawing = resolved(engine, SamplingParams(temperature=0.8))  # as `generate` with do_sample=True would
    assert (drawing.temperature, drawing.top_p, drawing.top_k) == (0.8, 0.9, 3)


def test_its_max_new_tokens_is_a_default_and_gives_way_to_a_long_prompt() -> None:
    made = loaded(max_new_tokens=100)
    engine = Engine(made)
    assert resolved(engine).max_new_tokens == 100
    # the last needs no position, and 512 are there
    assert engine.add_request([5] * 500).params.max_new_tokens == 13
    with pytest.raises(InputError, match=r"max_new_tokens=100 needs 599 positions"):
        engine.add_request([5] * 500, SamplingParams(max_new_tokens=100))
    with pytest.raises(InputError, match=r"min_new_tokens=101 must be a whole number from 0 to 100"):
        engine.add_request([5], SamplingParams(min_new_tokens=101))
    output = engine.generate([[5]], SamplingParams(ignore_eos=True), progress=False)[0]
    assert list(output.token_ids) == list(generated(made, [5], max_new_tokens=100, eos_token_id=None))


def test_eos_ids_are_the_models_either_way() -> None:
    for choice in ("auto", "none"):
        assert Engine(loaded(), EngineConfig(generation_config=choice)).eos_ids == {2}


def test_a_stored_file_is_what_counts(tmp_path: Path) -> None:
    tiny("qwen2").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], **QWEN}))
    engine = Engine.from_pretrained(str(tmp_path), progress=False)
    assert resolved(engine) == ResolvedParams(64, 0, 0.7, 20, 0.8, 0.0, 1.1)
    (tmp_path / "generation_config.json").unlink()
    assert resolved(Engine.from_pretrained(str(tmp_path), progress=False)) == ResolvedParams()


def test_workloads_state_everything() -> None:
    engine = Engine(loaded(**QWEN, max_new_tokens=9))
    for name in ("mixed-4", "chat-4", "paper-2", "shared-prefix-2"):
        for item in make_workload(name, vocab_size=256).items:
            asked = item.params.resolved(engine.defaults)
            assert (asked.temperature, asked.top_k, asked.top_p, asked.min_p) == (0.0, 0, 1.0, 0.0)
            assert (asked.repetition_penalty, asked.max_new_tokens) == (1.0, item.params.max_new_tokens)


# SamplingParams


def test_sampling_params_stay_plain() -> None:
    assert repr(SamplingParams(max_new_tokens=3)) == (
        "SamplingParams(max_new_tokens=3, min_new_tokens=0, temperature=None, top_k=None, top_p=None, "
        "min_p=None, repetition_penalty=None, stop=(), stop_token_ids=(), ignore_eos=False, "
        "seed=None, logprobs=None)"
    )
    names, same = ([field.name for field in fields(made)] for made in (SamplingParams, ResolvedParams))
    assert names == same
    assert SamplingParams().resolved() == ResolvedParams(64, 0, 0.0, 0, 1.0, 0.0, 1.0)
    assert ResolvedParams(5).resolved({"max_new_tokens": 9, "top_k": 4}) == ResolvedParams(5)


def test_a_request_made_by_hand_is_greedy_where_it_leaves_something_open() -> None:
    request = Request("a", 1, SamplingParams(temperature=0.5), [3])
    assert request.params == ResolvedParams(temperature=0.5)
    assert request.max_len == 65
    assert Request("b", 1, SamplingParams(), [3]).greedy


@pytest.mark.parametrize("choice", ["", "Auto", "vllm", None, True, 1])
def test_the_option_is_one_of_two(choice: Any) -> None:
    with pytest.raises(InputError, match=r"generation_config=.* must be one of auto, none"):
        EngineConfig(generation_config=choice)


# What is not


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("no_repeat_ngram_size", 3), ("suppress_tokens", [5]), ("begin_suppress_tokens", [5]),
        ("forced_bos_token_id", 0), ("forced_eos_token_id", 2), ("bad_words_ids", [[5]]),
        ("exponential_decay_length_penalty", [5, 1.5]), ("num_beams", 4), ("penalty_alpha", 0.6),
        ("encoder_repetition_penalty", 1.5), ("encoder_no_repeat_ngram_size", 2),
        ("sequence_bias", [[[5], 2.0]]), ("typical_p", 0.9), ("epsilon_cutoff", 3e-4),
        ("eta_cutoff", 3e-4), ("min_length", 10),
        ("min_new_tokens", 10), ("guidance_scale", 2.0), ("stop_strings", ["x"]), ("num_return_sequences", 2),
        ("top_h", 0.4), ("diversity_penalty", 0.5), ("token_healing", True),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_named_at_load(name: str, value: Any) -> None:
    made = loaded()
    setattr(made.model.generation_config, name, value)
    with pytest.warns(UserWarning, match=rf"made: its generation_config has {name}=") as caught:
        Engine(made)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(made, EngineConfig(generation_config="none"))


def test_what_changes_nothing_is_not_named() -> None:
    made = loaded(**QWEN)
    nothing = {
        "num_beams": 1, "no_repeat_ngram_size": 0, "typical_p": 1.0, "bad_words_ids": [], "min_length": 0,
        "suppress_tokens": [], "max_length": 4096, "length_penalty": 1.0, "early_stopping": False,
        "use_cache": True, "renormalize_logits": True, "encoder_repetition_penalty": 1,
    }  # fmt: skip
    for name, value in nothing.items():
        setattr(made.model.generation_config, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(made)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"), ("temperature", -0.5), ("top_k", -1), ("top_k", 2.5), ("top_p", 2.0),
        ("top_p", "x"), ("min_p", -0.1), ("repetition_penalty", 0), ("repetition_penalty", [1.1]),
        ("max_new_tokens", -3), ("do_sample", "yes"), ("do_sample", 1),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_one_line_that_names_the_field(name: str, value: Any) -> None:
    made = loaded()
    setattr(made.model.generation_config, name, value)
    with pytest.raises(
        InputError, match=rf"made: in its generation_config, {name}=.* must be .*generation_config='none'"
    ):
        Engine(made)
    assert resolved(Engine(made, EngineConfig(generation_config="none"))) == ResolvedParams()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"max_new_tokens": "hot"}', r"generation_config, max_new_tokens='hot' must be a whole number"),
        ('{"max_new_tokens": 0}', r"generation_config, max_new_tokens=0 must be a whole number of at"),
        ('{"pad_token_id": "x"}', r"generation_config, pad_token_id='x' must be a token id"),
        ("[1]", r"its generation_config\.json is no JSON object"),
        ("{", r"its generation_config\.json is no JSON"),
    ],
)
def test_a_file_that_transformers_trips_over_or_passes_over(text: str, said: str, tmp_path: Path) -> None:
    tiny("qwen2").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=said) as caught:
        load(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
