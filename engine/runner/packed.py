"""The packed runner: every token of a step in one row, no padding to lengths, keys and values in pages.

Any mix of prompts, parts of prompts and decodes is one batch. Which backend computes it is settled at load:
the fastest that is made for the model's parts and gives its logits, else the model as Transformers wrote it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from engine.backends import Backend
from engine.config import EngineConfig
from engine.errors import InputError
from engine.kv_pool import PagePool
from engine.models import positions, refuse_other_state
from engine.models.attention_trace import LayerAttention, attention_layers
from engine.models.decoder_spec import DecoderSpec, describe
from engine.models.errors import refused
from engine.request import Request
from engine.runner import Runner
from engine.runner.verify import Probe, probe, prove
from engine.scheduler import Step
from engine.step import PENDING, Batch, Choice, Done, Span, StepResult, Ticket

LOG = logging.getLogger(__name__)
CHUNK = 256  # tokens of a text at a time


def make_packed_runner(model: PreTrainedModel, config: EngineConfig, memory: int) -> PackedRunner:
    """Return the packed runner of a resolved config, with as many pages as fit `memory` bytes and are of use.

    Raises:
        InputError: for a model that cannot run packed, saying why, or memory for less than one page.
    """
    refuse_other_state(model)
    if not model._supports_attention_backend:
        raise InputError(
            f"{type(model).__name__} does not take its attention from Transformers' AttentionInterface"
        )
    with refused(model):
        layers = attention_layers(model)
    size, itemsize = config.page_size, config.kv_itemsize or model.dtype.itemsize
    page_bytes = size * _kv_numbers(layers) * itemsize
    if memory < page_bytes:
        raise InputError(
            f"kv_memory={config.kv_memory} is too small: a page of page_size={size} takes {page_bytes} bytes"
            ": raise the one or lower the other"
        )
    useful = 2 * config.max_batch_size * -(-positions(model.config)[0] // size)
    pool = PagePool(min(memory // page_bytes, useful), size, config.prefix_caching)
    return PackedRunner(make_backend(model, layers, config, probe(model, pool.capacity)), pool)


def _kv_numbers(layers: list[LayerAttention]) -> int:
    """Return how many numbers a token's keys and values are, in the pages of all layers."""
    own = [layer for index, layer in enumerate(layers) if layer.source == index]
    return sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in own)


@torch.no_grad()  # not inference: weights that a backend joins stay tensors which one can train
def make_backend(
    model: PreTrainedModel, layers: list[LayerAttention], config: EngineConfig, known: Probe
) -> Backend:
    """Return the fastest backend that gives the same logits as `model`.

    Args:
        layers: what each layer gives its attention.
        known: the model's own logits of a text.

    Raises:
        InputError: for a model that no backend computes, or none as the config asks.
    """
    name, size = type(model).__name__, config.page_size
    try:
        fast, why = None, f"{name} is no decoder that is known here, or not in this dtype"
        with refused(model):
            spec = describe(model, layers)
            fast = None if spec is None else decoder_backend(spec, config)
        if fast is not None:
            prove(model, known, fast, size, bitwise=config.deterministic)
            if config.dtype == "int8":
                fast.quantize()
                prove(model, known, fast, size, torch.int8, bitwise=config.deterministic)
            return fast
    except InputError as error:
        why = str(error)
        LOG.warning("%s: it is computed by Transformers' own code instead, which is slower", why)
    if config.dtype == "int8" or config.deterministic:
        asked = "dtype='int8'" if config.dtype == "int8" else "deterministic=True"
        raise InputError(f"{asked} is for decoders that run compiled: {why}; leave it out")
    from engine.backends.transformers.backend import TransformersBackend

    plain = TransformersBackend(model, layers, size)
    prove(model, known, plain, size)
    return plain


def decoder_backend(spec: DecoderSpec, config: EngineConfig) -> Backend | None:
    """Return the backend that is made for a decoder, its device and its dtype; None if there is none.

    Raises:
        InputError: where a library that it needs is not there.
    """
    if spec.embedding_VM.device.type == "cuda":
        from engine.backends.cuda import can_run

        if not can_run(spec):
            return None
        from engine.backends.cuda.backend import CudaBackend

        return CudaBackend(spec, config.page_size, config.max_batch_size, config.deterministic)
    from engine.backends.cpu import can_compile

    if not can_compile(spec):
        return None
    try:
        from engine.backends.cpu.model import CompiledDecoder  # Numba takes a moment to import
    except ImportError as error:
        raise InputError(f"not compiled ({error})") from error
    return CompiledDecoder(spec, config.page_size)


def make_batch(step: Step, tables: Mapping[Request, list[int]]) -> Batch:
    """Return the batch of a step; a request whose last token is in it wants the next one.

    Args:
        tables: the pages of each request.
    """
    tokens: list[int] = []
    spans: list[Span] = []
    wanted: list[int] = []
    requests: list[Request] = []
    begin = 0
    for request, count in step:
        known, computed, end = request.tokens, request.computed, begin + count
        tokens += known[computed : computed + count]
        while len(tokens) < end:
            tokens.append(PENDING)
        spans.append(Span(begin, end, computed, tables[request], request))
        if computed + count == len(known) + request.pending:
            wanted.append(end - 1)
            requests.append(request)
        begin = end
    return Batch(tokens, spans, wanted, requests)


class PackedRunner(Runner):
    """Runs steps as batches over the pages of a pool.

    Args:
        backend: computes them, for pages of the pool's size.
        pool: the pages' accounting; as many are allocated.
    """

    memory: PagePool

    def __init__(self, backend: Backend, pool: PagePool) -> None:
        self.backend, self.memory = backend, pool
        backend.allocate_kv(pool.pages)
        self.copied_bytes = backend.copied_bytes

    @torch.inference_mode()
    def launch(self, step: Step) -> Ticket[StepResult]:
        """Start a step, as one batch."""
        if self.memory.needs_zeroing:
            self.backend.clear(self.memory.needs_zeroing)
            self.memory.needs_zeroing.clear()
        batch = make_batch(step, self.memory.tables)
        kv_bytes = self.memory.pages_used * self.backend.page_bytes
        started = time.perf_counter()
        launched = _Launched(step, batch, self.backend.launch(batch), started, kv_bytes)
        return launched if launched.is_async else Done(launched.collect())

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Return the logits after each token of a text by itself, [T, V]: what a backend's rounding does to
        them.

        What the pages held is lost.

        Raises:
            RuntimeError: while a request holds pages.
        """
        self.memory.forget_all()
        pages, found = -(-len(tokens) // self.memory.page_size), []
        self.backend.allocate_kv(pages)
        try:
            for begin in range(0, len(tokens), CHUNK):
                part = tokens[begin : begin + CHUNK]
                span = Span(0, len(part), begin, list(range(pages)))
                found.append(self.backend.logits(Batch(part, [span], list(range(len(part))))))
        finally:
            self.backend.allocate_kv(self.memory.pages)
        return torch.cat(found)


@dataclass(frozen=True, slots=True)
class _Launched:
    """A batch that a backend has launched, when (seconds), and the KV memory that requests held then."""

    step: Step
    batch: Batch
    ticket: Ticket[list[Choice]]
    started: float
    kv_bytes: int

    @property
    def is_async(self) -> bool:
        """Whether its tokens need not be here before the next step is launched."""
        return self.ticket.is_async

    def collect(self) -> StepResult:
        """Wait for the tokens."""
        chosen = dict(zip(self.batch.requests, self.ticket.collect(), strict=True))
        return StepResult(
            choices=[chosen.get(request) for request, _ in self.step],
            forward_passes=1,
            tokens_computed=len(self.batch.tokens),
            padded_tokens=0,
            model_s=time.perf_counter() - self.started,
            kv_bytes=self.kv_bytes,
        )
