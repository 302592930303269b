"""The `rules` in torch, all rows at once, wherever the logits are. R rows (requests), V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.request import Request, ResolvedParams
from engine.sampling import rules
from engine.step import ALL_BANNED, NON_FINITE, Choice, TokenLogprob


def sample_together(logits_RV: torch.Tensor, requests: Sequence[Request]) -> list[Choice]:
    """Choose the next token of each request from logits [R, V], which are not modified.

    One transfer to the host, and one for each that wants logprobs.
    """
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
    for logits_V, request, (token, finite, possible) in zip(logits_RV, requests, found, strict=True):
        if finite and possible:
            choices.append(Choice(token, logprob=_logprob(logits_V, token, request.params.logprobs)))
        else:
            choices.append(ALL_BANNED if finite else NON_FINITE)
    return choices


def _penalised(logits_RV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Return the logits after penalties and bans: the same tensor where neither is asked for."""
    scores_RV, size = logits_RV, logits_RV.shape[1]
    if any(request.params.repetition_penalty != 1.0 for request in requests):
        scores_RV = logits_RV.to(torch.float64, copy=True)
    for row, request in enumerate(requests):
        penalty = request.params.repetition_penalty
        if penalty != 1.0:
            seen = torch.tensor(rules.known(request.tokens, size), dtype=torch.long, device=scores_RV.device)
            scores_RV[row, seen] = rules.penalised(scores_RV[row, seen], penalty, torch.where)
        banned = rules.known(request.banned, size)
        if banned:
            scores_RV = scores_RV.clone() if scores_RV is logits_RV else scores_RV
            scores_RV[row, torch.tensor(banned, device=scores_RV.device)] = -torch.inf
    return scores_RV


def _draw(scores_RV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Draw a token a row [R], always over the whole vocabulary, so that no row's filters change another's."""
    numbers = [
        (p.temperature, p.temperature * rules.below_peak(p.min_p), rules.uniform(r.seed, r.output_len))
        for r, p in ((request, request.params) for request in requests)
    ]
    numbers_R13 = torch.tensor(numbers, dtype=torch.float64, device=scores_RV.device).unsqueeze(1)
    temperature_R1, below_R1, uniform_R1 = numbers_R13.unbind(-1)
    scores_RV = scores_RV.double()
    peak_R1 = scores_RV.amax(-1, keepdim=True)
    weights_RV = ((scores_RV - peak_R1) / temperature_R1).exp()
    if any(request.params.min_p > 0 for request in requests):
        weights_RV[scores_RV < peak_R1 - below_R1] = 0.0
    for scores_V, weights_V, request in zip(scores_RV, weights_RV, requests, strict=True):
        _keep_first(scores_V, weights_V, request.params)
    cdf_RV = weights_RV.cumsum(-1)
    all_R1 = cdf_RV[:, -1:]
    tokens_R = torch.searchsorted(cdf_RV, uniform_R1 * all_R1, right=True).squeeze(1)
    return tokens_R.minimum((cdf_RV < all_R1).sum(-1))  # rounding may not reach beyond the last of any weight


def _keep_first(scores_V: torch.Tensor, weights_V: torch.Tensor, params: ResolvedParams) -> None:
    """Set the weights to 0 of all but the tokens that top_k and top_p keep."""
    top_k = params.top_k or len(scores_V)
    if top_k >= len(scores_V) and params.top_p == 1.0:
        return
    order_V = scores_V.sort(descending=True, stable=True).indices
    ranked_V = weights_V[order_V]
    ranked_V[top_k:] = 0.0
    if params.top_p < 1.0:
        ends_V = ranked_V.cumsum(-1)
        ranked_V[1:][ends_V[:-1] >= params.top_p * (1.0 - rules.ROUNDING) * ends_V[-1]] = 0.0
    weights_V[order_V] = ranked_V


def _logprob(logits_V: torch.Tensor, token: int, alternatives: int | None) -> TokenLogprob | None:
    if alternatives is None:
        return None
    logprobs_V = logits_V.double().log_softmax(-1)
    top = logits_V.sort(descending=True, stable=True).indices[:alternatives]
    pairs = zip(top.tolist(), logprobs_V[top].tolist(), strict=True)
    return TokenLogprob(token, float(logprobs_V[token]), tuple(pairs))
