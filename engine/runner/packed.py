"""The packed runner: every token of a step in one row, no padding to lengths, keys and values in pages.

Any mix of prompts, parts of prompts and decodes is one pass. On a CPU, a model built like Llama runs as one compiled
function (`engine.cpu`), any other as Transformers wrote it (`engine.runner.eager`); either is proven equal.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from transformers import PreTrainedModel

from engine.attention.paged import Piece
from engine.errors import InputError
from engine.pages import PagePool
from engine.request import Choice, Request
from engine.runner import Runner, StepResult, refuse_unknown_cache
from engine.runner.eager import EagerModel
from engine.runner.lean import is_lean
from engine.sampler import sample
from engine.scheduler import Step

if TYPE_CHECKING:
    from engine.cpu.model import LeanModel

LOG = logging.getLogger(__name__)
CHUNK = 256  # tokens of a text at a time
CUTS = ((0, 8, 15, 23, 24), (0, 15, 16, 23, 24))  # where the proof at load cuts its requests; the first cut is short
# How far logits of the packed model may lie from the model's own, relative to the largest: rounding, no more. In int8
# at most tokens: rounding may turn one of them over.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1, torch.int8: 1.5e-1}


class PagedModel(Protocol):
    """What computes logits over pages of keys and values."""

    @property
    def copied_bytes(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    def hold(self, pages: int) -> None: ...
    def clear(self, pages: list[int]) -> None: ...
    def logits(self, tokens: list[int], pieces: list[Piece], rows: list[int]) -> torch.Tensor: ...


class PackedRunner(Runner):
    """Runs packed steps over the pages of a pool.

    Args:
        model: a causal LM in eval mode that takes its attention from Transformers' AttentionInterface.
        pool: the pages' accounting; the store is made to its size.
        deterministic: give each token bitwise the same logits whatever shares its step and however its prompt was
            cut. A compiled model does so anyway; others take fixed-size products, and attention one token at a time.
        int8: round the weights of linear layers to int8, once they are proven in float32.

    Raises:
        InputError: for a model that cannot run packed, saying why; found out by running it.
    """

    def __init__(self, model: PreTrainedModel, pool: PagePool, deterministic: bool = False, int8: bool = False) -> None:
        refuse_unpackable(model)
        self.pool = pool
        self.model = self._build(model, deterministic, int8)
        self.model.hold(pool.pages)
        self.copied_bytes = self.model.copied_bytes

    @torch.inference_mode()
    def _build(self, model: PreTrainedModel, deterministic: bool, int8: bool) -> PagedModel:
        """The leanest packed model that gives the same logits as `model`."""
        tokens, expected_TV = probe(model, 24)

        def prove(packed: PagedModel, dtype: torch.dtype | None = None) -> None:
            with _refused(model):
                found_RTV = self._probe(packed, tokens, expected_TV)
            check_equal(model, "when packed", found_RTV, expected_TV, dtype)

        lean = self._lean(model)
        if lean is not None:
            try:
                prove(lean)
            except InputError as error:
                LOG.warning("%s: its layers look like Llama's but are not; they run as they are", error)
                lean = None
        if lean is None and int8:
            raise InputError(f"dtype='int8' is for models built like Llama; {type(model).__name__} is not: use float32")
        if lean is None:
            eager = EagerModel(model, self.pool.page_size, True, deterministic)
            prove(eager)
            return eager
        if int8:
            lean.quantize()
            prove(lean, torch.int8)
        return lean

    def _lean(self, model: PreTrainedModel) -> LeanModel | None:
        """The compiled model, if this one has the parts for it."""
        plain = EagerModel(model, self.pool.page_size, joined=False)
        plain.hold(1)
        with _refused(model):
            plain.logits([0], [Piece(0, 1, 0, [0])], [0])  # shows what options its code gives attention
        if not is_lean(model, plain.options):
            return None
        try:
            from engine.cpu.model import LeanModel  # Numba takes a moment to import, and a GPU can do without
        except ImportError as error:
            LOG.warning("not compiled (%s): generation will be slower", error)
            return None
        return LeanModel(model, [plain.options[index] for index in range(len(plain.options))], self.pool.page_size)

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Logits after each token of a text by itself, [T, V]: for measuring what a runner's rounding does.

        What the pages held is lost.
        """
        pages, found = -(-len(tokens) // self.pool.page_size), []
        self.model.hold(pages)
        for begin in range(0, len(tokens), CHUNK):
            part = tokens[begin : begin + CHUNK]
            piece = Piece(0, len(part), begin, list(range(pages)))
            found.append(self.model.logits(part, [piece], list(range(len(part)))))
        self.model.hold(self.pool.pages)
        return torch.cat(found)

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        """Compute a step in one pass; gives a choice to each request whose last token was in it."""
        if self.pool.dirty:
            self.model.clear(self.pool.dirty)
            self.pool.dirty.clear()
        tokens: list[int] = []
        pieces: list[Piece] = []
        for request, count in step:
            begin, computed = len(tokens), request.computed
            tokens += request.tokens[computed : computed + count]
            pieces.append(Piece(begin, len(tokens), computed, self.pool.tables[request]))
        ready = [
            (r, piece.end - 1) for (r, n), piece in zip(step, pieces, strict=True) if r.computed + n == len(r.tokens)
        ]
        requests = [request for request, _ in ready]
        started = time.perf_counter()
        logits_RV = self.model.logits(tokens, pieces, [row for _, row in ready])
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

    def _probe(self, packed: PagedModel, tokens: list[int], expected_TV: torch.Tensor) -> torch.Tensor:
        """Logits [2, T, V] of two like requests: chunks, short ones too, without and with a past, and single tokens.

        Those of the first token are not asked for, but taken as expected: leaving out is part of it.
        """
        pages = -(-len(tokens) // self.pool.page_size)
        packed.hold(len(CUTS) * pages)
        found_RTV = expected_TV.repeat(len(CUTS), 1, 1)
        for spans in zip(*map(pairwise, CUTS), strict=True):
            pieces: list[Piece] = []
            given: list[int] = []
            asked: list[tuple[int, int]] = []  # row and position of each token
            for row, (begin, end) in enumerate(spans):
                table = list(range(row * pages, (row + 1) * pages))
                pieces.append(Piece(len(given), len(given) + end - begin, begin, table))
                given += tokens[begin:end]
                asked += [(row, at) for at in range(begin, end)]
            skipped = int(asked[0] == (0, 0))
            logits_TV = packed.logits(given, pieces, list(range(skipped, len(given))))
            found_RTV[tuple(torch.tensor(asked[skipped:]).T)] = logits_TV.double()
        return found_RTV


@contextlib.contextmanager
def _refused(model: PreTrainedModel) -> Iterator[None]:
    """Whatever a model's code raises means that it can't run packed."""
    try:
        yield
    except (TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise InputError(f"{type(model).__name__} cannot run packed: {error}") from error


def refuse_unpackable(model: PreTrainedModel) -> None:
    """Raise InputError for a model that is known not to run packed before it is tried."""
    refuse_unknown_cache(model)
    if not model._supports_attention_backend:
        raise InputError(f"{type(model).__name__} does not take its attention from Transformers' AttentionInterface")


def probe(model: PreTrainedModel, count: int) -> tuple[list[int], torch.Tensor]:
    """Some tokens, and the model's own logits at each, [T, V] in float64."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    tokens = [(7 * i + 3) % vocab for i in range(count)]
    return tokens, model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0].double()


def check_equal(
    model: PreTrainedModel, where: str, found: torch.Tensor, expected_TV: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """Raise InputError unless logits found `where` are those expected, but for rounding in a dtype, the model's own."""
    off_T = (found.double() - expected_TV).abs().amax(-1)
    off = float((off_T.median() if dtype is torch.int8 else off_T.max()) / expected_TV.abs().max())
    if not off <= TOLERANCE[dtype or model.dtype]:
        raise InputError(f"{type(model).__name__} gives other logits {where} (off by {off:.1e} of the largest)")
