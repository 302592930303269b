"""Logits to tokens, on the logits' device, each row by its own request's parameters.

On a CPU a row at a time (`engine.sampling.host`), on a device all rows at once; either gives the same tokens.

R rows (requests), V vocabulary. A row's token depends on that row and its request alone: its draw is a
counter-based random number keyed by (seed, output position), so neither batch-mates nor preemption can change
it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.request import Request, ResolvedParams
from engine.sampling.host import ROUNDING, below_peak, choose, uniform
from engine.step import ALL_BANNED, NON_FINITE, Choice, TokenLogprob


def sample(logits_RV: torch.Tensor, requests: Sequence[Request]) -> list[Choice]:
    """Choose the next token of each request.

    Args:
        logits_RV: the model's logits at each request's last token, any float dtype, [R, V]. Not modified.
        requests: the R requests, in row order.

    Returns:
        One choice a row. A row with a NaN, or whose largest logit is infinite, gets an error and no token,
        and so does (on a CPU) one that cannot be drawn from; its neighbours are not affected.
    """
    if logits_RV.device.type != "cpu":
        return sample_together(logits_RV, requests)
    if logits_RV.dtype in (torch.float16, torch.bfloat16):
        logits_RV = logits_RV.float()
    return [_chosen(logits_V, request) for logits_V, request in zip(logits_RV.numpy(), requests, strict=True)]


def _chosen(logits_V: np.ndarray, request: Request) -> Choice:
    """The row's choice; what raises is this request's own, whatever shares its step."""
    try:
        return choose(logits_V, request)
    except Exception as error:
        return Choice(None, error=repr(error))


def sample_together(logits_RV: torch.Tensor, requests: Sequence[Request]) -> list[Choice]:
    """As `sample`, with one transfer to the host, and one for each that wants logprobs."""
    scores_RV = _penalised(logits_RV, requests)
    peak_R, tokens_R = scores_RV.max(-1)  # the first of equals
    possible_R = peak_R > -torch.inf
    if scores_RV is not logits_RV:
        peak_R = logits_RV.amax(-1)  # NaN counts as the largest, so the peak tells whether a row is finite
    draws = [row for row, request in enumerate(requests) if request.params.temperature > 0]
    if draws:
        rows = torch.tensor(draws, device=logits_RV.device)
        tokens_R[rows] = _draw(scores_RV[rows], [requests[row] for row in draws])
    found = torch.stack([tokens_R, torch.isfinite(peak_R).long(), possible_R.long()], 1).tolist()
    choices = []
    for row, (token, finite, possible) in enumerate(found):
        if not finite or not possible:
            choices.append(ALL_BANNED if finite else NON_FINITE)
            continue
        choices.append(Choice(token, logprob=_logprob(logits_RV[row], token, requests[row].params.logprobs)))
    return choices


def _penalised(logits_RV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Logits after the repetition penalty and min_new_tokens; the same tensor where neither is asked for.

    Those that are penalised stay finite: no penalty makes a token impossible.
    """
    scores_RV, size = logits_RV, logits_RV.shape[1]
    if any(request.params.repetition_penalty != 1.0 for request in requests):
        scores_RV = logits_RV.to(torch.float64, copy=True)
    for row, request in enumerate(requests):
        penalty = request.params.repetition_penalty
        if penalty != 1.0:
            tokens = [token for token in set(request.tokens) if token < size]
            seen = torch.tensor(tokens, dtype=torch.long, device=scores_RV.device)
            values, most = scores_RV[row, seen], torch.finfo(torch.float64).max
            changed = torch.where(values > 0, values / penalty, values * penalty).clamp(-most, most)
            scores_RV[row, seen] = torch.where(values == -torch.inf, values, changed)
        banned = [token for token in request.banned if 0 <= token < size]
        if banned:
            scores_RV = scores_RV.clone() if scores_RV is logits_RV else scores_RV
            scores_RV[row, torch.tensor(banned, device=scores_RV.device)] = -torch.inf
    return scores_RV


def _draw(scores_RV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Sample by inverse CDF in vocabulary order, after temperature, min_p, top_k and top_p, in that order.

    Filters only decide which tokens stay; the draw itself always runs over the whole vocabulary in its own
    order, so a row gives the same token whichever filters its neighbours use.
    """
    device, params = scores_RV.device, [request.params for request in requests]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)

    scores_RV = scores_RV.double()
    peak_R1 = scores_RV.amax(-1, keepdim=True)
    weights_RV = ((scores_RV - peak_R1) / column([p.temperature for p in params])).exp()
    for scores_V, weights_V, peak_1, p in zip(scores_RV, weights_RV, peak_R1, params, strict=True):
        if p.min_p > 0:
            weights_V[scores_V < peak_1 - p.temperature * below_peak(p.min_p)] = 0.0
        _filter(scores_V, weights_V, p)
    cdf_RV = weights_RV.cumsum(-1)
    all_R1 = cdf_RV[:, -1:]
    uniform_R1 = column([uniform(request.seed, request.output_len) for request in requests])
    tokens_R = torch.searchsorted(cdf_RV, uniform_R1 * all_R1, right=True).squeeze(1)
    return tokens_R.minimum((cdf_RV < all_R1).sum(-1))  # rounding may not reach beyond the last of any weight


def _filter(scores_V: torch.Tensor, weights_V: torch.Tensor, params: ResolvedParams) -> None:
    """Set the weights to 0 of all but the tokens, first in rank, that top_k and top_p keep."""
    size = len(scores_V)
    top_k = min(params.top_k or size, size)
    if top_k == size and params.top_p == 1.0:
        return
    order_V = scores_V.sort(descending=True, stable=True).indices  # among equals the lower id first
    ranked_V = weights_V[order_V]
    ranked_V[top_k:] = 0.0
    if params.top_p < 1.0:
        ends_V = ranked_V.cumsum(-1)
        ranked_V[1:][ends_V[:-1] >= params.top_p * (1.0 - ROUNDING) * ends_V[-1]] = 0.0
    weights_V[order_V] = ranked_V


def _logprob(logits_V: torch.Tensor, token: int, alternatives: int | None) -> TokenLogprob | None:
    if alternatives is None:
        return None
    logprobs_V = logits_V.double().log_softmax(-1)
    top = logits_V.sort(descending=True, stable=True).indices[:alternatives]
    pairs = zip(top.tolist(), logprobs_V[top].tolist(), strict=True)
    return TokenLogprob(token, float(logprobs_V[token]), tuple(pairs))
