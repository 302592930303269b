"""The packed runner: every token of a step in one row, no padding anywhere, keys and values in pages.

The model is unmodified: it is called with token ids, position ids and one keyword more, which reaches the attention
function registered under `engine.attention.NAME`. Any mix of prompts, parts of prompts and decodes is one pass.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from transformers import PreTrainedModel

from engine.attention import NAME
from engine.attention.paged import PackedStep, Piece
from engine.errors import InputError
from engine.models import kv_shape
from engine.pages import PagePool
from engine.request import Request
from engine.runner import Runner, StepResult, refuse_unknown_cache
from engine.runner.linear import twin
from engine.sampler import Choice, sample
from engine.scheduler import Step

# How far logits of the packed model may lie from the model's own, relative to the largest: rounding, no more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


class PackedRunner(Runner):
    """Runs packed steps over the pages of a pool.

    Args:
        model: a causal LM in eval mode that takes its attention from Transformers' AttentionInterface.
        pool: the pages' accounting; the store is made to its size.
        deterministic: give each token bitwise the same logits whatever shares its step and however its prompt was
            cut: fixed-size products in every linear layer, and attention one token at a time.

    Raises:
        InputError: for a model that cannot run packed, saying why; found out by running it.
    """

    def __init__(self, model: PreTrainedModel, pool: PagePool, deterministic: bool = False) -> None:
        refuse_unknown_cache(model)
        if not model._supports_attention_backend:
            raise InputError(
                f"{type(model).__name__} does not take its attention from Transformers' AttentionInterface"
            )
        self.model = twin(model, tiled=deterministic)
        self.model.set_attn_implementation(NAME)
        self.pool = pool
        self.deterministic = deterministic
        self._prove_equal(model)
        self.keys, self.values = self._store(pool.pages), self._store(pool.pages)

    def _store(self, pages: int) -> list[torch.Tensor]:
        """A tensor [L, K, P, D] a layer, of zeros: what a mask hides is still multiplied, and zero hides no NaN."""
        like = next(self.model.parameters())
        layers, kv_heads, head_dim = kv_shape(self.model.config)
        shape = (pages, kv_heads, self.pool.page_size, head_dim)
        if like.device.type != "cpu":
            return [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(layers)]
        # numpy's zeros, unlike torch's, take no memory before they are written.
        count = math.prod(shape) * like.dtype.itemsize
        return [torch.from_numpy(np.zeros(count, np.uint8)).view(like.dtype).view(shape) for _ in range(layers)]

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        """Compute a step in one pass; gives a choice to each request whose last token was in it."""
        for page in self.pool.dirty:
            for store in (*self.keys, *self.values):
                store[page] = 0
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
        packed = PackedStep(self.keys, self.values, pieces, self.deterministic)
        requests = [request for request, _ in ready]
        started = time.perf_counter()
        logits_RV = self._forward(tokens, packed, [row for _, row in ready])
        by_request: dict[Request, Choice] = dict(zip(requests, sample(logits_RV, requests), strict=True))
        seconds = time.perf_counter() - started
        return StepResult(
            choices=[by_request.get(request) for request, _ in step],
            forward_passes=1,
            tokens_computed=len(tokens),
            padded_tokens=0,
            model_s=seconds,
            kv_bytes=self.pool.pages_used * sum(store[0].nbytes for store in (*self.keys, *self.values)),
        )

    def _forward(self, tokens: list[int], packed: PackedStep, rows: list[int]) -> torch.Tensor:
        """Logits [R, V] of the tokens at `rows`."""
        device = self.model.device
        return self.model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=packed.positions_T[None],
            use_cache=False,
            logits_to_keep=torch.tensor(rows, dtype=torch.long, device=device),
            packed=packed,
        ).logits[0]

    @torch.inference_mode()
    def _prove_equal(self, model: PreTrainedModel) -> None:
        """Compare with the model itself on a few tokens, computed as a chunk, a chunk with a past, and one alone."""
        vocab = model.config.get_text_config(decoder=True).vocab_size
        tokens = [(7 * i + 3) % vocab for i in range(24)]
        expected = model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0].double()
        pages = -(-len(tokens) // self.pool.page_size)
        keys, values = self._store(pages), self._store(pages)
        found = []
        try:
            for begin, end in ((0, 15), (15, 23), (23, 24)):
                piece = Piece(0, end - begin, begin, list(range(pages)))
                packed = PackedStep(keys, values, [piece], self.deterministic)
                found.append(self._forward(tokens[begin:end], packed, list(range(end - begin))))
        except (InputError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            raise InputError(f"{type(model).__name__} cannot run packed: {error}") from error
        off = float((torch.cat(found).double() - expected).abs().max() / expected.abs().max())
        if not off <= TOLERANCE[model.dtype]:
            raise InputError(f"{type(model).__name__} gives other logits when packed (off by {off:.1e} of the largest)")
