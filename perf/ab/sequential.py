"""Looking at an experiment while it runs, as often as planned, with the error of one look.

Group-sequential testing by alpha spending (Lan and DeMets 1983) with their function of O'Brien and Fleming's
kind: next to nothing is spent on early looks, so that the last one needs hardly more than a test with a fixed
end. The interval at a look is the repeated confidence interval (Jennison and Turnbull 1989): all of them,
over the whole experiment, hold the truth with the stated confidence, whatever it is that ends it. Looks are
at fractions of the plan that are fixed beforehand. Boundaries come by numerical integration over the path of
a Brownian motion (Armitage, McPherson and Rowe 1969); with few degrees of freedom the level of a look, not
its quantile, is carried over to Student's t (Jennison and Turnbull 2000, 11.5).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import scipy.optimize
from scipy.special import ndtr, ndtri
from scipy.stats import t as student_t

from perf.gate.stats import CONFIDENCE, Estimate, student

GRID = 401  # points over which a path's position is integrated
# Levels at which boundaries are known exactly; p-values lie between them, linearly in logarithms.
LEVELS = (1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 1 - CONFIDENCE, 0.2, 0.5, 0.9)
TINY = 1e-14  # a look that spends less gets it whole, without integration


def spent(alpha: float, fraction: float) -> float:
    """The error, of both sides together, that may be spent up to a fraction of the plan."""
    return float(4 * ndtr(ndtri(alpha / 4) / math.sqrt(fraction)))


@lru_cache
def nominal(alpha: float, looks: int) -> tuple[float, ...]:
    """The two-sided level of each of `looks` looks, evenly spread, that spends `alpha` over all of them."""
    levels: list[float] = []
    step = math.sqrt(1 / looks)
    points = np.zeros(1)  # where an undecided path may be, B(t) of a standard Brownian motion
    weights = np.ones(1)  # and how likely that is
    for look in range(1, looks + 1):
        fraction = look / looks
        budget = spent(alpha, fraction) - (spent(alpha, (look - 1) / looks) if look > 1 else 0.0)
        if budget < TINY:
            z = -float(ndtri(budget / 2)) if budget > 0 else math.inf
        else:
            z = _boundary(points, weights, step, math.sqrt(fraction), budget)
        levels.append(2 * float(ndtr(-z)))
        edge = min(z, 9.0) * math.sqrt(fraction)
        grid = np.linspace(-edge, edge, GRID)
        density = (
            np.exp(-0.5 * ((grid[:, None] - points) / step) ** 2) @ weights / (step * math.sqrt(2 * math.pi))
        )
        share = np.full(GRID, grid[1] - grid[0])
        share[[0, -1]] /= 2
        points, weights = grid, density * share
    return tuple(levels)


def _boundary(points: np.ndarray, weights: np.ndarray, step: float, scale: float, budget: float) -> float:
    """The z that paths from here cross at the next look with probability `budget`."""

    def excess(z: float) -> float:
        edge = z * scale
        crossing = ndtr((-edge - points) / step) + ndtr((points - edge) / step)
        return float(crossing @ weights) - budget

    return float(scipy.optimize.brentq(excess, 0.0, 40.0, xtol=1e-10))


def estimate(
    log_ratio: float, error: float, df: float, look: int, looks: int, fixed: float = 0.0
) -> Estimate:
    """The estimate at one of `looks` looks: its interval and p-values hold over all of them.

    Args:
        log_ratio, error, df: as of a test with a fixed end, from all that was measured up to this look.
        look: from 1.
        fixed: the part of error^2 that more of the same units do not make smaller.
    """
    if not error:
        return student(log_ratio, error, df)
    level = nominal(1 - CONFIDENCE, looks)[look - 1]
    half = float(student_t.isf(level / 2, df)) * error
    t = log_ratio / error
    rise, fall = (_overall(2 * float(student_t.sf(sign * t, df)), look, looks) / 2 for sign in (1, -1))
    return Estimate(log_ratio, error, df, log_ratio - half, log_ratio + half, rise, fall, fixed)


def _overall(level: float, look: int, looks: int) -> float:
    """The error over the whole plan of a test whose level at this look is `level`; at most 1."""
    known = [math.log(max(nominal(alpha, looks)[look - 1], 1e-300)) for alpha in LEVELS]
    if math.log(max(level, 1e-300)) <= known[0]:
        return LEVELS[0]
    if level >= math.exp(known[-1]):
        return min(1.0, max(level, LEVELS[-1]))
    return math.exp(float(np.interp(math.log(level), known, [math.log(alpha) for alpha in LEVELS])))
