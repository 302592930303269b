"""SamplingParams, EngineConfig and Request: what is out of bounds is refused by name, and when a request
ends."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from engine.config import DTYPES, POLICIES, RUNNERS, EngineConfig
from engine.errors import InputError, check
from engine.request import FinishReason, Request, SamplingParams
from engine.step import TokenLogprob

NAN, INF, HUGE = math.nan, math.inf, 10**400  # no float is as large as HUGE
NO_INTEGERS = (True, False, 1.0, 0.5, NAN, INF, "1", [1])
NO_NUMBERS = (True, False, NAN, INF, -INF, HUGE, "1", "", [1.0])

GOOD_PARAMS = {
    "max_new_tokens": (None, 1, 2, 10**9),
    "min_new_tokens": (0, 1, 64),
    "temperature": (None, 0, 0.0, -0.0, 1, 1e-9, 0.7, 1e9),
    "top_k": (None, 0, 1, 10**9),
    "top_p": (None, 1e-9, 0.5, 1, 1.0),
    "min_p": (None, 0, 0.0, 0.5, 1, 1.0),
    "repetition_penalty": (None, 1e-9, 0.5, 1, 1.0, 2.0, 1e9),
    "stop": (None, (), [], "x", ("x",), ["x", "yz"], (" ",), ("\n\n",)),
    "stop_token_ids": (None, (), [], (0,), [5, 7], {9}, (10**9,)),
    "ignore_eos": (True, False),
    "seed": (None, 0, 1, 2**63 - 1),
    "logprobs": (None, 0, 1, 100),
}
BAD_PARAMS = {
    "max_new_tokens": (0, -1, *NO_INTEGERS),
    "min_new_tokens": (-1, HUGE, None, *NO_INTEGERS),
    "temperature": (-1e-9, -1, *NO_NUMBERS),
    "top_k": (-1, *NO_INTEGERS),
    "top_p": (0, 0.0, -0.5, 1.0000001, 2, *NO_NUMBERS),
    "min_p": (-1e-9, -1, 1.0000001, 2, *NO_NUMBERS),
    "repetition_penalty": (0, 0.0, -1.0, *NO_NUMBERS),
    "stop": ("", ("",), ("x", ""), (1,), (None,), ("x", 1.0), (b"x",), 0, 5, False, 1.5),
    "stop_token_ids": ((-1,), (1, -1), ("1",), (1.0,), (NAN,), (True,), (None,), "1", 0, 7, False, 1.5),
    "ignore_eos": (None, "no"),
    "seed": (-1, 2**63, HUGE, *NO_INTEGERS),
    "logprobs": (-1, 101, *NO_INTEGERS),
}
GOOD_CONFIG = {
    "policy": POLICIES,
    "runner": RUNNERS,
    "device": ("auto", "cpu", "cuda", "cuda:1"),
    "dtype": ("auto", *DTYPES, "int8"),
    "max_batch_size": (1, 2, 10**6),
    "max_step_tokens": (None, 1, 2, 10**9),
    "page_size": (1, 2, 1000),
    "prefix_caching": (True, False),
    "deterministic": (True, False),
    "kv_memory": (1, 2**40, 1e-9, 0.5, 1.0),
    "seed": (0, 1, 2**63 - 1),
    "metrics_window": (None, 1, 10**6),
    "generation_config": ("auto", "none"),
}
BAD_CONFIG = {
    "policy": ("", "Dynamic", "static", None, 1, True),
    "runner": ("", "Padded", "fast", None, 1, True),
    "device": ("", None, 0, True),
    "dtype": ("", "float8", "torch.float32", "int4", None, 16, True),
    "max_batch_size": (0, -1, None, *NO_INTEGERS),
    "max_step_tokens": (0, -1, *NO_INTEGERS),
    "page_size": (0, -1, None, *NO_INTEGERS),
    "prefix_caching": (None, "no"),
    "deterministic": (None, "no"),
    "kv_memory": (0, -1, 0.0, -0.5, 1.0000001, 2.0, True, False, NAN, INF, -INF, "1", "1GiB", None, [1]),
    "seed": (-1, 2**64, None, *NO_INTEGERS),
    "metrics_window": (0, -1, *NO_INTEGERS),
    "generation_config": ("", "Auto", "vllm", None, 1, True),
}


def cases(table: dict[str, tuple]) -> list:
    def named(field: str, value: object) -> str:
        return f"{field}={'10**400' if isinstance(value, int) and value == HUGE else repr(value)}"

    return [pytest.param(field, value, id=named(field, value)) for field in table for value in table[field]]


@pytest.mark.parametrize(
    ("made", "good", "bad"),
    [(SamplingParams, GOOD_PARAMS, BAD_PARAMS), (EngineConfig, GOOD_CONFIG, BAD_CONFIG)],
)
def test_no_field_is_forgotten_here(made, good, bad):
    assert {field.name for field in dataclasses.fields(made)} == set(good) == set(bad)


@pytest.mark.parametrize(("field", "value"), cases(GOOD_PARAMS))
def test_params_take_every_value_within_bounds(field, value):
    SamplingParams(**{field: value})


@pytest.mark.parametrize(("field", "value"), cases(BAD_PARAMS))
def test_params_refuse_by_name(field, value):
    with pytest.raises(InputError, match=f"^{field}="):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(("field", "value"), cases(GOOD_CONFIG))
def test_config_takes_every_value_within_bounds(field, value):
    others: dict[str, Any] = {"policy": "dynamic"} if value == "padded" else {}
    assert getattr(EngineConfig(**{field: value}, **others), field) == value


@pytest.mark.parametrize(("field", "value"), cases(BAD_CONFIG))
def test_config_refuses_by_name_and_value(field, value):
    with pytest.raises(InputError, match=f"^{field}={re.escape(repr(value))} "):
        EngineConfig(**{field: value})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at least 1"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens=5 must be a whole number from 0 to 4"),
        ({"temperature": -1.0}, "temperature=-1.0 must be a finite number of at least 0"),
        ({"temperature": "hot"}, "temperature='hot' must be a finite number of at least 0"),
        ({"min_p": 1.5}, "min_p=1.5 must be a finite number from 0 to 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be a finite number from 1e-09 to 1"),
        ({"stop_token_ids": (4, -2)}, "stop_token_ids=-2 must be a whole number of at least 0"),
        ({"logprobs": 101}, "logprobs=101 must be a whole number from 0 to 100"),
    ],
    ids=str,
)
def test_message_says_field_value_and_bound(params, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        SamplingParams(**params)


def test_message_of_a_bad_choice_lists_the_good_ones():
    with pytest.raises(InputError, match="policy='static' must be one of sequential, dynamic"):
        EngineConfig(policy="static")


def test_message_keeps_an_upper_bound_of_zero():
    with pytest.raises(InputError, match="from 0 to 0"):
        check("count", 1, int, 0, 0)


@pytest.mark.parametrize(
    "fixed", [{"policy": "continuous"}, {"policy": "dynamic", "deterministic": True}], ids=str
)
def test_what_the_padded_runner_cannot_do_is_refused(fixed):
    EngineConfig(**fixed)
    with pytest.raises(InputError, match=r"^runner='padded' .*use runner='packed'$"):
        EngineConfig(runner="padded", **fixed)


def test_number_bounds_are_inclusive():
    check("share", 0.25, float, 0.25, 0.75)
    check("share", 0.75, float, 0.25, 0.75)


def test_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)


@pytest.mark.parametrize("made", [SamplingParams(), EngineConfig()], ids=["params", "config"])
def test_frozen(made):
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, getattr(made, field.name))


@pytest.mark.parametrize(
    ("made", "change"), [(SamplingParams(), {"top_k": -1}), (EngineConfig(), {"seed": -1})]
)
def test_a_changed_copy_is_checked_too(made, change):
    with pytest.raises(InputError, match=next(iter(change))):
        dataclasses.replace(made, **change)


@pytest.mark.parametrize("stop", ["end", ["end"], ("end",)], ids=str)
def test_stop_is_a_tuple_whatever_was_given(stop):
    assert SamplingParams(stop=stop).stop == ("end",)


def test_params_and_configs_are_values():
    """Equal when their fields are, and good as keys; lists given are copied."""
    given = [7, 8]
    params = SamplingParams(stop=["a"], stop_token_ids=given)  # type: ignore[arg-type]
    given.append(9)
    assert {params: 1}[SamplingParams(stop=("a",), stop_token_ids=(7, 8))] == 1
    assert {EngineConfig(): 1}[EngineConfig()] == 1
    assert EngineConfig(seed=1) != EngineConfig(seed=2)


def test_greedy_and_unfiltered_by_default():
    params = SamplingParams().resolved()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.0, 0, 1.0, 0.0)
    assert (params.repetition_penalty, params.ignore_eos, params.seed, params.logprobs) == (
        1.0,
        False,
        None,
        None,
    )
    with pytest.raises(InputError, match="min_new_tokens=65 must be a whole number from 0 to 64"):
        SamplingParams(min_new_tokens=65).resolved()


def request(stop_ids=(3,), **params) -> Request:
    return Request("a", 2, SamplingParams(**params), [1, 2], frozenset(stop_ids), seed=5)


def ended(asked: Request, tokens: list[int]) -> tuple[int, FinishReason | None, int | str | None]:
    """Append until it ends; how many output tokens it has then, and why."""
    for at, token in enumerate(tokens):
        asked.append(token, float(at))
        if asked.finish_reason is not None:
            break
    return asked.output_len, asked.finish_reason, asked.stop_reason


@pytest.mark.parametrize(
    ("params", "tokens", "end"),
    [
        ({"max_new_tokens": 4}, [5, 6], (2, None, None)),
        ({"max_new_tokens": 4}, [5, 6, 7, 8], (4, FinishReason.LENGTH, None)),
        ({"max_new_tokens": 1}, [5], (1, FinishReason.LENGTH, None)),
        ({"max_new_tokens": 4}, [5, 3], (2, FinishReason.STOP, 3)),
        ({"max_new_tokens": 4}, [3], (1, FinishReason.STOP, 3)),
        ({"max_new_tokens": 2}, [5, 3], (2, FinishReason.STOP, 3)),
        ({"max_new_tokens": 4, "stop_ids": (8, 9)}, [3, 9], (2, FinishReason.STOP, 9)),
        ({"max_new_tokens": 3, "stop_ids": ()}, [3, 3, 3], (3, FinishReason.LENGTH, None)),
        ({"max_new_tokens": 4, "min_new_tokens": 2}, [3, 5, 3], (3, FinishReason.STOP, 3)),
        ({"max_new_tokens": 4, "min_new_tokens": 2}, [3, 3], (2, FinishReason.STOP, 3)),
        ({"max_new_tokens": 3, "min_new_tokens": 3}, [3, 3, 5], (3, FinishReason.LENGTH, None)),
        ({"max_new_tokens": 3, "min_new_tokens": 3}, [3, 3, 3], (3, FinishReason.STOP, 3)),
    ],
    ids=str,
)
def test_a_request_ends_on_a_stop_token_or_at_its_limit(params, tokens, end):
    assert ended(request(**params), tokens) == end


def test_a_stop_id_in_the_prompt_ends_nothing():
    asked = Request("a", 2, SamplingParams(), [3, 3], frozenset({3}))
    asked.append(5, 0.0)
    assert asked.finish_reason is None


def test_append_keeps_tokens_and_times():
    asked = request(max_new_tokens=8)
    for token, now in ((5, 1.5), (6, 1.75)):
        asked.append(token, now)
    assert asked.tokens == [1, 2, 5, 6]
    assert asked.output_ids == [5, 6]
    assert asked.output_len == 2
    assert asked.token_times == [1.5, 1.75]
    assert asked.max_len == 10


def test_a_new_request_has_no_output():
    asked = request()
    assert (asked.output_ids, asked.output_len, asked.computed, asked.finish_reason) == ([], 0, 0, None)


def test_requests_share_no_state():
    one, other = request(), request()
    one.append(5, 1.0)
    assert (other.token_times, other.logprobs) == ([], [])
    assert one != other


def test_the_last_reason_given_holds():
    asked = request(max_new_tokens=1)
    asked.append(5, 0.0)
    asked.finish(FinishReason.STOP, "end")
    assert (asked.finish_reason, asked.stop_reason, asked.error) == (FinishReason.STOP, "end", None)
    asked.finish(FinishReason.ERROR, error="broken")
    assert (asked.finish_reason, asked.stop_reason, asked.error) == (FinishReason.ERROR, None, "broken")


def test_close_hands_out_everything():
    asked = request(max_new_tokens=2, logprobs=1)
    asked.append(5, 1.0)
    asked.append(3, 2.0)
    asked.logprobs += [TokenLogprob(5, -0.5, ((5, -0.5),)), TokenLogprob(3, -1.0, ((4, -0.7),))]
    output = asked.close("text", 2.5)
    assert asked.result is output
    assert (output.request_id, output.prompt_token_ids, output.token_ids) == ("a", (1, 2), (5, 3))
    assert (output.text, output.finish_reason, output.stop_reason) == ("text", "stop", 3)
    assert output.logprobs == tuple(asked.logprobs)
    assert output.error is None
    assert (output.metrics.prompt_tokens, output.metrics.output_tokens) == (2, 2)


def test_close_gives_logprobs_only_where_asked():
    asked = request()
    asked.finish(FinishReason.ABORT)
    assert asked.close(None, 0.0).logprobs is None
    asked = request(logprobs=0)
    asked.finish(FinishReason.ABORT)
    assert asked.close(None, 0.0).logprobs == ()


def test_an_output_does_not_change_with_its_request():
    asked = request()
    asked.append(3, 1.0)
    output = asked.close("", 1.0)
    asked.tokens.append(9)
    assert output.token_ids == (3,)


def test_a_request_without_a_reason_cannot_close():
    with pytest.raises(AssertionError):
        request().close("", 1.0)


@pytest.mark.parametrize("reason", FinishReason)
def test_reasons_are_strings(reason):
    assert reason == reason.value
    assert f"{reason}" in ("stop", "length", "abort", "error")
