"""Pairwise covers: few rows in which any two values of two parameters meet, in place of all combinations.

A fault mostly needs one value or two values together to show (Kuhn, Wallace and Gallo, 2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from random import Random
from typing import Any

import pytest

Cell = tuple[int, int]  # an axis, and which of its values


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return rows with one value of each axis that hold every pair of values of two axes.

    Greedy: each row starts with the first pair that is missing, and then takes of each axis the value that
    adds most pairs, drawn from these if there are several. The rows are the same at every call.

    Two axes [1, 2] and ["a", "b"] give all four rows; a third of two values adds none.
    """
    values = [[(axis, index) for index in range(len(given))] for axis, given in enumerate(axes)]
    missing = dict.fromkeys(pair for one, other in combinations(values, 2) for pair in product(one, other))
    rows: list[tuple[Any, ...]] = []
    draw = Random(0)
    while missing:
        cells: list[Cell] = list(next(iter(missing)))
        for axis in set(range(len(axes))) - {axis for axis, _ in cells}:
            mixed = draw.sample(values[axis], len(values[axis]))
            added = [sum(tuple(sorted((cell, other))) in missing for other in cells) for cell in mixed]
            cells.append(mixed[added.index(max(added))])
        cells.sort()
        for pair in combinations(cells, 2):
            missing.pop(pair, None)
        rows.append(tuple(axes[axis][index] for axis, index in cells))
    return rows


def grid(*axes: Sequence[Any]) -> list[Any]:
    """Return every combination for `pytest.mark.parametrize`: a pairwise cover of them in a plain run, the
    rest marked slow."""
    rows = pairwise(*axes)
    return [pytest.param(*row, marks=() if row in rows else pytest.mark.slow) for row in product(*axes)]
