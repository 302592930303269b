"""Percentiles of a tail: which rounds are pooled, and that what is pooled is numpy's percentile of all."""

from __future__ import annotations

import numpy as np
import pytest

from perf.gate.metrics import METRICS, POOLED, needed_values
from perf.gate.pooling import divided, pooled, sections


@pytest.mark.parametrize(
    ("quantile", "needed"), [(0.5, 20), (0.9, 100), (0.95, 200), (0.99, 1000), (0.999, 10_000)]
)
def test_ten_values_must_lie_beyond_a_percentile(quantile: float, needed: int):
    assert needed_values(quantile) == needed


def test_which_metrics_are_pooled_and_of_how_many_values():
    assert POOLED == {"tpot_p95_ms": 0.95, "itl_p99_ms": 0.99}
    assert {name: METRICS[name].needed_n for name in POOLED} == {"tpot_p95_ms": 200, "itl_p99_ms": 1000}
    assert METRICS["tokens_per_s"].needed_n == 1


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ([4], [[0]]),  # too few in all: one section of what there is
        ([4, 4], [[0, 1]]),
        ([10, 10, 10], [[0], [1], [2]]),
        ([5, 5, 5, 5], [[0, 1], [2, 3]]),
        ([5, 5, 5, 5, 5], [[0, 1], [2, 3, 4]]),  # the rest joins the section before
        ([4, 4, 4, 4], [[0, 1, 2, 3]]),
        ([30, 1, 1, 9], [[0], [1, 2, 3]]),
        ([0, 10], [[0, 1]]),
        ([], []),
    ],
)
def test_a_section_is_as_few_consecutive_rounds_as_have_enough(sizes: list[int], wanted: list[list[int]]):
    rounds = [[float(number)] * size for number, size in enumerate(sizes)]
    found = divided(rounds, lambda section: sum(map(len, section)) >= 10)
    assert found == [[rounds[number] for number in section] for section in wanted]


def test_a_section_is_numpy_s_percentile_of_all_its_values():
    rng = np.random.default_rng(0)
    rounds = [rng.exponential(1.0, 150).tolist() for _ in range(5)]
    wanted = [np.percentile(np.concatenate(part), 95) for part in (rounds[:2], rounds[2:])]
    assert [pooled(part, 0.95) for part in sections(rounds, 0.95)] == pytest.approx(wanted, rel=1e-12)
    assert pooled(rounds, 0.99) == pytest.approx(np.percentile(np.concatenate(rounds), 99), rel=1e-12)
    assert pooled([[1.0, 3.0]], 0.95) == pytest.approx(2.9)
    assert sections([[1.0, 3.0]], 0.95) == [[[1.0, 3.0]]]  # too few, and all there are


def test_of_nothing_there_is_no_percentile():
    assert sections([], 0.95) == []
    with pytest.raises(ValueError, match="of no values"):
        pooled([[], []], 0.95)
