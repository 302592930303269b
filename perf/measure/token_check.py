"""Correct before fast: a check that tokens are those that the unmodified model itself would have chosen.

One forward pass over prompt and output gives the model's own choice at every position, given the tokens
before it. So an answer is checked to its end even after a near-tie went the other way, and without generating
it a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine import LoadedModel

# How far below the model's best logit a chosen one may lie and still be its equal but for rounding, relative
# to the largest logit: other orders of summation move logits by about this much in each dtype.
TIE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class WrongTokens(AssertionError):
    """A backend gave tokens that the model would not have chosen: its speed is of no interest."""


@dataclass(frozen=True)
class Judgement:
    """Verdict on one answer: tokens that are near-ties, which rounding broke the other way; the first wrong
    one, and how far its logit lies below the best."""

    ties: int
    wrong_at: int | None = None
    gap: float = 0.0

    @property
    def same(self) -> bool:
        """Return whether every token is the model's own choice, so that `model.generate` gives the same."""
        return self.wrong_at is None and not self.ties


class Reference:
    """The model as Transformers runs it, one request at a time; it remembers what it has judged."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], Judgement] = {}

    def judge(self, prompt: Sequence[int], output: Sequence[int]) -> Judgement:
        """Judge one greedy answer that ignored EOS."""
        key = tuple(prompt), tuple(output)
        if key not in self._known:
            self._known[key] = self._judge(*key)
        return self._known[key]

    @torch.inference_mode()
    def _judge(self, prompt: tuple[int, ...], output: tuple[int, ...]) -> Judgement:
        model = self.loaded.model
        ids = torch.tensor([[*prompt, *output[:-1]]], device=model.device)
        logits_NV = model(ids, use_cache=False, logits_to_keep=len(output)).logits[0, -len(output) :]
        logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        chosen_N = torch.tensor(output, device=model.device)
        best_N, own_N = logits_NV.max(-1)
        gap_N = best_N - logits_NV.gather(-1, chosen_N[:, None])[:, 0]
        wrong_N = ~(gap_N <= TIE[model.dtype] * logits_NV.abs().amax(-1))  # NaN is wrong
        ties = int(((own_N != chosen_N) & ~wrong_N).sum())
        if not wrong_N.any():
            return Judgement(ties)
        at = int(wrong_N.int().argmax())
        return Judgement(ties, at, float(gap_N[at]))
