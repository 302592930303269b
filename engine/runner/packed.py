"""The packed runner: every token of a step in one row, no padding to lengths, keys and values in pages.

The model is unmodified: it is called with token ids, position ids and one keyword more, which reaches the attention
function registered under `engine.attention.NAME`. Any mix of prompts, parts of prompts and decodes is one pass.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from engine.attention.interface import NAME
from engine.attention.paged import Options, PackedStep, Piece, Store
from engine.attention.rows import attend_rows, compile_rows
from engine.compiled import Compiler, Function, like
from engine.errors import InputError
from engine.models import kv_shape
from engine.pages import PagePool
from engine.request import Request
from engine.runner import Runner, StepResult, refuse_unknown_cache
from engine.runner.int8 import QUANTIZED, Quantize, quantize, watch
from engine.runner.lean import LeanLayer, lean, leaves_out
from engine.runner.linear import join, prepare, twin
from engine.runner.screened import Screened, screen_largest
from engine.runner.ways import COLD, FEW, ROWS, Way, fastest_ways, filled, kept
from engine.sampler import Choice, sample, takes_largest
from engine.scheduler import Step

LOG = logging.getLogger(__name__)
CHUNK = 256  # tokens of a text at a time
CUTS = ((0, 8, 15, 23, 24), (0, 15, 16, 23, 24))  # where the proof at load cuts its requests; the first cut is short
SHORT = 288  # tokens of a request up to which compiled attention of rows is about as fast as torch's, or faster
FULL_HEAD = 64  # dimensions of a head from which compiling its attention is worth the wait
# How far logits of the packed model may lie from the model's own, relative to the largest: rounding, no more. In int8,
# where each product has been compared with its integers besides, at most tokens: rounding may turn one of them over.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1, torch.int8: 1.5e-1}


class PackedRunner(Runner):
    """Runs packed steps over the pages of a pool.

    Args:
        model: a causal LM in eval mode that takes its attention from Transformers' AttentionInterface.
        pool: the pages' accounting; the store is made to its size.
        deterministic: give each token bitwise the same logits whatever shares its step and however its prompt was
            cut: fixed-size products in every linear layer, and attention one token at a time.
        int8: quantize the linear layers of a float32 model, once they are proven in float32.

    Raises:
        InputError: for a model that cannot run packed, saying why; found out by running it.
    """

    def __init__(self, model: PreTrainedModel, pool: PagePool, deterministic: bool = False, int8: bool = False) -> None:
        refuse_unpackable(model)
        self.pool = pool
        self.deterministic, self.int8 = deterministic, int8
        self._rows: Callable[..., torch.Tensor] = attend_rows
        self._quick = False  # whether rows' attention is compiled into the layers
        self._head: Screened | None = None
        self.model = self._build(model)
        self.stores = _stores(self.model, pool.pages, pool.page_size)
        self._page_bytes = sum(store.page_bytes for store in self.stores)

    @torch.inference_mode()
    def _build(self, model: PreTrainedModel) -> PreTrainedModel:
        """The leanest packed model that gives the same logits as `model`."""
        tokens, expected_TV = probe(model, 24)
        options = self._prove_equal(packed_twin(model), tokens, expected_TV)
        for known in (options, {}):
            packed = packed_twin(model)
            layers = lean(packed, known, self.deterministic)
            products = [product for layer in layers for product in layer.products]
            products += join(packed, self.deterministic)
            watched = watch(products) if self.int8 else {}
            self.copied_bytes = 0 if self.int8 else prepare(products)
            rounding = self._compile(model, layers)
            try:
                self._prove_equal(packed, tokens, expected_TV)
                break
            except InputError as error:
                if not layers:
                    raise
                LOG.warning("%s: its layers look like Llama's but are not; they run as they are", error)
        if layers and all(layer.two_ways for layer in layers):
            self._choose_ways(packed, layers, tokens, expected_TV)
        if self.int8:
            self.copied_bytes = quantize(watched, rounding)
            self._prove_equal(packed, tokens, expected_TV, torch.int8)
        elif not self.deterministic:
            self._screen(packed, model, tokens, expected_TV)
        return packed

    def _choose_ways(
        self, packed: PreTrainedModel, layers: list[LeanLayer], tokens: list[int], expected_TV: torch.Tensor
    ) -> None:
        """Find up to how many rows whole layers are quicker by panels than packed, if they prove right by panels."""

        def use(most: int) -> None:
            for layer in layers:
                layer.most = most

        use(ROWS[-1])
        try:
            self._prove_equal(packed, tokens, expected_TV)
        except InputError as error:
            LOG.warning("%s: by panels, so its layers multiply by packed weights", error)
            return use(0)

        first, names = layers[0], ["layer by panels", "packed layer"]
        shapes = [product.shape for product in first.products]

        def measure() -> list[str]:
            stores, angle_1TD = _stores(packed, 0, self.pool.page_size), torch.zeros(1, ROWS[-1], first.head_dim)
            counts = {max(FEW, rows) for rows in ROWS}
            steps = {count: self._step(stores, [Piece(i, i + 1, 0, [0]) for i in range(count)]) for count in counts}

            def way(layer: LeanLayer, most: int) -> Way:
                def run(x_TM: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
                    layer.most, x_TM = most, filled(x_TM)
                    angles = (angle_1TD[:, : len(x_TM)],) * 2
                    return layer(x_TM[None], position_embeddings=angles, packed=steps[len(x_TM)])[0]

                return run

            size = sum(map(math.prod, shapes))
            some = layers[: 1 + int(COLD / size / 4)]
            by_panels, by_packed = ([way(layer, most) for layer in some] for most in (ROWS[-1], 0))
            return fastest_ways(dict(zip(names, (by_panels, by_packed), strict=True)), size, first.width)

        rule = kept(str(shapes), names, measure)
        use(max((most for most, name in rule if name == names[0]), default=0))

    def _screen(
        self, packed: PreTrainedModel, model: PreTrainedModel, tokens: list[int], expected_TV: torch.Tensor
    ) -> None:
        """Have the largest logits found without computing all of them, where that is quicker and proves right."""
        head = screen_largest(packed, model)
        if head is None:
            return
        head.largest = True
        found_RTV, _ = self._probe(packed, tokens, expected_TV)
        taken_RTV = expected_TV.expand_as(found_RTV).take_along_dim(found_RTV.argmax(-1, keepdim=True), -1)
        try:
            check_equal(packed, "where one is taken for the largest", taken_RTV, expected_TV.amax(-1, keepdim=True))
            self._head = head
            self.copied_bytes += head.nbytes
        except InputError as error:
            LOG.warning("%s: all of them are computed", error)
            packed.get_output_embeddings().shared.product = head.whole

    def _step(self, stores: list[Store], pieces: list[Piece], short: int = SHORT) -> PackedStep:
        """A step; compiled layers get rows of nobody too, in the spare page, for they take FEW at a time."""
        if not self._quick:
            return PackedStep(stores, pieces, self.deterministic, self._rows)
        end, spare = pieces[-1].end, len(stores[0].keys_LKDP) - 1
        nobody = [Piece(at, at + 1, 0, [spare]) for at in range(end, end + -end % FEW)]
        return PackedStep(stores, pieces + nobody, rows=self._rows, short=short)

    def _compile(self, model: PreTrainedModel, layers: list[LeanLayer]) -> Function:
        """Compile what this runner does beside products, if that is worth it; gives what turns rows into bytes."""
        compiler, rounding = Compiler(), Quantize()
        if self.deterministic or not compilable(model):
            return rounding
        _, kv_heads, head_dim = kv_shape(model.config)
        store = Store.zeros((64, kv_heads, self.pool.page_size, head_dim), like())
        heads = model.config.get_text_config(decoder=True).num_attention_heads
        rows = None if layers else compile_rows(compiler, heads, store.keys_LKDP, store.values_LKBPE)
        for layer in layers:
            layer.compile_with(compiler, store)
        fast = compiler.add(rounding, *QUANTIZED) if self.int8 else rounding
        compiler.finish()
        self._quick = all(layer.turn is not None and layer.turn.built for layer in layers) and bool(layers)
        if rows is not None and rows.built:
            self._rows = lambda *tensors: rows(*tensors)[0]
        return fast

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Logits after each token of a text by itself, [T, V]: for measuring what a runner's rounding does."""
        if self._head is not None:
            self._head.largest = False
        pages = -(-len(tokens) // self.pool.page_size)
        stores, found = _stores(self.model, pages, self.pool.page_size), []
        for begin in range(0, len(tokens), CHUNK):
            part = tokens[begin : begin + CHUNK]
            step = self._step(stores, [Piece(0, len(part), begin, list(range(pages)))])
            found.append(_forward(self.model, part, step, list(range(len(part)))))
        return torch.cat(found)

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        """Compute a step in one pass; gives a choice to each request whose last token was in it."""
        if self.pool.dirty:
            for store in self.stores:
                store.clear(self.pool.dirty)
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
        packed = self._step(self.stores, pieces)
        requests = [request for request, _ in ready]
        if self._head is not None:
            self._head.largest = all(map(takes_largest, requests))
        started = time.perf_counter()
        logits_RV = _forward(self.model, tokens, packed, [row for _, row in ready])
        by_request: dict[Request, Choice] = dict(zip(requests, sample(logits_RV, requests), strict=True))
        seconds = time.perf_counter() - started
        return StepResult(
            choices=[by_request.get(request) for request, _ in step],
            forward_passes=1,
            tokens_computed=len(tokens),
            padded_tokens=0,
            model_s=seconds,
            kv_bytes=self.pool.pages_used * self._page_bytes,
        )

    def _prove_equal(
        self, packed: PreTrainedModel, tokens: list[int], expected_TV: torch.Tensor, dtype: torch.dtype | None = None
    ) -> dict[int, Options]:
        """Compare logits; gives the layers' options."""
        try:
            found_RTV, options = self._probe(packed, tokens, expected_TV)
        except (InputError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            raise InputError(f"{type(packed).__name__} cannot run packed: {error}") from error
        check_equal(packed, "when packed", found_RTV, expected_TV, dtype)
        return options

    def _probe(
        self, packed: PreTrainedModel, tokens: list[int], expected_TV: torch.Tensor
    ) -> tuple[torch.Tensor, dict[int, Options]]:
        """Logits [2, T, V] of two like requests: chunks, short ones too, without and with a past, and single tokens.

        Those of the first token are not asked for, but taken as expected: leaving out is part of it. Gives the layers'
        options too.
        """
        pages = -(-len(tokens) // self.pool.page_size)
        stores, options = _stores(packed, len(CUTS) * pages, self.pool.page_size), {}
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
            step, skipped = self._step(stores, pieces, CUTS[0][1]), int(asked[0] == (0, 0))
            logits_TV = _forward(packed, given, step, list(range(skipped, len(given))))
            found_RTV[tuple(torch.tensor(asked[skipped:]).T)] = logits_TV.double()
            options.update(step.options)
        return found_RTV, options


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


def packed_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` that shares its weights and calls packed attention."""
    packed = twin(model)
    packed.set_attn_implementation(NAME)
    return packed


def _forward(model: PreTrainedModel, tokens: list[int], packed: PackedStep, rows: list[int]) -> torch.Tensor:
    """Logits [R, V] of the tokens at `rows`."""
    keep_R = torch.tensor(rows, dtype=torch.long, device=model.device)
    if leaves_out(model) and len(rows) < len(tokens):
        packed.wanted_R = keep_R
    ids_T = torch.zeros_like(packed.positions_T)  # those of nobody come last
    ids_T[: len(tokens)] = torch.tensor(tokens)
    return model(
        input_ids=ids_T[None],
        position_ids=packed.positions_T[None],
        use_cache=False,
        logits_to_keep=keep_R if packed.wanted_R is None else 0,  # 0 is all of them
        packed=packed,
    ).logits[0]


def compilable(model: PreTrainedModel) -> bool:
    """Whether compiling is worth the wait: on a CPU, with heads that fill vectors."""
    return model.device.type == "cpu" and model.dtype == torch.float32 and kv_shape(model.config)[2] >= FULL_HEAD


def _stores(model: PreTrainedModel, pages: int, page_size: int) -> list[Store]:
    """A layer's keys and values each, empty, with one page to spare."""
    layers, kv_heads, head_dim = kv_shape(model.config)
    weight = next(model.parameters())
    return [Store.zeros((pages + 1, kv_heads, page_size, head_dim), weight) for _ in range(layers)]
