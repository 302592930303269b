"""The oracle: `model.generate`, greedily, one prompt at a time; and the one way an answer may differ from
it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.models import LoadedModel
from engine.request import RequestOutput

# Logits closer than this are a tie that rounding may break either way (they differ by 1e-6 and 1e-14 as
# computed).
TIE = {torch.float32: 1e-4, torch.float64: 1e-10, torch.float16: 3e-2}


class Oracle:
    """A model and what it answers without any batching."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self._answers: dict[tuple, tuple[int, ...]] = {}

    def answer(self, prompt: Sequence[int], new_tokens: int, eos: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The output tokens of `model.generate` for this prompt alone."""
        key = (tuple(prompt), new_tokens, eos)
        if key not in self._answers:
            ids = torch.tensor([list(prompt)], device=self.model.device)
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=list(eos) or None,
                pad_token_id=0,
            )
            self._answers[key] = tuple(output[0, len(prompt) :].tolist())
        return self._answers[key]

    def check(self, output: RequestOutput, new_tokens: int, eos: tuple[int, ...] = ()) -> None:
        """Assert that the tokens are the oracle's, or part from them at a tie of the oracle's own top two
        logits."""
        expected = self.answer(output.prompt_token_ids, new_tokens, eos)
        if output.token_ids == expected:
            return
        at = next(
            (i for i, (a, b) in enumerate(zip(output.token_ids, expected, strict=False)) if a != b),
            min(len(output.token_ids), len(expected)),
        )
        assert at < min(len(output.token_ids), len(expected)), (output.token_ids, expected)
        ids = torch.tensor([[*output.prompt_token_ids, *expected[:at]]], device=self.model.device)
        with torch.inference_mode():
            logits = self.model(ids).logits[0, -1].double()
        gap = float(logits[expected[at]] - logits[output.token_ids[at]])
        assert abs(gap) < TIE[self.model.dtype], (
            f"token {at}: {output.token_ids[at]} for {expected[at]}, gap {gap}"
        )
