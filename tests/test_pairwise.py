"""Pairwise covers hold every pair, in few rows, in the same order at every call."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.pairwise import grid, pairwise

AXES = [
    [[1, 2], "ab"],
    ["abc", range(3), range(3), range(3)],
    [range(8), range(5), range(2), range(4), range(4), range(4), range(2), range(2)],
    [[dict(a=1), dict(b=2)], [None, 1.5, "x"], [True, False]],  # values that have no hash
]


@pytest.mark.parametrize("axes", AXES, ids=["two", "square", "engines", "unhashable"])
def test_any_two_values_of_two_axes_meet(axes):
    rows = pairwise(*axes)
    assert all(len(row) == len(axes) for row in rows)
    assert all(value in axis for row in rows for value, axis in zip(row, axes, strict=True))
    for i, j in combinations(range(len(axes)), 2):
        for pair in product(axes[i], axes[j]):
            assert any((row[i], row[j]) == pair for row in rows), (i, j, pair)
    assert rows == pairwise(*axes)


@pytest.mark.parametrize("axes", AXES, ids=["two", "square", "engines", "unhashable"])
def test_rows_are_few(axes):
    first, second = sorted(map(len, axes))[-2:]
    assert first * second <= len(pairwise(*axes)) <= 1.35 * first * second


def test_every_row_adds_a_pair():
    rows = pairwise(range(4), range(3), range(3), range(2))
    for without in range(len(rows)):
        others = rows[:without]
        pairs = {((i, row[i]), (j, row[j])) for row in others for i, j in combinations(range(4), 2)}
        mine = {((i, rows[without][i]), (j, rows[without][j])) for i, j in combinations(range(4), 2)}
        assert mine - pairs


def test_a_grid_is_all_there_is_and_a_plain_run_takes_a_cover_of_it():
    axes = ["abc", range(3), range(3), range(3)]
    rows = grid(*axes)
    assert [row.values for row in rows] == list(product(*axes))
    assert {row.values for row in rows if not row.marks} == set(pairwise(*axes))
