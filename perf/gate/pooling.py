"""Samples of rounds put together; percentiles of a tail are of several rounds, for one has too few values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from perf.gate.metrics import GATED, POOLED, needed_values

T = TypeVar("T")
Sample = dict[str, Any]  # of a round: by metric a number, or the values of one that is pooled


def pooled(lists: Sequence[Sequence[float]], quantile: float) -> float:
    """Return the quantile (numpy's default, linear) of all values of these lists together.

    Raises:
        ValueError: if there are none.
    """
    values = list(chain.from_iterable(lists))
    if not values:
        raise ValueError("a quantile of no values was asked for")
    return float(np.quantile(values, quantile))


def sections(rounds: Sequence[Sequence[float]], quantile: float) -> list[list[Sequence[float]]]:
    """Divide the values of rounds into sections that each have enough for a quantile, as far as there are."""
    needed = needed_values(quantile)
    return divided(rounds, lambda section: sum(map(len, section)) >= needed)


def divided(rounds: Sequence[T], full: Callable[[Sequence[T]], bool]) -> list[list[T]]:
    """Divide rounds into sections of consecutive ones, each of as few as are `full`.

    A last, shorter rest joins the section before; rounds that are not full all together are one section.
    """
    found: list[list[T]] = []
    section: list[T] = []
    for one in rounds:
        section.append(one)
        if full(section):
            found.append(section)
            section = []
    if section and found:
        found[-1] += section
    elif section:
        found.append(section)
    return found


def gathered(samples: Sequence[Sample]) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return the samples of rounds by metric, as they are recorded, and what is flat of the pooled metrics.

    Of a metric that every round has, there is a value for each round, in their order; of a pooled one, for
    each section of rounds that has enough values. The second result has, of every pooled metric, its value
    over all rounds, and under `..._n` the values in the smallest section; None where they have none.
    """
    rounds: dict[str, list[float]] = {}
    tails: dict[str, Any] = {}
    for name in GATED:
        found = [sample[name] for sample in samples if name in sample]
        whole, quantile = len(found) == len(samples), POOLED.get(name)
        if quantile is not None:
            parts = sections(found, quantile) if whole else []
            tails[name] = pooled(found, quantile) if whole else None
            tails[f"{name.removesuffix('_ms')}_n"] = min((sum(map(len, p)) for p in parts), default=None)
            found = [pooled(part, quantile) for part in parts]
        if whole:
            rounds[name] = found
    return rounds, tails
