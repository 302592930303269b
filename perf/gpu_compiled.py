"""Decode with the packed model compiled by TorchInductor in place of our fused layers: the other way to few
kernels.

The whole model is one graph, in the same CUDA graphs as ours. Attention is an operator that the compiler does
not look into; it finds the step where the runner keeps it, for a graph that took it as an argument would be
guarded on all that a step holds. Only steps of one token a row are compiled, anew for each number of rows.
For a model of plain attention.

T tokens of the step, H query heads, K KV heads, D head size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from transformers import AttentionInterface, PreTrainedModel

from engine.attention.device import DeviceStep
from engine.attention.paged import Options
from engine.pages import PagePool
from engine.runner.graphs import DeviceRunner
from engine.runner.verify import check_equal

NAME = "dynamic_batch_opaque"
_step: list[DeviceStep] = []  # the one under way: an operator is known by name to the whole process


@torch.library.custom_op("dynamic_batch::attend", mutates_args=())
def _opaque(q_1HTD: torch.Tensor, k_1KTD: torch.Tensor, v_1KTD: torch.Tensor, layer: int) -> torch.Tensor:
    q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (q_1HTD, k_1KTD, v_1KTD))
    return _step[0].attend(layer, q_THD, k_TKD, v_TKD, Options(1.0))[None]


@_opaque.register_fake
def _shape(q_1HTD: torch.Tensor, k_1KTD: torch.Tensor, v_1KTD: torch.Tensor, layer: int) -> torch.Tensor:
    return q_1HTD.new_empty(q_1HTD.transpose(1, 2).shape)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: None,
    scaling: float,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What a model calls as its attention."""
    return _opaque(query * scaling, key, value, module.layer_idx), None


AttentionInterface.register(NAME, attend)


class CompiledRunner(DeviceRunner):
    """A DeviceRunner whose model is compiled; `compile_s` is what that took, with a first run.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, *args: Any, backend: str = "inductor", **options: Any) -> None:
        self.backend, self.compile_s = backend, 0.0
        super().__init__(*args, **options)

    def _fuse(self, model: PreTrainedModel) -> None:
        self.model.set_attn_implementation(NAME)
        eager: Callable = self.model.forward
        compiled = torch.compile(eager, dynamic=False, backend=self.backend)
        seen = set()

        def forward(packed: DeviceStep, logits_to_keep: Any, **inputs: Any) -> Any:
            _step[:] = [packed]
            rows = inputs["input_ids"].shape[1]
            if not isinstance(logits_to_keep, int):  # a step with chunks
                return eager(logits_to_keep=logits_to_keep, **inputs)
            if rows in seen:
                return compiled(**inputs)
            seen.add(rows)
            started = time.perf_counter()
            output = compiled(**inputs)
            check_equal(self.model, "when compiled", output.logits[0], eager(**inputs).logits[0].double())
            self.compile_s += time.perf_counter() - started
            return output

        self.model.forward = forward


def decode(bench: Any, batch: int, **options: Any) -> dict[str, Any]:
    """`bench.decode` of its main model, compiled, and what compiling it took: seconds, and graphs (1 is all
    of it)."""
    made: list[CompiledRunner] = []

    def runner(
        model: PreTrainedModel, pool: PagePool, deterministic: bool, rows: int, int8: bool
    ) -> CompiledRunner:
        made.append(CompiledRunner(model, pool, deterministic, rows, **options))
        return made[-1]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    bench.free()
    try:
        with mock.patch("engine.engine.packed_runner", runner):
            row = bench.decode(bench.main, batch)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return {**row, "compile_s": sum(r.compile_s for r in made), "graphs": graphs}
    finally:
        made.clear()
        _step.clear()
        bench.free()
        torch._dynamo.reset()
