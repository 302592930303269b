"""Steps whose tokens stay on the device, so that the next step is launched before the host has read this
one's.

A token that the device has chosen and the host has not seen is *pending*: the next step's input names it by
where it lies, and everything else that a step needs (positions, pages, who runs) the host knows without it.

Launching a layer's nine kernels takes the host about half a millisecond (measured beside an H200: 13 ms for
24 layers), which is more than most steps of a small model take a GPU. So steps in which every request
computes one token are CUDA graphs. Steps with chunks are not: their sizes hardly ever come again, and
capturing them took `mixed-256` on an H200 from 51,290 to 30,172 tokens/s. All of it but the capture also runs
on a CPU.

T tokens of the step, B rows of one token (they come first), R requests of several, X table entries or tiles,
K tokens whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from engine.backends.cuda.attention import DeviceStep
from engine.backends.cuda.graphs import EMPTY, BatchLayout, BatchShape, CudaGraphs, upload
from engine.backends.cuda.in_flight import InFlight
from engine.backends.cuda.kernels import triton_kernels
from engine.backends.cuda.model import fuse
from engine.backends.fused_linear import fuse_linears, prepare, weight_sharing_copy
from engine.backends.transformers.interface import NAME
from engine.errors import InputError
from engine.kv_pool import PagePool
from engine.models import positions, ropes
from engine.models.attention_trace import attention_layers
from engine.models.errors import refused
from engine.request import Request
from engine.runner import Runner
from engine.runner.deterministic import DEPENDS
from engine.runner.packed import refuse_unpackable
from engine.runner.verify import Probe, check_equal, probe
from engine.sampling.device import sample
from engine.scheduler import Step
from engine.step import Choice, Done, StepResult, Ticket

LOG = logging.getLogger(__name__)
BOUND = 1024  # least context that a graph's grid is made for; more in powers of four
FEW_TOKENS = 8  # of the proof's shortest chunk
FEW_ROWS = 32  # up to so many rows, short splits are needed to fill a GPU


def bucket(rows: int) -> int:
    """How many rows the graph for `rows` rows has: the next power of two, multiple of 8, or (beyond 160) of
    16."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    unit = 8 if rows <= 160 else 16
    return -(-rows // unit) * unit


class CudaRunner(Runner):
    """The packed runner for a GPU: kernels over pages, CUDA graphs, tokens that need not come to the host.

    Args:
        model, pool, deterministic: as for PackedRunner. Deterministic steps take products of a fixed size,
            and attend every token as a row of its own, cut by its own length alone.
        rows: requests that share a step, at most.
        kernels: what else has the functions of `triton_kernels` and shall compute instead of them; on a CPU
            these run in Triton's interpreter only.

    Raises:
        InputError: for a model that cannot run packed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pool: PagePool,
        deterministic: bool = False,
        rows: int = 32,
        kernels: Any = None,
    ) -> None:
        refuse_unpackable(model)
        if any("dynamic" in rope["rope_type"] for rope in ropes(model.config)):
            raise InputError(
                f"{type(model).__name__} has dynamic RoPE, which reads every step's positions on the host"
            )
        self.pool, self.deterministic, self.device = pool, deterministic, model.device
        self.model = weight_sharing_copy(model)
        with refused(model):
            self.layers = attention_layers(self.model)
        self.model.set_attn_implementation(NAME)
        sizes = {(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in self.layers}
        kv_heads, head_dim, value_dim = next(iter(sizes))
        if len(sizes) > 1 or head_dim != value_dim:
            raise InputError(
                f"{type(model).__name__} has keys and values of several sizes, which no kernel here reads"
            )
        self.copied_bytes = prepare(fuse_linears(self.model, deterministic))
        shape = (2, pool.pages, kv_heads, pool.page_size, head_dim)
        own = {layer.source for layer in self.layers}
        stores = {index: torch.zeros(shape, dtype=model.dtype, device=self.device) for index in own}
        self.keys, self.values = ([stores[layer.source][side] for layer in self.layers] for side in range(2))
        self._page_bytes = sum(store[:, 0].nbytes for store in stores.values())
        self.kernels = kernels or triton_kernels()
        self._columns = min(pool.pages, -(-positions(model.config)[0] // pool.page_size))
        self._tables_RN = torch.zeros(rows, self._columns, dtype=torch.int32, device=self.device)
        # The tokens that the step before kept.
        self._last_B = torch.zeros(bucket(rows), dtype=torch.int64, device=self.device)
        self._sources: dict[Request, int] = {}  # whose they are
        # line of the tables, its pages, how many are there
        self._lines: dict[Request, tuple[int, list[int], int]] = {}
        self._free_lines = list(range(rows))[::-1]
        # logits of a step that is not greedy, for one graph at a time
        self._sampled_KV: torch.Tensor | None = None
        heads = model.config.get_text_config(decoder=True).num_attention_heads
        self._tile = self.kernels.chunk_tokens(heads // kv_heads, head_dim, model.dtype.itemsize)
        self.graphs = CudaGraphs(self._compute, self._last_B)
        cuda = self.device.type == "cuda"
        # Triton launches where torch's current device is
        self._here = torch.cuda.device(self.device if cuda else -1)
        with self._here:
            self._fuse(model)

    @torch.inference_mode()
    def _fuse(self, model: PreTrainedModel) -> None:
        """Replace what fused kernels equal, and prove on a few tokens that the model still computes the same.

        Raises:
            InputError: if steps on the device give other logits than `model` even without that.
        """
        known = probe(model, self.pool.capacity)
        self._prove(known)
        # The last page may end beyond the last position, and angles be others for a text that goes there.
        angles = min(self._columns * self.pool.page_size, positions(model.config)[0])
        stream, undo = fuse(self.model, self.layers, self.kernels, angles)
        few, stream.few = stream.few, 0
        try:
            self._prove(known)
        except InputError as error:
            LOG.warning("%s; its layers run as they are", error)
            undo()
            return
        if few:
            try:
                stream.few = few
                self._prove(known)
            except InputError as error:
                LOG.warning("%s; steps of few rows take the same products as others", error)
                stream.few = 0

    def _prove(self, known: Probe) -> None:
        """Compute its tokens as chunks, without and with a past, and one alone.

        Raises:
            InputError: if logits differ from those expected, or whatever else the model or a compiler raises;
                or if deterministic logits differ at all where the tokens are cut otherwise.
        """
        count = len(known.tokens)
        found_TV = self._probe(known, {0, min(FEW_TOKENS, count // 2), count // 2, count - 1, count})
        check_equal(self.model, "on the device", found_TV, known.expected_TV)
        if self.deterministic and not torch.equal(found_TV, self._probe(known, {0, count // 3, count})):
            raise InputError(DEPENDS.format(model=type(self.model).__name__))

    def _probe(self, known: Probe, cuts: set[int]) -> torch.Tensor:
        """Logits [T, V] of the text of a probe, cut so."""
        pages, found = -(-len(known.tokens) // self.pool.page_size), []
        ids_T, position_ids_T = np.array(known.tokens), torch.tensor(known.position_ids, device=self.device)
        self._tables_RN[0, :pages] = torch.arange(pages)
        for begin, end in itertools.pairwise(sorted(cuts)):
            inputs_3T = np.stack([ids_T[begin:end], np.arange(begin, end), np.zeros(end - begin, dtype=int)])
            spans_3R = np.array([[0], [end - begin], [begin]])
            step = self._layout(inputs_3T, np.arange(end - begin), np.zeros(1, dtype=int), spans_3R)
            sizes = step.sizes(greedy=False)
            with refused(self.model):
                ints_I = upload(step.ints(sizes), self.device)
                found.append(self._logits(sizes, ints_I, position_ids_T[begin:end]))
        return torch.cat(found)

    def run(self, step: Step) -> StepResult:
        """Compute a step and wait for it."""
        return self.launch(step).collect()

    def launch(self, step: Step) -> Ticket:
        """Start a step; the ticket's `collect` gives its result.

        Of a request's tokens the last may be pending, chosen by the step launched just before. Where all
        requests of the step take the likeliest token, nothing is waited for; else the ticket holds tokens
        that are here already.
        """
        with self._here, torch.inference_mode():
            return self._launch(step)

    def _launch(self, step: Step) -> Ticket:
        started = time.perf_counter()
        self.pool.needs_zeroing.clear()  # no kernel reads beyond what its request has written
        rows_first = (
            step if all(count == 1 for _, count in step) else sorted(step, key=lambda item: item[1] > 1)
        )
        ids: list[int] = []
        ends: dict[Request, int] = {}
        for request, count in rows_first:
            tokens, begin = request.tokens, request.computed
            if begin + count > len(tokens):
                ids.append(-1 - self._sources[request])
            elif count == 1:
                ids.append(tokens[begin])
            else:
                ids += tokens[begin : begin + count]
            ends[request] = len(ids)
        lines_R = self._place([request for request, _ in rows_first])
        counts_R = np.array([count for _, count in rows_first])
        computed_R = np.array([request.computed for request, _ in rows_first])
        ends_R = counts_R.cumsum()
        within_T = np.arange(len(ids)) - np.repeat(ends_R - counts_R, counts_R)
        positions_T, lines_T = np.repeat(computed_R, counts_R) + within_T, np.repeat(lines_R, counts_R)
        ready = [r for r, n in step if r.computed + n == len(r.tokens) + r.pending]
        greedy = all(map(_greedy, ready))
        single = len(ids) == len(step)
        at = {request: ends[request] - 1 if single else row for row, request in enumerate(ready)}
        keep_K = (
            np.arange(len(ids)) if single else np.array([ends[request] - 1 for request in ready], dtype=int)
        )
        spans_3R = np.stack([ends_R - counts_R, ends_R, computed_R])
        layout = self._layout(np.stack([np.array(ids), positions_T, lines_T]), keep_K, lines_R, spans_3R)
        sizes = layout.sizes(greedy)
        if single:
            logits_KV = self.graphs.run(self._padded(sizes), layout)
        else:
            logits_KV = self._compute(sizes, upload(layout.ints(sizes), self.device))
        self._sources = at if greedy else {}

        def result(choices: list[Choice | None]) -> StepResult:
            return StepResult(
                choices=choices,
                forward_passes=1,
                tokens_computed=len(ids),
                padded_tokens=0,
                model_s=time.perf_counter() - started,
                kv_bytes=self.pool.pages_used * self._page_bytes,
            )

        if greedy:
            tokens_B = self._last_B.to("cpu", non_blocking=True, copy=True)
            done = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
            return InFlight(tokens_B, done, [at.get(request) for request, _ in step], result)
        assert logits_KV is not None
        by_request = dict(
            zip(ready, sample(logits_KV[[at[request] for request in ready]], ready), strict=True)
        )
        return Done(result([by_request.get(request) for request, _ in step]))

    def _place(self, requests: list[Request]) -> np.ndarray:
        """Each request's line of the block tables, brought up to date on the device with one copy."""
        tables = self.pool.tables
        if sum(request not in self._lines for request in requests) > len(self._free_lines):
            for request in [r for r, (_, pages, _) in self._lines.items() if tables.get(r) is not pages]:
                self._free_lines.append(self._lines.pop(request)[0])
        lines, fresh = [], []
        for request in requests:
            pages = tables[request]
            line, old, known = self._lines.get(request) or (self._free_lines.pop(), pages, 0)
            if old is not pages:  # preempted and admitted again: other pages
                known = 0
            if known < len(pages):
                fresh += [(line, column, pages[column]) for column in range(known, len(pages))]
                self._lines[request] = line, pages, len(pages)
            lines.append(line)
        if fresh:
            line_X, column_X, page_X = upload(np.array(fresh).T, self.device)
            self._tables_RN[line_X, column_X] = page_X
        return np.array(lines)

    def _layout(
        self, inputs_3T: np.ndarray, keep_K: np.ndarray, lines_R: np.ndarray, spans_3R: np.ndarray
    ) -> BatchLayout:
        """A step of tokens in the order of its requests: those of one token come first."""
        rows = inputs_3T.shape[1] if self.deterministic else int((spans_3R[1] - spans_3R[0] == 1).sum())
        if self.deterministic or rows == len(lines_R):
            return replace(EMPTY, rows=rows, inputs_3T=inputs_3T, keep_K=keep_K)
        lines_R, spans_3R = lines_R[rows:], spans_3R[:, rows:]
        begins_R, ends_R, computed_R = spans_3R
        first = [np.arange(begin, end, self._tile) for begin, end in zip(begins_R, ends_R, strict=True)]
        request_X = np.repeat(np.arange(len(first)), [len(tokens) for tokens in first])
        first_X = np.concatenate(first)
        longest_first_X = np.argsort((begins_R - computed_R)[request_X] - first_X, kind="stable")
        tiles_X2 = np.stack([request_X, first_X], 1)[longest_first_X]
        return BatchLayout(rows, inputs_3T, keep_K, lines_R, spans_3R, tiles_X2)

    def _padded(self, exact: BatchShape) -> BatchShape:
        """The shape of the graph for a step of rows: more of them, and a longer bound of their contexts."""
        bound, most = BOUND, self._columns * self.pool.page_size
        while bound < min(exact.bound, most):
            bound *= 4
        rows = bucket(exact.rows)
        return exact._replace(rows=rows, kept=rows, bound=min(bound, most))

    def _compute(self, sizes: BatchShape, ints_I: torch.Tensor) -> torch.Tensor | None:
        """Compute a step; its tokens are in `_last_B` then, or if not greedy, gives logits [K, V]."""
        logits_KV = self._logits(sizes, ints_I)
        if sizes.greedy:
            if sizes.kept:
                self._last_B[: sizes.kept] = self.kernels.best_tokens(logits_KV)
            return None
        if self._sampled_KV is None:
            self._sampled_KV = logits_KV.new_empty(len(self._last_B), logits_KV.shape[1])
        return self._sampled_KV[: sizes.kept].copy_(logits_KV)

    def _logits(
        self, sizes: BatchShape, ints_I: torch.Tensor, position_ids_T: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The model's logits, [K, V], for a step that lies in an array on the device.

        `position_ids_T` are what the model is told instead of the tokens' places in their requests.
        """
        inputs_3T, keep_K, lines_R, spans_3R, tiles_X2 = sizes.parts(ints_I)
        rows = sizes.rows
        ids_T, positions_T, slots_T, lengths_T = self.kernels.step_inputs(
            inputs_3T, self._last_B, self._tables_RN, self.pool.page_size
        )
        chunks = (self._tables_RN[lines_R], *spans_3R, tiles_X2) if sizes.requests else None
        step = DeviceStep(
            self.keys, self.values, self.kernels, slots_T, self._tables_RN, lengths_T[:rows],
            inputs_3T[2, :rows], sizes.bound, 64 if self.deterministic or rows <= FEW_ROWS else 256, chunks,
        )  # fmt: skip
        every = sizes.kept == rows and not sizes.tokens
        return self.model(
            input_ids=ids_T[None],
            position_ids=positions_T[None] if position_ids_T is None else position_ids_T[None],
            use_cache=False, logits_to_keep=0 if every else keep_K.long(), packed=step,
        ).logits[0]  # fmt: skip


def _greedy(request: Request) -> bool:
    """Whether its next token is the likeliest, with nothing else asked for."""
    known = len(request.tokens) + request.pending - request.prompt_len
    return request.greedy and (known >= request.params.min_new_tokens or not request.stop_ids)
