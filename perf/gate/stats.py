"""Interval statistics: how sure we are of a typical value, and of log(head / base).

The typical value is the 20 % trimmed mean of logarithms, its variance Yuen's (1974), from winsorised squares:
two of them by Welch's t are scipy's `ttest_ind(trim=0.2)`, which has no form for pairs. Why not the mean:
one disturbed round in ten makes it useless. Why not the median: of five rounds it is one of them, and it does
not see what happens to a third of the rounds. Why no bootstrap: below ten rounds the percentile bootstrap
calls identical code slower about twice as often as it says (tests/perf/test_stats.py shows it), and the
studentised one agrees with Yuen but wants a seed. Here the same data give the same answer.

Rounds of one process follow one another, and a slow spell covers several. So the variance is inflated by
(1 + r) / (1 - r), r being the lag-1 autocorrelation with its small-sample bias (Kendall 1954) removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from numpy.typing import NDArray

CONFIDENCE = 0.95
TRIM = 0.2
MIN_PAIRS = 4
MAX_ROUNDS = 1000
POWER_Z = 0.84  # one-sided normal quantile of 80 %: "probably"
_MAX_CORRELATION = 0.75

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """log(head / base) with its standard error, degrees of freedom, and 95 % interval (low, high).

    p_rise, p_fall: one-sided p: how likely a log-ratio so high, or so low, is without any change.
    fixed: the part of error^2 that more units do not make smaller.
    """

    log_ratio: float
    error: float
    df: float
    low: float
    high: float
    p_rise: float
    p_fall: float
    fixed: float = 0.0

    def tail(self, sign: int) -> float:
        """The one-sided p in the direction of `sign`, +1 or -1."""
        return self.p_rise if sign > 0 else self.p_fall

    def rounds_needed(self, rounds: float, gap: float, tail: float = (1 - CONFIDENCE) / 2) -> int | None:
        """Units a side with which an interval leaves a `gap` (log units) free four times in five.

        Units are what the design counts: sessions, pairs. `rounds` is how many this estimate had; `tail` the
        one-sided level. None: more than 1,000.
        """
        if gap <= 0:
            return None
        n = float(rounds)
        while n <= MAX_ROUNDS:
            error = math.sqrt((self.error**2 - self.fixed) * rounds / n + self.fixed)
            df = max(1.0, self.df if self.fixed else self.df * n / rounds)
            if (t_quantile(1 - tail, df) + POWER_Z) * error <= gap:
                return math.ceil(n)
            n = max(n + 1, n * 1.05)
        return None


@dataclass(frozen=True, slots=True)
class Mean:
    """A trimmed mean of logarithms, the variance of that mean, and its degrees of freedom: 0 of one value."""

    value: float
    variance: float
    df: float


def centre(values: Sequence[float]) -> float:
    """The typical value: the geometric mean of what is left when a fifth of the values is cut from each
    end."""
    if not any(values):
        return 0.0
    ordered = np.sort(logs(values)[0])
    cut = int(TRIM * len(ordered))
    return float(np.exp(ordered[cut : len(ordered) - cut].mean()))


def typical(sessions: Sequence[Sequence[float]]) -> float:
    """The geometric mean of each session's typical value."""
    values = [centre(rounds) for rounds in sessions]
    if len(values) == 1 or not any(values):
        return values[0]
    return math.exp(sum(mean.value for mean in means(sessions)) / len(sessions))


def change(log_ratio: float) -> float:
    """head / base - 1; infinite where a float has no room for it."""
    try:
        return math.expm1(log_ratio)
    except OverflowError:
        return math.inf


def means(samples: Sequence[Sequence[float]]) -> list[Mean]:
    """The mean of each sample's logarithms, of one value or more, all 0 or more; a 0 counts as very small
    among all. All are taken to be as correlated in series as they are on average."""
    values = logs(*samples)
    factor = inflation([winsorised(x, int(TRIM * len(x))) for x in values])
    found = (trimmed(x, int(TRIM * len(x))) for x in values)
    return [Mean(mean, variance * factor, df) for mean, variance, df in found]


def compare_pairs(base: Sequence[float], head: Sequence[float]) -> Estimate:
    """The estimate from pairs measured in turn: base[i] next to head[i], two or more, each typical of its
    block.

    Blocks are fresh processes and their values already robust, so that trimming begins at seven pairs.
    """
    before, after = logs(base, head)
    difference = after - before
    cut = int(TRIM * len(difference)) if len(difference) >= 7 else 0
    mean, variance, df = trimmed(difference, cut)
    return student(mean, math.sqrt(variance), df)


def false_discoveries(p: Sequence[float], level: float = (1 - CONFIDENCE) / 2) -> list[bool]:
    """Which of several one-sided p-values stand after Benjamini and Hochberg (1995).

    Without any change, one of them stands at most in `level` of all runs, however many there are; of a change
    that many benchmarks show, next to nothing is lost.
    """
    return (scipy.stats.false_discovery_control(p) <= level).tolist() if len(p) else []


def t_quantile(p: float, df: float) -> float:
    """The t below which a share of `p` of Student's distribution lies."""
    return float(scipy.stats.t.ppf(p, df))


def binomial_bounds(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of Clopper and Pearson for the rate behind so many hits in so many trials, one or
    more."""
    interval = scipy.stats.binomtest(hits, trials).proportion_ci(CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


def student(log_ratio: float, error: float, df: float) -> Estimate:
    """The estimate by Student's t, of a log-ratio with its standard error and degrees of freedom."""
    if not error:
        rise, fall = float(log_ratio <= 0), float(log_ratio >= 0)
        return Estimate(log_ratio, error, df, log_ratio, log_ratio, rise, fall)
    half, t = t_quantile((1 + CONFIDENCE) / 2, df) * error, log_ratio / error
    rise, fall = (float(scipy.stats.t.sf(sign * t, df)) for sign in (1, -1))
    return Estimate(log_ratio, error, df, log_ratio - half, log_ratio + half, rise, fall)


def logs(*samples: Sequence[float]) -> list[Floats]:
    """Logarithms of values; a 0 becomes half the smallest positive value among all, so that it counts as very
    small."""
    arrays = [np.asarray(sample, float) for sample in samples]
    positive = np.concatenate(arrays)
    positive = positive[positive > 0]
    least = float(positive.min()) / 2 if positive.size else 1.0
    return [np.log(np.where(array > 0, array, least)) for array in arrays]


def winsorised(x: Floats, cut: int) -> Floats:
    """Values of which the `cut` furthest at each end are drawn in to the next one."""
    order = np.sort(x)
    return np.clip(x, order[cut], order[len(x) - cut - 1])


def trimmed(x: Floats, cut: int) -> tuple[float, float, float]:
    """Trimmed mean, the variance of that mean, and its degrees of freedom."""
    n, kept = len(x), len(x) - 2 * cut
    mean = float(np.sort(x)[cut : n - cut].mean())
    if kept == 1:
        return mean, 0.0, 0.0
    squares = float(((w := winsorised(x, cut)) - w.mean()) @ (w - w.mean()))
    return mean, squares / (kept * (kept - 1)), kept - 1.0


def inflation(samples: list[Floats]) -> float:
    """Factor by which serial correlation raises the variance of a mean; at least 1."""
    residuals = [x - x.mean() for x in samples]
    total = sum(float(x @ x) for x in residuals)
    n = sum(len(x) for x in samples) / len(samples)
    if not total or n <= 3:
        return 1.0
    r = sum(float(x[1:] @ x[:-1]) for x in residuals) / total
    r = min(max(0.0, (r + 1 / n) / (1 - 3 / n)), _MAX_CORRELATION)
    return (1 + r) / (1 - r)
