"""The checks of values: numbers of any library, words, texts; and errors that can always be shown."""

from __future__ import annotations

import dataclasses
import math
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from engine import EngineConfig, EngineMetrics, InputError, SamplingParams
from engine.errors import check, shown
from tests.bad_values import HALF, LONG, Raises


def named(value: object) -> str:
    """A value as a test's name: the same in every process."""
    return re.sub(" at 0x[0-9a-f]+", "", shown(value))


ODD = {"max_new_tokens": 9, "min_new_tokens": 2, "top_k": 3, "seed": 4, "logprobs": 1}
ODD_FLOATS = {"temperature": 0.5, "top_p": 0.25, "min_p": 0.125, "repetition_penalty": 1.5}


@pytest.mark.parametrize("scalar", [np.int64, np.uint8, torch.tensor, lambda n: np.array([n])[0]])
def test_scalars_of_numpy_and_torch_are_as_good_as_pythons(scalar):
    plain = SamplingParams(**ODD, **ODD_FLOATS, stop_token_ids=(7, 8))
    odd = {name: scalar(value) for name, value in ODD.items()}
    floats = {name: np.float32(value) for name, value in ODD_FLOATS.items()}
    found = SamplingParams(**odd, **floats, stop_token_ids=[scalar(7), 8], ignore_eos=np.False_)
    assert found == plain
    for field in dataclasses.fields(plain):
        assert type(getattr(found, field.name)) is type(getattr(plain, field.name)), field.name
    config = EngineConfig(max_batch_size=scalar(3), kv_memory=np.float64(0.5), prefix_caching=np.True_)
    assert config == EngineConfig(max_batch_size=3, kv_memory=0.5)
    assert type(EngineConfig(kv_memory=scalar(200)).kv_memory) is int


NO_NUMBERS = [
    Decimal(1), Fraction(1, 2), 1j, np.array([1, 2]), np.array([]), [1], "1", b"1", {}, Raises(), math.nan,
    np.float64("nan"), LONG, np.longdouble(1), object(),
]  # fmt: skip


@pytest.mark.parametrize("value", NO_NUMBERS, ids=named)
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(InputError, match=f"^{name}=.* must be a finite number") as error:
        SamplingParams(**{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["policy", "runner", "dtype", "device"])
@pytest.mark.parametrize("value", [np.array(["a", "b"]), [], {}, Raises(), HALF, "auto\ud83d"], ids=named)
def test_what_is_no_word_is_refused(name, value):
    with pytest.raises(InputError, match=f"^{name}="):
        EngineConfig(**{name: value})


@pytest.mark.parametrize("stop", [HALF, ["end", HALF], {"a": 1}, Raises(), [["end"]], [b"end"], 5], ids=named)
def test_stop_strings_are_text(stop):
    with pytest.raises(InputError, match=r"^stop="):
        SamplingParams(stop=stop)


@pytest.mark.parametrize("ids", [[-1], [LONG], "5", b"5", {5: 6}, Raises(), [5.0], [[5]], 5], ids=named)
def test_stop_token_ids_are_ids(ids):
    with pytest.raises(InputError, match=r"^stop_token_ids="):
        SamplingParams(stop_token_ids=ids)


def test_goodput_takes_infinity_for_no_limit():
    assert EngineMetrics().goodput(math.inf, 10**400 // 10**399) == 0.0


def test_every_error_is_one_short_line():
    assert shown("a\nb") == r"'a\nb'"
    assert shown(np.ones((2, 2))).count("\n") == 0
    assert len(shown(["x" * 1000] * 1000)) < 1000
    assert shown(Raises()).startswith("<Raises")
    assert shown(LONG) == "<int>"
    assert check("n", True, bool) is True
    with pytest.raises(InputError, match=r"^n=1 must be True or False$"):
        check("n", 1, bool)
