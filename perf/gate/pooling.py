"""Percentiles of a tail, from the values of several rounds together: one round has too few of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np

from perf.gate.metrics import needed_values

T = TypeVar("T")


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
