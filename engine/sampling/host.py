"""The `rules` in numpy, a row at a time. V is the vocabulary, N the tokens that filters keep.

A row stays in the second cache, each pass over it is one thread's vectors, and no thread is left behind that
spins for a while, as torch's do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from engine.request import Request, ResolvedParams
from engine.sampling import rules
from engine.step import ALL_BANNED, NON_FINITE, Choice, TokenLogprob

BLOCK = 256  # weights that a draw passes over at once


def sample_each(logits_RV: np.ndarray, requests: Sequence[Request]) -> list[Choice]:
    """Choose the next token of each request from float32 or float64 logits [R, V], which are not modified."""
    choices = []
    for logits_V, request in zip(logits_RV, requests, strict=True):
        try:
            choices.append(_choose(logits_V, request))
        except Exception as error:  # this request's own, whatever shares its step
            choices.append(Choice(None, error=repr(error)))
    return choices


def _choose(logits_V: np.ndarray, request: Request) -> Choice:
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
        token = _draw(scores_V, params, rules.uniform(request.seed, request.output_len))
    return Choice(token, logprob=_logprob(logits_V, peak, token, params.logprobs))


def _penalised(logits_V: np.ndarray, request: Request) -> np.ndarray:
    """Return the logits after penalty and bans: the same array where neither is asked for."""
    penalty, banned = request.params.repetition_penalty, rules.known(request.banned, len(logits_V))
    if penalty == 1.0 and not banned:
        return logits_V
    scores_V = logits_V.astype(logits_V.dtype if penalty == 1.0 else np.float64)  # a copy
    if penalty != 1.0:
        seen = rules.known(request.tokens, len(logits_V))
        with np.errstate(over="ignore"):
            scores_V[seen] = rules.penalised(scores_V[seen], penalty, np.where)
    scores_V[banned] = -np.inf
    return scores_V


def _draw(scores_V: np.ndarray, params: ResolvedParams, chance: float) -> int:
    """Draw a token. top_k goes before min_p, for speed: together they keep the same in either order."""
    tokens_N = None  # all
    scores_N = scores_V
    if 0 < params.top_k < len(scores_V):
        tokens_N = _first_of(scores_V, params.top_k)
        scores_N = scores_V[tokens_N]
    weights_N = scores_N.astype(np.float64)
    peak = float(weights_N.max())
    with np.errstate(over="ignore"):  # what is too far below the peak to be a number is -inf
        weights_N -= peak
        weights_N /= params.temperature
    np.exp(weights_N, out=weights_N)
    if params.min_p > 0:
        lowest = peak - params.temperature * rules.below_peak(params.min_p)
        weights_N[scores_N.astype(np.float64) < lowest] = 0.0
    if params.top_p < 1.0:
        kept_N = _nucleus(scores_N, weights_N, params.top_p)
        tokens_N = kept_N if tokens_N is None else tokens_N[kept_N]
        weights_N = weights_N[kept_N]
    sums = np.add.reduceat(weights_N, np.arange(0, len(weights_N), BLOCK))
    block, rest = _reached(sums, chance * sums.sum())
    at, _ = _reached(weights_N[block * BLOCK : (block + 1) * BLOCK], rest)
    at += block * BLOCK
    return at if tokens_N is None else int(tokens_N[at])


def _first_of(scores_V: np.ndarray, count: int) -> np.ndarray:
    """Return the ids of the `count` first in rank, rising; all where there are no more."""
    size = len(scores_V)
    if not 0 < count < size:
        return np.arange(min(count, size))
    last = np.partition(scores_V, size - count)[size - count]
    above = np.flatnonzero(scores_V > last)
    equal = np.flatnonzero(scores_V == last)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _nucleus(scores_N: np.ndarray, weights_N: np.ndarray, top_p: float) -> np.ndarray:
    """Return the positions of the tokens that top_p keeps, rising."""
    total = weights_N.sum()
    # Those below this weight have together less than what top_p leaves out: only the others need sorting.
    likely = np.flatnonzero(weights_N >= 0.99 * (1.0 - top_p) * total / len(weights_N))
    ranked = likely[np.argsort(-scores_N[likely], kind="stable")]
    ends = weights_N[ranked].cumsum()
    return np.sort(ranked[: int(ends.searchsorted(top_p * (1.0 - rules.ROUNDING) * total)) + 1])


def _reached(weights_N: np.ndarray, target: float) -> tuple[int, float]:
    """Return the first place where weights sum to more than `target`, or the last of any; and the rest."""
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
    top = _first_of(logits_V, alternatives)
    ranked = top[np.argsort(-logits_V[top], kind="stable")]
    pairs = zip(ranked.tolist(), logprobs_V[ranked].tolist(), strict=True)
    return TokenLogprob(token, float(logprobs_V[token]), tuple(pairs))
