"""Percentiles of a tail, from the values of several rounds together: one round has too few of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from perf.gate.metrics import needed_values


def pooled(lists: Sequence[Sequence[float]], quantile: float) -> float:
    """Return the quantile (numpy's default, linear) of all values of these lists together.

    Raises:
        ValueError: if there are none.
    """
    values = list(chain.from_iterable(lists))
    if not values:
        raise ValueError("a quantile of no values was asked for")
    return float(np.quantile(values, quantile))


def sections(rounds: Sequence[Sequence[float]], quantile: float) -> list[float]:
    """Return the quantile of each section of consecutive rounds, as `divided` has them."""
    return [pooled(section, quantile) for section in divided(rounds, needed_values(quantile))]


def divided(rounds: Sequence[Sequence[float]], needed: int) -> list[list[Sequence[float]]]:
    """Divide rounds into sections of consecutive ones, each with as few as have `needed` values together.

    A last, shorter rest joins the section before; rounds that have fewer in all are one section.

    Args:
        rounds: each round's values.
    """
    found: list[list[Sequence[float]]] = []
    section: list[Sequence[float]] = []
    for values in rounds:
        section.append(values)
        if sum(map(len, section)) >= needed:
            found.append(section)
            section = []
    if section and found:
        found[-1] += section
    elif section:
        found.append(section)
    return found
