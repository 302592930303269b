"""A row of logits to a token, in numpy: what `engine.sampler` does on a device, a row at a time.

A row stays in the second cache, each pass over it is one thread's vectors, and no thread is left behind that spins for
a while, as torch's do. V is the vocabulary, N the tokens that filters keep.
"""

from __future__ import annotations

import math

import numpy as np

from engine.request import UNSOUND, Choice, Request, SamplingParams, TokenLogprob

BLOCK = 256  # weights that a draw passes over at once


def choose(logits_V: np.ndarray, request: Request) -> Choice:
    """The next token of a request, by its parameters, from float32 or float64 logits, which are not modified."""
    token = int(logits_V.argmax())  # NaN counts as the largest
    peak = logits_V[token]
    if not np.isfinite(peak):
        return UNSOUND
    params, scores_V = request.params, _penalised(logits_V, request)
    if params.temperature > 0:
        token = _draw(scores_V, params, uniform(request.seed, request.output_len))
    elif scores_V is not logits_V:
        token = int(scores_V.argmax())
    return Choice(token, logprob=_logprob(logits_V, peak, token, params.logprobs))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments (Philox; Salmon et al., 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _penalised(logits_V: np.ndarray, request: Request) -> np.ndarray:
    """Logits after the repetition penalty and min_new_tokens; the same array where the request asks for neither."""
    penalty, banned = request.params.repetition_penalty, request.banned
    if penalty == 1.0 and not banned:
        return logits_V
    scores_V = logits_V.copy()
    if penalty != 1.0:
        seen = sorted(set(request.tokens))
        values = scores_V[seen]
        scores_V[seen] = np.where(values > 0, values / penalty, values * penalty)
    scores_V[sorted(banned)] = -np.inf
    return scores_V


def _draw(scores_V: np.ndarray, params: SamplingParams, chance: float) -> int:
    """Sample by inverse CDF in vocabulary order, after temperature, min_p, top_k and top_p (in that order).

    Ties with the last token that a filter keeps stay too.
    """
    size, tokens_N = len(scores_V), None  # all
    scores_N = scores_V - scores_V.max()
    with np.errstate(over="ignore"):  # what is too far below the peak to be a number is -inf
        scores_N /= max(params.temperature, float(np.finfo(scores_N.dtype).tiny))
    least = math.log(params.min_p) if params.min_p > 0 else -math.inf  # the largest score is 0
    if 0 < params.top_k < size:
        least = max(least, np.partition(scores_N, size - params.top_k)[size - params.top_k])
    if least > -math.inf:
        tokens_N = np.flatnonzero(scores_N >= least)
        scores_N = scores_N[tokens_N]
    if params.top_p < 1.0:
        kept_N = np.flatnonzero(scores_N >= _last_of(scores_N, params.top_p))
        tokens_N = kept_N if tokens_N is None else tokens_N[kept_N]
        scores_N = scores_N[kept_N]
    weights_N = np.exp(scores_N, out=scores_N)
    sums = np.add.reduceat(weights_N, np.arange(0, len(weights_N), BLOCK), dtype=np.float64)
    block, rest = _reached(sums, chance * sums.sum())
    at, _ = _reached(weights_N[block * BLOCK : (block + 1) * BLOCK], rest)
    at += block * BLOCK
    return at if tokens_N is None else int(tokens_N[at])


def _last_of(scores_N: np.ndarray, top_p: float) -> float:
    """The score of the last token that it takes, the likeliest first, for their probabilities to sum to top_p."""
    weights_N = np.exp(scores_N)
    total = weights_N.sum()
    # All tokens below this weight together have less than what top_p leaves out: only the others need sorting.
    ranked_N = np.sort(scores_N[weights_N >= 0.99 * (1.0 - top_p) * total / len(weights_N)])[::-1]
    reached = np.exp(ranked_N, dtype=np.float64).cumsum().searchsorted(top_p * total)
    return float(ranked_N[min(int(reached), len(ranked_N) - 1)])


def _reached(weights_N: np.ndarray, target: float) -> tuple[int, float]:
    """The first position by which the weights sum to more than `target`, or the last of any weight; what is left."""
    ends_N = weights_N.cumsum(dtype=np.float64)
    at = min(int(ends_N.searchsorted(target, "right")), int(np.flatnonzero(weights_N)[-1]))
    return at, target - (ends_N[at - 1] if at else 0.0)


def _logprob(logits_V: np.ndarray, peak: float, token: int, alternatives: int | None) -> TokenLogprob | None:
    if alternatives is None:
        return None
    logprobs_V = logits_V.astype(np.float64) - peak
    logprobs_V -= math.log(np.exp(logprobs_V).sum())
    count = min(alternatives, len(logprobs_V))
    top = np.argpartition(-logprobs_V, max(count - 1, 0))[:count]
    pairs = sorted(((int(at), float(logprobs_V[at])) for at in top), key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprob(token, float(logprobs_V[token]), tuple(pairs))
