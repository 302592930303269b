"""A row of logits to a token, in numpy: what `engine.sampling.device` does on a device, a row at a time.

A row stays in the second cache, each pass over it is one thread's vectors, and no thread is left behind that
spins for a while, as torch's do. V is the vocabulary, N the tokens that filters keep.

Tokens have one rank, here and on a device: by logit, and among equals the lower id first. The most likely one
is the first in it, alternatives are the first few, and what filters keep is always a beginning of it.
"""

from __future__ import annotations

import math

import numpy as np

from engine.request import Request, ResolvedParams
from engine.step import ALL_BANNED, NON_FINITE, Choice, TokenLogprob

BLOCK = 256  # weights that a draw passes over at once
ROUNDING = 1e-6  # the share of top_p and of min_p that may be missing: logits in float32 know no better


def choose(logits_V: np.ndarray, request: Request) -> Choice:
    """The next token of a request, by its parameters, from float32 or float64 logits, which are not
    modified."""
    token = int(logits_V.argmax())  # the first of equals; NaN counts as the largest
    peak = logits_V[token]
    if not np.isfinite(peak):
        return NON_FINITE
    params, scores_V = request.params, _penalised(logits_V, request)
    if scores_V is not logits_V:
        token = int(scores_V.argmax())
        if scores_V[token] == -np.inf:
            return ALL_BANNED
    if params.temperature > 0:
        token = _draw(scores_V, params, uniform(request.seed, request.output_len))
    return Choice(token, logprob=_logprob(logits_V, peak, token, params.logprobs))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments (Philox; Salmon et al., 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _penalised(logits_V: np.ndarray, request: Request) -> np.ndarray:
    """Logits after the repetition penalty and min_new_tokens; the same array where neither is asked for.

    Penalised ones are float64 and finite, but for those that were not: no penalty makes a token impossible.
    """
    penalty, size = request.params.repetition_penalty, len(logits_V)
    banned = [token for token in request.banned if 0 <= token < size]
    if penalty == 1.0 and not banned:
        return logits_V
    scores_V = logits_V.copy() if penalty == 1.0 else logits_V.astype(np.float64)
    if penalty != 1.0:
        seen = [token for token in set(request.tokens) if token < size]
        values, most = scores_V[seen], np.finfo(np.float64).max
        with np.errstate(over="ignore"):
            changed = np.where(values > 0, values / penalty, values * penalty)
        scores_V[seen] = np.where(values == -np.inf, values, changed.clip(-most, most))
    scores_V[banned] = -np.inf
    return scores_V


def _draw(scores_V: np.ndarray, params: ResolvedParams, chance: float) -> int:
    """Sample by inverse CDF in vocabulary order, after temperature, min_p, top_k and top_p, in that order."""
    tokens_N = None  # all
    scores_N = scores_V
    if 0 < params.top_k < len(scores_V):
        tokens_N = first_of(scores_V, params.top_k)
        scores_N = scores_V[tokens_N]
    weights_N = scores_N.astype(np.float64)
    peak = float(weights_N.max())
    with np.errstate(over="ignore"):  # what is too far below the peak to be a number is -inf
        weights_N -= peak
        weights_N /= params.temperature
    np.exp(weights_N, out=weights_N)
    if params.min_p > 0:
        weights_N[scores_N.astype(np.float64) < peak - params.temperature * below_peak(params.min_p)] = 0.0
    if params.top_p < 1.0:
        kept_N = _nucleus(scores_N, weights_N, params.top_p)
        tokens_N = kept_N if tokens_N is None else tokens_N[kept_N]
        weights_N = weights_N[kept_N]
    sums = np.add.reduceat(weights_N, np.arange(0, len(weights_N), BLOCK))
    block, rest = _reached(sums, chance * sums.sum())
    at, _ = _reached(weights_N[block * BLOCK : (block + 1) * BLOCK], rest)
    at += block * BLOCK
    return at if tokens_N is None else int(tokens_N[at])


def first_of(scores_V: np.ndarray, count: int) -> np.ndarray:
    """The ids of the `count` first in rank, rising; all where there are no more."""
    size = len(scores_V)
    if count >= size:
        return np.arange(size)
    if count == 0:
        return np.arange(0)
    last = np.partition(scores_V, size - count)[size - count]
    above = np.flatnonzero(scores_V > last)
    equal = np.flatnonzero(scores_V == last)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def below_peak(min_p: float) -> float:
    """How far below the largest logit, divided by the temperature, a token may lie that min_p keeps."""
    return -math.log(min_p * (1.0 - ROUNDING))


def _nucleus(scores_N: np.ndarray, weights_N: np.ndarray, top_p: float) -> np.ndarray:
    """Where the fewest tokens lie, the first in rank, whose weights reach top_p of all weights; rising."""
    total = weights_N.sum()
    # All tokens below this weight together have less than what top_p leaves out: only the others need
    # sorting.
    likely = np.flatnonzero(weights_N >= 0.99 * (1.0 - top_p) * total / len(weights_N))
    ranked = likely[np.argsort(-scores_N[likely], kind="stable")]
    ends = weights_N[ranked].cumsum()
    return np.sort(ranked[: int(ends.searchsorted(top_p * (1.0 - ROUNDING) * total)) + 1])


def _reached(weights_N: np.ndarray, target: float) -> tuple[int, float]:
    """The first position by which the weights sum to more than `target`, or the last of any weight; what is
    left."""
    ends_N = weights_N.cumsum()
    at = min(int(ends_N.searchsorted(target, "right")), int(np.flatnonzero(weights_N)[-1]))
    return at, target - (ends_N[at - 1] if at else 0.0)


def _logprob(logits_V: np.ndarray, peak: float, token: int, alternatives: int | None) -> TokenLogprob | None:
    if alternatives is None:
        return None
    logprobs_V = logits_V.astype(np.float64)
    with np.errstate(over="ignore"):
        logprobs_V -= peak
    logprobs_V -= math.log(np.exp(logprobs_V).sum())
    top = first_of(logits_V, alternatives)
    ranked = top[np.argsort(-logits_V[top], kind="stable")]
    pairs = zip(ranked.tolist(), logprobs_V[ranked].tolist(), strict=True)
    return TokenLogprob(token, float(logprobs_V[token]), tuple(pairs))
