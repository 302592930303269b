"""Steps that give a token the same bits in any company: the model is called with as many tokens every time.

How a library multiplies, adds up or vectorises depends on the shapes it is given, and on where in them a
number lies. So no kind of layer is treated apart: a step is cut into passes of one size, filled up with
tokens of nobody, and every operation of the model sees the same shapes whoever runs. Two things are left, and
found out at load: a model that does other things for other tokens (experts), and operations in which a row's
place shows. Such a model is called with one token at a time, where there is no company.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from transformers import PreTrainedModel

from engine.backends.transformers.model import TransformersModel
from engine.backends.transformers.paged_attention import PackedStep
from engine.errors import InputError
from engine.runner.verify import CUTS, Cuts
from engine.step import Span

LOG = logging.getLogger(__name__)
PASS = 16  # tokens of a pass, where that gives the same bits
ALONE: Cuts = ((5, 22),)  # where the proof cuts a request by itself, after the two that share steps
GROUPED = "grouped_mm"  # products whose sizes are data: the shapes they are called with do not tell

DEPENDS = "deterministic=True: {model} gives a token other logits in other company: leave it out"

Prove = Callable[[TransformersModel, Cuts], torch.Tensor]


class DeterministicModel(TransformersModel):
    """A model that computes exactly `size` tokens at a time, each with attention of its own."""

    def __init__(self, model: PreTrainedModel, page_size: int, size: int) -> None:
        super().__init__(model, page_size)
        self._size, self._nobody = size, [0]

    def allocate_kv(self, pages: int) -> None:
        """Make room for the keys and values of so many pages, and for those of nobody."""
        super().allocate_kv(pages)
        self._nobody = [pages]

    def logits(
        self, tokens: list[int], spans: list[Span], rows: list[int], position_ids: list[int] | None = None
    ) -> torch.Tensor:
        """Logits [R, V] of the tokens at `rows`, rising, of a step of these spans; `position_ids` as
        elsewhere."""
        found = []
        for begin, ids, parts in self._passes(tokens, spans):
            wanted = [row - begin for row in rows if begin <= row < begin + self._size]
            step = PackedStep(self.stores, parts, one_by_one=True)
            every = list(range(self._size)) if wanted else [0]  # the output layer has one size, or no reader
            told = None
            if position_ids is not None:
                told = position_ids[begin : begin + self._size]
                told += [0] * (self._size - len(told))
            found.append(self.compute(step, ids, every, told)[wanted])
        return torch.cat(found)

    def calls(self, tokens: list[int], spans: list[Span]) -> list[list[Any]]:
        """What each pass of a step calls, and the shapes of what that gives; all but attention, our own."""
        found = []
        for _, ids, parts in self._passes(tokens, spans):
            with _Calls() as calls:
                self.compute(_Unwatched(self.stores, parts, calls), ids, list(range(self._size)))
            found.append(calls.made)
        return found

    def _passes(self, tokens: list[int], spans: list[Span]) -> Iterator[tuple[int, list[int], list[Span]]]:
        """Where in the step each pass begins, its token ids and its spans, filled up."""
        for begin in range(0, len(tokens), self._size):
            end = min(begin + self._size, len(tokens))
            parts = [_cut(span, begin, end) for span in spans if span.begin < end and span.end > begin]
            parts += [Span(at, at + 1, 0, self._nobody) for at in range(end - begin, self._size)]
            yield begin, tokens[begin:end] + [0] * (begin + self._size - end), parts


def deterministic_model(model: PreTrainedModel, page_size: int, prove: Prove) -> DeterministicModel:
    """A model whose logits do not depend on company, to the last bit.

    Args:
        prove: gives the logits [R, T, V] of a text in R requests that are cut as told, once they are the
            model's own; of each request's first token they need not be the packed model's.

    Raises:
        InputError: for a model whose bits depend on company even so.
    """
    packed = DeterministicModel(model, page_size, PASS)
    problem = _problem(packed, prove) or _variety(packed, model)
    if problem is not None:
        LOG.warning("%s %s: deterministic steps take one token at a time", type(model).__name__, problem)
        packed = DeterministicModel(model, page_size, 1)
        problem = _problem(packed, prove)
    if problem is not None:
        raise InputError(DEPENDS.format(model=type(model).__name__))
    return packed


def _problem(packed: DeterministicModel, prove: Prove) -> str | None:
    """What is wrong with logits of the same text in several companies, if anything is."""
    found_RTV = torch.cat([prove(packed, cuts) for cuts in (CUTS, ALONE)])[:, 1:]
    same = (found_RTV == found_RTV[:1]).all()
    return None if same else "gives a token other logits in other company"


def _variety(packed: DeterministicModel, model: PreTrainedModel) -> str | None:
    """What the model does otherwise for some tokens than for others, if anything."""
    embedding: Any = model.get_input_embeddings()
    tokens = [(31 * i + i * i) % len(embedding.weight) for i in range(3 * PASS)]
    packed.allocate_kv(1)
    first, *others = packed.calls(tokens, [Span(at, at + 1, 0, [0]) for at in range(len(tokens))])
    grouped = next((name for name, _ in first if GROUPED in name), None)
    if grouped is not None:
        return f"calls {grouped}, whose products have the sizes of groups of tokens"
    for calls in others:
        pairs = zip(first, calls, strict=False)
        differs = next((one for one, other in pairs if one != other), None)
        if differs is not None or len(calls) != len(first):
            name = "more" if differs is None else differs[0]
            return f"calls {name} for some tokens and not, or with other shapes, for others"
    return None


class _Calls(TorchFunctionMode):
    """Notes down the functions of tensors that are called, and the shapes of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, list[torch.Size]]] = []
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.paused:
            given = result if isinstance(result, tuple | list) else [result]
            shapes = [item.shape for item in given if isinstance(item, torch.Tensor)]
            self.made.append((str(resolve_name(func) or getattr(func, "__name__", func)), shapes))
        return result


class _Unwatched(PackedStep):
    """A step whose attention is not noted down."""

    def __init__(self, stores: list[Any], spans: list[Span], calls: _Calls) -> None:
        calls.paused = True
        super().__init__(stores, spans, one_by_one=True)
        calls.paused, self._calls = False, calls

    def attend(self, *args: Any) -> torch.Tensor:
        self._calls.paused = True
        try:
            return super().attend(*args)
        finally:
            self._calls.paused = False


def _cut(span: Span, begin: int, end: int) -> Span:
    """The part of a span from token `begin` of the step to before `end`, counted from there."""
    first, last = max(span.begin, begin), min(span.end, end)
    return Span(first - begin, last - begin, span.computed + first - span.begin, span.pages)
