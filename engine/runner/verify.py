"""The proof at load: whatever computes a model's steps must give the model's own logits, or is not used.

One text is compared whole, in chunks with and without a past, and token by token. Its positions come from the
model's whole range (a position id may be any number), so that what begins late shows: a temperature by
position, a table of angles that ends. What a mask does far away is asked of the mask itself, in
`engine.models.attention_trace`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import torch
from transformers import PreTrainedModel

from engine.errors import InputError
from engine.models import telling_positions
from engine.models.errors import refused
from engine.step import Span

# How far logits may lie from the model's own, relative to the largest: rounding, no more. In int8 at most
# tokens: rounding may turn one of them over.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 2e-1,
    torch.int8: 1.5e-1,
}
Cuts = Sequence[
    tuple[int, ...]
]  # of each request that shares the steps: where its text is cut, besides before its last
CUTS: Cuts = ((8, 15), (15, 16))  # one's first chunk is short


@dataclass(frozen=True)
class Probe:
    """A text of T tokens at rising positions, and the model's own logits at each of them, [T, V] in
    float64."""

    tokens: list[int]
    position_ids: list[int]
    expected_TV: torch.Tensor


def proof_text(model: PreTrainedModel, count: int) -> list[int]:
    """So many token ids, hardly any of them twice."""
    embedding: Any = model.get_input_embeddings()
    return [(7 * i + 3) % len(embedding.weight) for i in range(count)]


@torch.inference_mode()
def probe(model: PreTrainedModel, capacity: int) -> Probe:
    """The model's own answers, for requests of `capacity` positions at most."""
    position_ids = telling_positions(model.config, capacity)
    tokens = proof_text(model, len(position_ids))
    ids, at = (torch.tensor([numbers], device=model.device) for numbers in (tokens, position_ids))
    # The mask says that this is one text, though its positions rise by leaps.
    with refused(model, "compute a text"):
        logits_1TV = model(ids, position_ids=at, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return Probe(tokens, position_ids, check_finite(model, logits_1TV[0]))


def probe_pages(probe: Probe, cuts: Cuts, page_size: int) -> int:
    """How many pages `probe_logits` needs."""
    return len(cuts) * -(-len(probe.tokens) // page_size)


def probe_logits(
    probe: Probe, cuts: Cuts, page_size: int, logits: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Logits [R, T, V] of R requests for the text of a probe, cut in different places.

    Those of the first token are not asked for, but taken as expected: leaving out is part of it.

    Args:
        logits: (tokens, spans, rows, position_ids) -> [R, V], as a packed model computes them.
    """
    count = len(probe.tokens)
    pages, found_RTV = -(-count // page_size), probe.expected_TV.repeat(len(cuts), 1, 1)
    chunks = [pairwise(sorted({0, *(cut for cut in some if cut < count), count - 1, count})) for some in cuts]
    for step in zip_longest(*chunks):
        spans: list[Span] = []
        asked: list[tuple[int, int]] = []  # request and place of each token
        for request, chunk in enumerate(step):
            if chunk is not None:
                table = list(range(request * pages, (request + 1) * pages))
                spans.append(Span(len(asked), len(asked) + chunk[1] - chunk[0], chunk[0], table))
                asked += [(request, at) for at in range(*chunk)]
        tokens, position_ids = (
            [numbers[at] for _, at in asked] for numbers in (probe.tokens, probe.position_ids)
        )
        skipped = int(len(asked) > 1 and asked[0] == (0, 0))
        logits_TV = logits(tokens, spans, list(range(skipped, len(tokens))), position_ids)
        found_RTV[tuple(torch.tensor(asked[skipped:]).T)] = logits_TV.double()
    return found_RTV


def check_finite(model: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    """Give the model's own logits back in float64; raise InputError where they are no numbers."""
    if not bool(logits.isfinite().all()):
        raise InputError(
            f"{type(model).__name__} gives logits that are NaN or infinite: its weights are broken, or "
            f"too large for {str(model.dtype).removeprefix('torch.')}"
        )
    return logits.double()


def check_equal(
    model: PreTrainedModel,
    where: str,
    found: torch.Tensor,
    expected: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise InputError unless logits found `where` are those expected, but for rounding in a dtype, the
    model's own."""
    off_T = (found.double() - expected).abs().amax(-1)
    off = float((off_T.median() if dtype is torch.int8 else off_T.max()) / expected.abs().max())
    if not off <= TOLERANCE[dtype or model.dtype]:
        raise InputError(
            f"{type(model).__name__} gives other logits {where} (off by {off:.1e} of the largest)"
        )
