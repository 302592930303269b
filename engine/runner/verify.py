"""The proof at load: whatever computes a model's steps must give the model's own logits, or is not used.

One text is compared whole, in chunks with and without a past, and token by token. Its positions come from the
model's whole range (a position id may be any number), so that what begins late shows: a temperature by
position, a table of angles that ends. What a mask does far away is asked of the mask itself, in
`engine.models.attention_trace`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import torch
from transformers import PreTrainedModel

from engine.backends import Backend
from engine.errors import InputError
from engine.models import telling_positions
from engine.models.errors import refused
from engine.step import Batch, Span

# How far logits may lie from the model's own, relative to the largest: rounding, no more. In int8 those of
# the median token, since rounding may flip a single one.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 2e-1,
    torch.int8: 1.5e-1,
}
# Of each request that shares the steps: where its text is cut, from its end if negative, besides before its
# last token. One's first chunk is short; the first step together has more tokens than any backend treats
# otherwise for being few, and the last is one token alone.
CUTS = ((8, 15, -2), (15, 16), ())


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
    return [(7 * i * i + 31 * i + 3) % len(embedding.weight) for i in range(count)]


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


@torch.inference_mode()
def prove(
    model: PreTrainedModel,
    known: Probe,
    backend: Backend,
    page_size: int,
    dtype: torch.dtype | None = None,
    bitwise: bool = False,
) -> None:
    """Compute a probe's text on a backend, and raise InputError unless its logits are the model's own.

    Args:
        dtype: in which it rounds; the model's own if None.
        bitwise: the logits must not depend on how the text was cut and on what shared a step, to the last
            bit.
    """
    tables = _tables(len(CUTS), -(-len(known.tokens) // page_size))
    found_RTV = known.expected_TV.repeat(len(CUTS), 1, 1)
    with refused(model):
        backend.allocate_kv(sum(map(len, tables)))
        for batch, places in _batches(known, tables):
            found_RTV[tuple(torch.tensor(places).T)] = backend.logits(batch).double()
    check_equal(model, "when packed", found_RTV, known.expected_TV, dtype)
    if bitwise and not torch.equal(found_RTV[:, 1:], found_RTV[:1, 1:].expand_as(found_RTV[:, 1:])):
        raise InputError(f"{type(model).__name__} gives a token different logits in a different batch")


def _tables(requests: int, pages: int) -> list[list[int]]:
    """Return pages of each request; those of one lie apart, in falling order."""
    return [list(range(request, requests * pages, requests))[::-1] for request in range(requests)]


def _batches(known: Probe, tables: list[list[int]]) -> Iterator[tuple[Batch, list[tuple[int, int]]]]:
    """Yield the batches of requests for one text that is cut in different places, and (request, place in the
    text) of each wanted token.

    The first token of all is not wanted: leaving out is part of what is proven.
    """
    count = len(known.tokens)
    cuts_R = [{cut % count for cut in cuts if -count < cut < count} for cuts in CUTS]
    chunks = [pairwise(sorted({0, *cuts, count - 1, count})) for cuts in cuts_R]
    for step in zip_longest(*chunks):
        spans: list[Span] = []
        places: list[tuple[int, int]] = []
        for request, chunk in enumerate(step):
            if chunk is not None:
                begin = len(places)
                places += [(request, at) for at in range(*chunk)]
                spans.append(Span(begin, len(places), chunk[0], tables[request], request))
        tokens, position_ids = (
            [numbers[at] for _, at in places] for numbers in (known.tokens, known.position_ids)
        )
        skipped = int(len(places) > 1 and places[0] == (0, 0))
        wanted = list(range(skipped, len(places)))
        yield Batch(tokens, spans, wanted, position_ids=position_ids), places[skipped:]


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
