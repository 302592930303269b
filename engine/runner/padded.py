"""The padded runner: Transformers' own cache, attention and masks, with as little padding as a rectangle
allows.

A batch is a rectangle of rows (requests) and columns (positions), left-padded so that every row ends in the
same column: the last column holds each row's last real token, and one more column is one decode step. Rows
are never in two batches at once. It works with every causal LM whose cache is keys and values, and is the
baseline and the oracle.

Three things keep the rectangle cheap without touching the model: keys and values are written in place into
buffers allocated once a batch (Transformers' DynamicCache copies the whole cache at every step); rows that
leave are filled from the end and columns that only they used are cut off, as views; and a prefill of uneven
prompts runs as a staircase of passes, long rows first, where that costs less than the padding it avoids.
"""

from __future__ import annotations

import inspect
import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from engine.kv_pool import RowPool
from engine.models import positions, refuse_other_state
from engine.models.errors import refused
from engine.request import Request, ResolvedParams
from engine.runner import Runner
from engine.runner.verify import check_equal, check_finite, proof_text
from engine.sampling import sample
from engine.scheduler import Step
from engine.step import Done, StepResult, Ticket

# What one more forward pass costs, in tokens of prefill: it reads all weights again. Measured on a CPU at
# about 20; on a GPU a pass of a small model costs as much as some hundreds of tokens.
PASS_TOKENS = {"cpu": 32, "cuda": 1024}
PAD = 0  # the token where a row has none: it changes nothing, but is computed
# Of the proof at load: its text, the prompts of its requests and after how many steps each leaves, positions
# of a pass.
PROOF_TOKENS, PROOF_LENGTHS, PROOF_LEAVES, PROOF_STEP = 14, (10, 6, 3), (1, 2, 2), 6
PROOF_FAR, FAR_COLUMNS = 6, 8192  # tokens of the text behind so many columns of padding


class RowLayer(DynamicLayer):
    """One layer's keys and values, [rows, K heads, columns, D], in place; `keys` and `values` are views of
    it.

    Only `update` differs from Transformers' DynamicLayer, so masks and lengths are derived by Transformers
    itself.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.shape = rows, columns
        self.origin = (0, 0, 0)

    def window(self, rows: int, first: int, column: int) -> None:
        """Show the model the first `rows` rows and the columns from `first` to before `column`."""
        self.origin = rows, first, column
        if self.is_initialized:
            self.keys, self.values = (buffer[:rows, :, first:column] for buffer in self.buffers)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        rows, columns = self.shape
        # Zeros, because what a mask hides is still multiplied: by zero, which does not hide a NaN.
        self.buffers = [
            s.new_zeros(rows, s.shape[1], columns, s.shape[3]) for s in (key_states, value_states)
        ]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, first, column = self.origin
        end = column + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, column:end] = states
        self.window(rows, first, end)
        return self.keys, self.values  # type: ignore[return-value]

    def move(self, source: int, target: int) -> None:
        """Copy one row over another, in the columns in use."""
        _, first, column = self.origin
        for buffer in self.buffers if self.is_initialized else ():  # a layer may read another's
            buffer[target, :, first:column] = buffer[source, :, first:column]


class BlankLayer(DynamicLayer):
    """One layer's keys and values of so many columns of padding, which take no memory, before those of one
    pass."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns

    def get_seq_length(self) -> int:
        """How many columns come before those of the pass."""
        return self.columns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The pass's keys and values behind zeros; nothing is kept."""
        keys, values = (
            torch.cat(
                [states.new_zeros(()).expand(*states.shape[:2], self.columns, states.shape[3]), states], 2
            )
            for states in (key_states, value_states)
        )
        return keys, values


class PaddedRunner(Runner):
    """Runs one batch at a time, from the prefill of all its rows to the end of the last.

    Args:
        model: a causal LM in eval mode whose cache layers are all full or sliding-window attention.
        max_step_tokens: positions one forward pass computes at most (but at least one column).
        memory: the accounting of keys and values.

    Raises:
        InputError: for an encoder-decoder or a model with state besides keys and values.
    """

    def __init__(self, model: PreTrainedModel, max_step_tokens: int, memory: RowPool) -> None:
        refuse_other_state(model)
        self.model = model
        self.max_step_tokens = max_step_tokens
        self.memory = memory
        self.pass_tokens = PASS_TOKENS.get(model.device.type, PASS_TOKENS["cuda"])
        takes = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in takes
        self._keep_last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._rows: list[Request] = []
        self._starts = np.zeros(0, dtype=np.int64)  # the column of each row's first token
        self._column = 0  # columns computed
        self._cache: Cache | None = None
        self._layers: list[RowLayer] = []
        self._prove()

    @torch.inference_mode()
    def _prove(self) -> None:
        """Compute requests of unlike length together, and compare with the model's own logits of their text.

        Their prompts are cut into several passes and padded, and the longest and the next leave before the
        last. That says whether a model looks ahead, and whether it counts positions from a row's first token.

        Raises:
            InputError: if the logits differ, or for whatever the model raises.
        """
        text = proof_text(self.model, PROOF_TOKENS)
        kept = self.max_step_tokens, self.pass_tokens
        self.max_step_tokens, self.pass_tokens = PROOF_STEP, 1
        with refused(self.model, "be padded"):
            ids_1T = torch.tensor([text], device=self.model.device)
            expected_TV = check_finite(self.model, self.model(ids_1T, use_cache=False).logits[0])
            params = ResolvedParams(max_new_tokens=1 + sum(PROOF_LEAVES))
            requests = [Request(f"proof-{n}", n, params, text[:n]) for n in PROOF_LENGTHS]
            for steps in PROOF_LEAVES:
                for _ in range(steps):
                    _, logits_BV, _ = self._compute(requests)
                    rows = [self._rows.index(request) for request in requests]
                    expected_BV = expected_TV[[len(request.tokens) - 1 for request in requests]]
                    check_equal(self.model, "when padded", logits_BV[rows], expected_BV)
                    for request in requests:
                        request.tokens.append(text[len(request.tokens)])
                requests = requests[1:]
            self._prove_far(ids_1T[:, :PROOF_FAR], expected_TV[:PROOF_FAR])
        self.max_step_tokens, self.pass_tokens = kept
        self._rows, self._cache, self._layers = [], None, []

    def _prove_far(self, ids_1T: torch.Tensor, expected_TV: torch.Tensor) -> None:
        """Compute a text behind so much padding that what begins at some column, such as a temperature, has
        begun."""
        tokens = ids_1T.shape[1]
        columns = max(0, min(positions(self.model.config)[0], FAR_COLUMNS + tokens) - tokens)
        cache = DynamicCache(config=self.model.config)
        cache.layers = [BlankLayer(columns) for _ in cache.layers]
        mask_1C = torch.ones(1, columns + tokens, dtype=torch.long, device=ids_1T.device)
        mask_1C[:, :columns] = 0
        own = (
            {"position_ids": torch.arange(tokens, device=ids_1T.device)[None]}
            if self._takes_positions
            else {}
        )
        logits_1TV = self.model(
            ids_1T, attention_mask=mask_1C, past_key_values=cache, use_cache=True, **own
        ).logits
        check_equal(self.model, "when padded far", logits_1TV[0], expected_TV)

    @torch.inference_mode()
    def launch(self, step: Step) -> Ticket[StepResult]:
        """Compute a step. Its requests are either all in the present batch, or all new: then they start the
        next.

        Raises:
            ValueError: for a step that mixes the two, which the policies for this runner never plan.
        """
        requests = [request for request, _ in step]
        passes, logits_BV, seconds = self._compute(requests)
        started = time.perf_counter()
        choices = sample(logits_BV, self._rows)
        seconds += time.perf_counter() - started
        useful, positions = (
            sum(count for _, count in step),
            sum(rows * (end - begin) for rows, begin, end in passes),
        )
        by_request = dict(zip(self._rows, choices, strict=True))
        result = StepResult(
            choices=[by_request[request] for request in requests],
            forward_passes=len(passes),
            tokens_computed=useful,
            padded_tokens=positions - useful,
            model_s=seconds,
            kv_bytes=sum(buffer.nbytes for layer in self._layers for buffer in getattr(layer, "buffers", ())),
        )
        return Done(result)

    def _compute(self, requests: list[Request]) -> tuple[list[tuple[int, int, int]], torch.Tensor, float]:
        """Compute what these requests lack; gives the passes, the last logits of each row [B, V], and the
        seconds."""
        known = set(self._rows)
        if known.isdisjoint(requests):
            self._start(requests)
            passes = self._staircase()
        elif known.issuperset(requests):
            self._compact(set(requests))
            passes = [(len(self._rows), self._column, self._column + 1)]
        else:
            raise ValueError("the padded runner cannot add requests to a batch that has started")
        seconds = 0.0
        for rows, begin, end in passes:
            inputs = self._inputs(rows, begin, end)
            started = time.perf_counter()
            logits_BTV = self.model(
                **inputs, past_key_values=self._cache, use_cache=True, **self._keep_last
            ).logits
            seconds += time.perf_counter() - started
        self._column = end
        return passes, logits_BTV[:, -1], seconds

    def _start(self, requests: list[Request]) -> None:
        """Lay out the next batch: longest row first, so that the rows of every pass are the first ones."""
        self._cache, self._layers = None, []  # the last batch's memory goes before the next one's comes
        self._rows = sorted(requests, key=lambda request: -len(request.tokens))
        width = len(self._rows[0].tokens)
        columns = width + max(request.max_positions - len(request.tokens) for request in requests)
        self._starts = np.array([width - len(request.tokens) for request in self._rows])
        self._column = 0
        self._cache = DynamicCache(config=self.model.config)
        self._layers = [RowLayer(len(requests), columns) for _ in self._cache.layers]
        self._cache.layers = list(self._layers)

    def _staircase(self) -> list[tuple[int, int, int]]:
        """The passes (rows, begin, end) of least cost that prefill the batch.

        A pass over columns [begin, end) takes every row that has a token there, so boundaries lie where a row
        starts. Dynamic programming over those starts: for all columns before each of the `edges`, `plans` has
        the least cost and the boundaries that have it.
        """
        width = int(self._starts[0]) + len(self._rows[0].tokens)
        edges = [*(int(start) for start in np.unique(self._starts) if start > self._starts[0]), width]
        plans = [(0, [0])]
        for edge in edges:
            rows = int(np.searchsorted(self._starts, edge))
            costs = [cost + self.pass_tokens + rows * (edge - bounds[-1]) for cost, bounds in plans]
            best = int(np.argmin(costs))
            plans.append((costs[best], [*plans[best][1], edge]))
        passes = []
        for begin, end in pairwise(plans[-1][1]):
            stride = max(1, self.max_step_tokens // int(np.searchsorted(self._starts, end)))
            for at in range(begin, end, stride):
                to = min(at + stride, end)
                passes.append((max(1, int(np.searchsorted(self._starts, to))), at, to))
        return passes

    def _inputs(self, rows: int, begin: int, end: int) -> dict[str, torch.Tensor]:
        """Token ids, position ids and attention mask of one pass, and the cache's window set to match."""
        starts = self._starts[:rows, None]
        # A model that is told no positions counts them by columns: it must go on seeing all of them.
        first = min(begin, int(starts.min())) if self._takes_positions else 0
        ids = np.full((rows, end - begin), PAD, dtype=np.int64)
        for row, request in enumerate(self._rows[:rows]):
            start = int(self._starts[row])
            ids[row, max(0, start - begin) :] = request.tokens[max(0, begin - start) : end - start]
        for layer in self._layers:
            layer.window(rows, first, begin)
        arrays = {"input_ids": ids}
        if self._takes_positions:
            arrays["position_ids"] = np.maximum(np.arange(begin, end) - starts, 0)
        if starts.max() > first:
            arrays["attention_mask"] = (np.arange(first, end) >= starts).astype(np.int64)
        return {name: torch.from_numpy(array).to(self.model.device) for name, array in arrays.items()}

    def _compact(self, staying: set[Request]) -> None:
        """Close the gaps of rows that have left with rows from the end."""
        for row in reversed(range(len(self._rows))):
            if self._rows[row] not in staying:
                end = len(self._rows) - 1
                for layer in self._layers if row < end else ():
                    layer.move(end, row)
                self._rows[row], self._starts[row] = self._rows[end], self._starts[end]
                del self._rows[end]
        self._starts = self._starts[: len(self._rows)]
