"""Logits to tokens, on the logits' device, each row by its own request's parameters.

On a CPU a row at a time (`engine.cpu.choose`), on a device all rows at once.

R rows (requests), V vocabulary. A row's token depends on that row and its request alone: its draw is a counter-based
random number keyed by (seed, output position), so neither batch-mates nor preemption can change it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from engine.cpu.choose import choose, uniform
from engine.request import UNSOUND, Choice, Request, TokenLogprob


def sample(logits_RV: torch.Tensor, requests: Sequence[Request]) -> list[Choice]:
    """Choose the next token of each request.

    Args:
        logits_RV: the model's logits at each request's last token, any float dtype, [R, V]. Not modified.
        requests: the R requests, in row order.

    Returns:
        One choice a row. A row with a NaN, or whose largest logit is infinite, gets an error and no token; its
        neighbours are not affected.
    """
    if logits_RV.device.type != "cpu":
        return sample_together(logits_RV, requests)
    if logits_RV.dtype in (torch.float16, torch.bfloat16):
        logits_RV = logits_RV.float()
    return [choose(logits_V, request) for logits_V, request in zip(logits_RV.numpy(), requests, strict=True)]


def sample_together(logits_RV: torch.Tensor, requests: Sequence[Request]) -> list[Choice]:
    """As `sample`, with one transfer to the host, and one for each that wants logprobs."""
    scores_RV = _penalised(logits_RV, requests)
    peak_R, tokens_R = scores_RV.max(-1)
    if scores_RV is not logits_RV:
        peak_R = logits_RV.amax(-1)  # NaN counts as the largest, so the peak tells whether a row is sound
    draws = [row for row, request in enumerate(requests) if request.params.temperature > 0]
    if draws:
        rows = torch.tensor(draws, device=logits_RV.device)
        tokens_R[rows] = _draw(scores_RV[rows], [requests[row] for row in draws])
    tokens, sound = torch.stack([tokens_R, torch.isfinite(peak_R).long()]).tolist()
    return [
        Choice(token, logprob=_logprob(logits_RV[row], token, requests[row].params.logprobs)) if sound[row] else UNSOUND
        for row, token in enumerate(tokens)
    ]


def _penalised(logits_RV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Logits after min_new_tokens and the repetition penalty; the same tensor where no request asks for either."""
    scores_RV = logits_RV
    for row, request in enumerate(requests):
        penalty, banned = request.params.repetition_penalty, request.banned
        if (penalty != 1.0 or banned) and scores_RV is logits_RV:
            scores_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32), copy=True)
        if penalty != 1.0:
            seen = torch.tensor(sorted(set(request.tokens)), device=scores_RV.device)
            values = scores_RV[row, seen]
            scores_RV[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
        if banned:
            scores_RV[row, torch.tensor(sorted(banned), device=scores_RV.device)] = -torch.inf
    return scores_RV


def _draw(scores_RV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Sample by inverse CDF in vocabulary order, after temperature, min_p, top_k and top_p (in that order).

    Filters only decide which tokens stay (ties with the last one stay too); the draw itself always runs over the
    whole vocabulary in its own order, so a row gives the same token whichever filters its neighbours use.
    """
    device, params = scores_RV.device, [request.params for request in requests]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)

    scores_RV = scores_RV.double()
    scores_RV = (scores_RV - scores_RV.amax(-1, keepdim=True)) / column([p.temperature for p in params])
    for scores_V, p in zip(scores_RV, params, strict=True):
        if p.min_p > 0:  # the largest score is 0
            scores_V[scores_V < math.log(p.min_p)] = -torch.inf
        if 0 < p.top_k < len(scores_V):
            scores_V[scores_V < scores_V.topk(p.top_k).values[-1]] = -torch.inf
        if p.top_p < 1.0:
            ranked_V = scores_V.sort(descending=True).values
            before_V = ranked_V.softmax(-1).cumsum(-1).roll(1)
            before_V[0] = 0.0
            scores_V[scores_V < ranked_V[before_V < p.top_p].amin()] = -torch.inf
    cdf_RV = scores_RV.softmax(-1).cumsum(-1)
    uniform_R1 = column([uniform(request.seed, request.output_len) for request in requests])
    tokens_R1 = torch.searchsorted(cdf_RV, uniform_R1 * cdf_RV[:, -1:], right=True)
    return tokens_R1.squeeze(1).clamp_(max=scores_RV.shape[1] - 1)


def _logprob(logits_V: torch.Tensor, token: int, alternatives: int | None) -> TokenLogprob | None:
    if alternatives is None:
        return None
    logprobs_V = logits_V.double().log_softmax(-1)
    top = logprobs_V.topk(min(alternatives, len(logprobs_V)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprob(token, float(logprobs_V[token]), tuple(pairs))
