"""Steps whose tokens stay on the device, so that the next step is launched before the host has read this one's.

A token that the device has chosen and the host has not seen is *pending*: the next step's input names it by where it
lies, and everything else that a step needs (positions, pages, who runs) the host knows without it. Steps in which
every request computes one token are CUDA graphs. All of it but the capture also runs on a CPU.

Steps with longer chunks are launched kernel by kernel. By arithmetic, not measurement: ten launches of 8 us a layer
are 2 ms for 24 layers, which a 0.5B model's matrix products alone take from 1,100 tokens on (at half of 790 TFLOP/s),
and reading a 7B model's weights takes 3 ms; so graphs could only shorten the TTFT of a short prompt that comes nearly
alone to a small model, by 2 ms at most, and there would be one for every number of tokens, tiles, rows and last tokens.

T tokens of the step, B rows of one token (they come first), R requests, X table entries, V vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from engine.attention.device import DeviceStep
from engine.attention.paged import Options
from engine.errors import InputError
from engine.models import kv_shape, positions, ropes
from engine.pages import PagePool
from engine.request import Request
from engine.runner import Done, Runner, StepResult, Ticket
from engine.runner.fused_layer import fuse
from engine.runner.linear import join, prepare
from engine.runner.packed import PackedRunner, check_equal, packed_twin, probe, refuse_unpackable
from engine.sampler import Choice, sample
from engine.scheduler import Step

LOG = logging.getLogger(__name__)
BOUND = 1024  # least context that a graph's grid is made for; more in powers of four
FEW_ROWS = 32  # up to so many rows, short splits are needed to fill a GPU


def bucket(rows: int) -> int:
    """How many rows the graph for `rows` rows has: the next power of two, multiple of 8, or (beyond 160) of 16."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    unit = 8 if rows <= 160 else 16
    return -(-rows // unit) * unit


class InFlight:
    """A step under way whose tokens are still on the device.

    Args:
        tokens_B: of every output row, on their way to the host; -1 for a row that is not sound. `done` says when.
        rows: the output row of each request of the step, None where more of its tokens must be computed first.
        result: everything else about the step.
    """

    late = True  # the next step may be launched before `collect`

    def __init__(
        self,
        tokens_B: torch.Tensor,
        done: torch.cuda.Event | None,
        rows: list[int | None],
        result: Callable[[list], StepResult],
    ) -> None:
        self._tokens_B, self._done, self._rows, self._result = tokens_B, done, rows, result

    def collect(self) -> StepResult:
        """Wait for the step and give its tokens."""
        if self._done is not None:
            self._done.synchronize()
        tokens = self._tokens_B.tolist()
        return self._result([None if row is None else _choice(tokens[row]) for row in self._rows])


def _choice(token: int) -> Choice:
    return Choice(token) if token >= 0 else Choice(None, error="the model gave logits that are NaN or infinite")


class DeviceRunner(Runner):
    """The packed runner for a GPU: kernels over pages, CUDA graphs, tokens that need not come to the host.

    Args:
        model, pool, deterministic: as for PackedRunner. Deterministic steps attend every token as a row of its own,
            cut by its own length alone.
        rows: requests that share a step, at most.
        kernels: what else has the functions of `triton_kernels` and shall compute instead of them; on a CPU these run
            in Triton's interpreter only.

    Raises:
        InputError: for a model that cannot run packed.
    """

    def __init__(
        self, model: PreTrainedModel, pool: PagePool, deterministic: bool = False, rows: int = 32, kernels: Any = None
    ) -> None:
        refuse_unpackable(model)
        if any("dynamic" in rope["rope_type"] for rope in ropes(model.config)):
            raise InputError(f"{type(model).__name__} has dynamic RoPE, which reads every step's positions on the host")
        self.pool, self.deterministic, self.device = pool, deterministic, model.device
        self.model = packed_twin(model)
        self.copied_bytes = prepare(join(self.model, deterministic))
        layers, kv_heads, head_dim = kv_shape(model.config)
        shape = (pool.pages, kv_heads, pool.page_size, head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(layers)] for _ in range(2)
        )
        self.kernels = kernels or triton_kernels()
        self._columns = min(pool.pages, -(-positions(model.config)[0] // pool.page_size))
        self._tables_RN = torch.zeros(rows, self._columns, dtype=torch.int32, device=self.device)
        most = bucket(rows)
        self._inputs = torch.zeros(3 * most, dtype=torch.int32, device=self.device)
        self._last_B = torch.zeros(most, dtype=torch.int64, device=self.device)  # the tokens of the step before
        self._sources: dict[Request, int] = {}  # whose they are
        self._lines: dict[Request, tuple[int, list[int], int]] = {}  # line of the tables, its pages, how many are there
        self._free_lines = list(range(rows))[::-1]
        self._graphs: dict[tuple[int, int, bool], Callable[[], torch.Tensor | None]] = {}
        self._page_bytes = sum(store[0].nbytes for store in (*self.keys, *self.values))
        self._sampled_BV: torch.Tensor | None = None  # logits of a step that is not greedy, for one graph at a time
        cuda = self.device.type == "cuda"
        self._here = torch.cuda.device(self.device if cuda else -1)  # Triton launches where torch's current device is
        # One stream and one pool for all captures, or each would keep a workspace of cuBLAS and memory of its own.
        self._side: Any = torch.cuda.Stream(self.device) if cuda else None
        self._memory: Any = torch.cuda.graph_pool_handle() if cuda else None
        with self._here:
            self._fuse(model)

    @torch.inference_mode()
    def _fuse(self, model: PreTrainedModel) -> None:
        """Replace what fused kernels equal, and prove on a few tokens that the model still computes the same.

        Raises:
            InputError: if steps on the device give other logits than `model` even without that.
        """
        tokens, expected_TV = probe(model, min(24, self.pool.pages * self.pool.page_size))
        ids_T = np.array(tokens)
        options = self._prove(ids_T, expected_TV)
        stream, undo = fuse(self.model, options, self.kernels, self._columns * self.pool.page_size)
        few, stream.few = stream.few, 0
        try:
            self._prove(ids_T, expected_TV)
        except InputError as error:
            LOG.warning("%s; its layers run as they are", error)
            undo()
            return
        if few:
            try:
                stream.few = few
                self._prove(ids_T, expected_TV)
            except InputError as error:
                LOG.warning("%s; steps of few rows take the same products as others", error)
                stream.few = 0

    def _prove(self, ids_T: np.ndarray, expected_TV: torch.Tensor) -> dict[int, Options]:
        """Compute tokens as a chunk, a chunk with a past and one alone; gives the options of each layer's attention.

        Raises:
            InputError: if logits differ from those expected, or whatever else the model or a compiler raises.
        """
        tokens, found = len(ids_T), []
        self._tables_RN[0, : -(-tokens // self.pool.page_size)] = torch.arange(-(-tokens // self.pool.page_size))
        options: dict[int, Options] = {}
        for begin, end in itertools.pairwise(sorted({0, tokens // 2, tokens - 1, tokens})):
            inputs_3T = np.stack([ids_T[begin:end], np.arange(begin, end), np.zeros(end - begin, dtype=int)])
            spans_3R = np.array([[0], [end - begin], [begin]])
            try:
                found.append(self._mixed(inputs_3T, spans_3R, np.zeros(1), list(range(end - begin)), options))
            except Exception as error:
                raise InputError(f"{type(self.model).__name__} cannot run packed: {error}") from error
        check_equal(self.model, "on the device", torch.cat(found), expected_TV)
        return options

    def run(self, step: Step) -> StepResult:
        """Compute a step and wait for it."""
        return self.launch(step).collect()

    def launch(self, step: Step) -> Ticket:
        """Start a step; the ticket's `collect` gives its result.

        Of a request's tokens the last may be pending, chosen by the step launched just before. Where all requests of
        the step take the likeliest token, nothing is waited for; else the ticket holds tokens that are here already.
        """
        with self._here, torch.inference_mode():
            return self._launch(step)

    def _launch(self, step: Step) -> Ticket:
        started = time.perf_counter()
        self.pool.dirty.clear()  # no kernel reads beyond what its request has written
        rows_first = step if all(count == 1 for _, count in step) else sorted(step, key=lambda item: item[1] > 1)
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
        inputs_3T = np.stack([np.array(ids), positions_T, lines_T])
        if len(ids) == len(step):
            at = {request: ends[request] - 1 for request in ready}
            logits_BV = self._replay(inputs_3T, int(positions_T.max()) + 1, greedy)
            logits_RV = logits_BV if greedy or logits_BV is None else logits_BV[[at[request] for request in ready]]
        else:
            at = {request: row for row, request in enumerate(ready)}
            spans_3R = np.stack([ends_R - counts_R, ends_R, computed_R])
            logits_RV = self._mixed(inputs_3T, spans_3R, lines_R, [ends[request] - 1 for request in ready])
            if greedy and ready:
                self._last_B[: len(ready)] = self.kernels.best_tokens(logits_RV)
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
        assert logits_RV is not None
        by_request = dict(zip(ready, sample(logits_RV, ready), strict=True))
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
            line_X, column_X, page_X = self._upload(*np.array(fresh).T)
            self._tables_RN[line_X, column_X] = page_X
        return np.array(lines)

    def _upload(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """Arrays of integers on the device as int32, by one copy that is not waited for; each begins aligned."""
        flat = [np.pad(array.ravel(), (0, -array.size % 4)) for array in arrays]
        together = self._pinned(np.concatenate(flat)).to(self.device, non_blocking=True)
        parts = together.split([len(part) for part in flat])
        return [part[: array.size].view(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def _pinned(self, array: np.ndarray) -> torch.Tensor:
        """An array of integers as int32, in memory that a GPU reads by itself; torch keeps it until that is done."""
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _replay(self, inputs_3T: np.ndarray, length: int, greedy: bool) -> torch.Tensor | None:
        """Compute rows of one token; their tokens are in `_last_B` then, or if not greedy, gives logits [B, V]."""
        rows = bucket(inputs_3T.shape[1])
        bound, most = BOUND, self._columns * self.pool.page_size
        while bound < min(length, most):
            bound *= 4
        key = (rows, min(bound, most), greedy)
        if key not in self._graphs:
            self._graphs[key] = self._captured(*key)
        padded_3B = np.tile(np.array([[0], [-1], [0]]), rows)  # a row of no length, which writes no key and no value
        padded_3B[:, : inputs_3T.shape[1]] = inputs_3T
        self._inputs[: 3 * rows].copy_(self._pinned(padded_3B).view(-1), non_blocking=True)
        return self._graphs[key]()

    def _captured(self, rows: int, max_length: int, greedy: bool) -> Callable[[], torch.Tensor | None]:
        """A call that computes `rows` rows from `_inputs`: on CUDA a graph, in one memory pool with all others."""

        def compute() -> torch.Tensor | None:
            logits_BV = self._logits(self._inputs[: 3 * rows].view(3, rows), rows, max_length, None, 0)
            if greedy:
                self._last_B[:rows] = self.kernels.best_tokens(logits_BV)
                return None
            if self._sampled_BV is None:
                self._sampled_BV = logits_BV.new_empty(len(self._last_B), logits_BV.shape[1])
            return self._sampled_BV[:rows].copy_(logits_BV)

        if self.device.type != "cuda":
            return compute
        started, kept_B = time.perf_counter(), self._last_B.clone()
        self._inputs.fill_(-1)
        self._inputs[2 * rows : 3 * rows] = 0
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):  # compiles kernels and makes libraries' workspaces, which a capture may not
            compute()
        torch.cuda.current_stream().wait_stream(self._side)
        self._last_B.copy_(kept_B)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._memory, self._side, capture_error_mode="thread_local"):
            logits_BV = compute()
        LOG.info("captured %d rows of up to %d tokens in %.2f s", rows, max_length, time.perf_counter() - started)

        def replay() -> torch.Tensor | None:
            graph.replay()
            return logits_BV

        return replay

    def _mixed(
        self,
        inputs_3T: np.ndarray,
        spans_3R: np.ndarray,
        lines_R: np.ndarray,
        keep: list[int],
        options: dict[int, Options] | None = None,
    ) -> torch.Tensor:
        """Logits [len(keep), V] of the tokens at `keep`, where requests may compute several; those of one come first.

        spans_3R: where in the step each request's tokens begin and end, and how many precede them.
        """
        rows, chunks, several = inputs_3T.shape[1], None, []
        if not self.deterministic:
            rows = int((spans_3R[1] - spans_3R[0] == 1).sum())  # they come first
            several = [lines_R[rows:], *spans_3R[:, rows:], self._tiles(spans_3R[:, rows:])]
        inputs, keep_B, *several = self._upload(inputs_3T, np.array(keep), *several)
        if several and len(several[0]):
            lines, *rest = several
            chunks = (self._tables_RN[lines], *rest)
        length = int(inputs_3T[1, :rows].max()) + 1 if rows else 1
        return self._logits(inputs, rows, length, chunks, keep_B.long(), options)

    def _tiles(self, spans_3R: np.ndarray) -> np.ndarray:
        """The work of `attend_chunks`, [X, 2]: the longest contexts come first."""
        kv_heads, _, head_dim = self.keys[0].shape[1:]
        groups = self.model.config.get_text_config(decoder=True).num_attention_heads // kv_heads
        each = self.kernels.chunk_tokens(groups, head_dim, self.keys[0].element_size())
        begins_R, ends_R, computed_R = spans_3R
        first = [np.arange(begin, end, each) for begin, end in zip(begins_R, ends_R, strict=True)]
        request_X = np.repeat(np.arange(len(first)), [len(tokens) for tokens in first])
        first_X = np.concatenate([*first, np.zeros(0, dtype=int)])
        order_X = np.argsort((begins_R - computed_R)[request_X] - first_X, kind="stable")
        return np.stack([request_X, first_X], 1)[order_X]

    def _logits(
        self,
        inputs_3T: torch.Tensor,
        rows: int,
        max_length: int,
        chunks: tuple[torch.Tensor, ...] | None,
        keep: torch.Tensor | int,
        options: dict[int, Options] | None = None,
    ) -> torch.Tensor:
        """The model's logits for tokens given by id (or where a pending one lies), position and line of the tables."""
        size = self.pool.page_size
        ids_T, positions_T, slots_T, lengths_T = self.kernels.step_inputs(
            inputs_3T, self._last_B, self._tables_RN, size
        )
        step = DeviceStep(
            self.keys, self.values, self.kernels, slots_T, self._tables_RN, lengths_T[:rows], inputs_3T[2, :rows],
            max_length, 64 if self.deterministic or rows <= FEW_ROWS else 256, chunks,
            {} if options is None else options,
        )  # fmt: skip
        return self.model(
            input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False, logits_to_keep=keep, packed=step
        ).logits[0]


def _greedy(request: Request) -> bool:
    """Whether its next token is the likeliest, with nothing else asked for."""
    known = len(request.tokens) + request.pending - request.prompt_len
    return request.greedy and (known >= request.params.min_new_tokens or not request.stop_ids)


def packed_runner(model: PreTrainedModel, pool: PagePool, deterministic: bool, rows: int, int8: bool = False) -> Runner:
    """The packed runner for the model's device; `rows` requests share a step at most; int8 is for a CPU.

    Raises:
        InputError: for a model that cannot run packed.
    """
    if model.device.type == "cuda" and model.dtype.itemsize <= 4:  # no kernel computes in float64
        return DeviceRunner(model, pool, deterministic, rows)
    return PackedRunner(model, pool, deterministic, int8)


def triton_kernels() -> Any:
    """What a device step calls, as Triton kernels; imported when needed, since a CPU can do without Triton."""
    from engine.attention import kernels, write
    from engine.runner import fused, thin

    rooms = kernels, write, fused, thin
    return SimpleNamespace(**{name: value for room in rooms for name, value in vars(room).items()})
