"""The packed runner: every token of a step in one row, no padding to lengths, keys and values in pages.

Any mix of prompts, parts of prompts and decodes is one pass. On a CPU, a model whose parts are known runs as
one compiled function (`engine.backends.cpu`), any other as Transformers wrote it
(`engine.backends.transformers`); either is proven equal.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

import torch
from transformers import PreTrainedModel

from engine.backends.cpu import can_compile
from engine.backends.fused_linear import weight_sharing_copy
from engine.backends.transformers.model import TransformersModel
from engine.errors import InputError
from engine.kv_pool import PagePool
from engine.models import refuse_other_state
from engine.models.attention_trace import attention_layers
from engine.models.decoder_spec import describe
from engine.models.errors import refused
from engine.request import Request
from engine.runner import Runner
from engine.runner.deterministic import deterministic_model
from engine.runner.verify import CUTS, Cuts, check_equal, probe, probe_logits, probe_pages
from engine.sampling.device import sample
from engine.scheduler import Step
from engine.step import Choice, Span, StepResult

if TYPE_CHECKING:
    from engine.backends.cpu.model import CompiledDecoder

LOG = logging.getLogger(__name__)
CHUNK = 256  # tokens of a text at a time


class PagedModel(Protocol):
    """What computes logits over pages of keys and values."""

    @property
    def copied_bytes(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    def allocate_kv(self, pages: int) -> None: ...
    def clear(self, pages: list[int]) -> None: ...
    def logits(
        self, tokens: list[int], spans: list[Span], rows: list[int], position_ids: list[int] | None = None
    ) -> torch.Tensor: ...


class PackedRunner(Runner):
    """Runs packed steps over the pages of a pool.

    Args:
        model: a causal LM in eval mode that takes its attention from Transformers' AttentionInterface.
        pool: the pages' accounting; the store is made to its size.
        deterministic: give each token bitwise the same logits whatever shares its step and however its prompt
            was cut. A compiled model does so anyway; others run in passes of a fixed size.
        int8: round the weights of linear layers to int8, once they are proven in float32.

    Raises:
        InputError: for a model that cannot run packed, saying why; found out by running it.
    """

    def __init__(
        self, model: PreTrainedModel, pool: PagePool, deterministic: bool = False, int8: bool = False
    ) -> None:
        refuse_unpackable(model)
        self.pool = pool
        self.model = self._build(model, deterministic, int8)
        self.model.allocate_kv(pool.pages)
        self.copied_bytes = self.model.copied_bytes

    @torch.inference_mode()
    def _build(self, model: PreTrainedModel, deterministic: bool, int8: bool) -> PagedModel:
        """The fastest packed model that gives the same logits as `model`."""
        known = probe(model, self.pool.capacity)

        def prove(packed: PagedModel, cuts: Cuts = CUTS, dtype: torch.dtype | None = None) -> torch.Tensor:
            packed.allocate_kv(probe_pages(known, cuts, self.pool.page_size))
            with refused(model):
                found_RTV = probe_logits(known, cuts, self.pool.page_size, packed.logits)
            check_equal(model, "when packed", found_RTV, known.expected_TV, dtype)
            return found_RTV

        compiled = self._compiled(model)
        if compiled is not None:
            try:
                prove(compiled)
            except InputError as error:
                LOG.warning("%s: its parts do something else than they look like; it runs as it is", error)
                compiled = None
        if compiled is None and int8:
            raise InputError(
                f"dtype='int8' is for models that can be compiled; {type(model).__name__} is not: use float32"
            )
        if compiled is None and deterministic:
            return deterministic_model(model, self.pool.page_size, prove)
        if compiled is None:
            unmodified = TransformersModel(model, self.pool.page_size)
            prove(unmodified)
            return unmodified
        if int8:
            compiled.quantize()
            prove(compiled, dtype=torch.int8)
        return compiled

    def _compiled(self, model: PreTrainedModel) -> CompiledDecoder | None:
        """The compiled model, if this one has the parts for it."""
        with refused(model):
            layers = attention_layers(weight_sharing_copy(model))
        spec = describe(model, layers)
        if spec is None or not can_compile(spec):
            return None
        try:
            # Numba takes a moment to import, and a GPU can do without.
            from engine.backends.cpu.model import CompiledDecoder
        except ImportError as error:
            LOG.warning("not compiled (%s): generation will be slower", error)
            return None
        return CompiledDecoder(spec, self.pool.page_size)

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Logits after each token of a text by itself, [T, V]: for measuring what a runner's rounding does.

        What the pages held is lost.
        """
        pages, found = -(-len(tokens) // self.pool.page_size), []
        self.model.allocate_kv(pages)
        for begin in range(0, len(tokens), CHUNK):
            part = tokens[begin : begin + CHUNK]
            span = Span(0, len(part), begin, list(range(pages)))
            found.append(self.model.logits(part, [span], list(range(len(part)))))
        self.model.allocate_kv(self.pool.pages)
        return torch.cat(found)

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        """Compute a step in one pass; gives a choice to each request whose last token was in it."""
        if self.pool.needs_zeroing:
            self.model.clear(self.pool.needs_zeroing)
            self.pool.needs_zeroing.clear()
        tokens: list[int] = []
        spans: list[Span] = []
        for request, count in step:
            begin, computed = len(tokens), request.computed
            tokens += request.tokens[computed : computed + count]
            spans.append(Span(begin, len(tokens), computed, self.pool.tables[request]))
        ready = [
            (r, span.end - 1)
            for (r, n), span in zip(step, spans, strict=True)
            if r.computed + n == len(r.tokens)
        ]
        requests = [request for request, _ in ready]
        started = time.perf_counter()
        logits_RV = self.model.logits(tokens, spans, [row for _, row in ready])
        by_request: dict[Request, Choice] = dict(zip(requests, sample(logits_RV, requests), strict=True))
        seconds = time.perf_counter() - started
        return StepResult(
            choices=[by_request.get(request) for request, _ in step],
            forward_passes=1,
            tokens_computed=len(tokens),
            padded_tokens=0,
            model_s=seconds,
            kv_bytes=self.pool.pages_used * self.model.page_bytes,
        )


def page_token_bytes(model: PreTrainedModel) -> int:
    """Bytes that a token's keys and values take in the pages of all layers.

    Raises:
        InputError: for a model that cannot run packed.
    """
    refuse_unpackable(model)
    with refused(model):
        layers = attention_layers(weight_sharing_copy(model))
    own = [layer for index, layer in enumerate(layers) if layer.source == index]
    return sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in own) * model.dtype.itemsize


def refuse_unpackable(model: PreTrainedModel) -> None:
    """Raise InputError for a model that is known not to run packed before it is tried."""
    refuse_other_state(model)
    if not model._supports_attention_backend:
        raise InputError(
            f"{type(model).__name__} does not take its attention from Transformers' AttentionInterface"
        )
