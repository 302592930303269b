"""The main job: one workload through several ways of batching it, in one run, on one model.

`generate` is Transformers' own `model.generate`, one prompt at a time; every other way is a policy of the engine.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from engine.config import POLICIES, EngineConfig
from engine.engine import Engine
from engine.errors import InputError
from engine.metrics import EngineMetrics
from engine.models import LoadedModel
from engine.request import FinishReason, Request, RequestOutput, SamplingParams, check_integer
from engine.workload import Workload

ALONE = ("generate", "sequential")


@dataclass(frozen=True, slots=True)
class Run:
    """One workload through one way of batching: outputs in the workload's order, and what was measured."""

    policy: str
    batch_size: int
    outputs: list[RequestOutput]
    metrics: EngineMetrics


def ways(policies: Sequence[str], batch_sizes: Sequence[int]) -> list[tuple[str, int]]:
    """The (policy, batch size) pairs to compare: unbatched policies once, the others at every size above 1.

    Raises InputError for an unknown policy, a batch size below 1, or nothing to run.
    """
    for policy in policies:
        if policy not in (known := ("generate", *POLICIES)):
            raise InputError(f"policies has {policy!r}: choose from {', '.join(known)}")
    for size in batch_sizes:
        check_integer("batch-sizes", size, 1)
    pairs = [(p, size) for p in policies for size in ([1] if p in ALONE else batch_sizes) if size > 1 or p in ALONE]
    if not pairs:
        raise InputError("nothing to run: give policies, and a batch size above 1 for those that batch")
    return list(dict.fromkeys(pairs))


def bench(
    loaded: LoadedModel, workload: Workload, pairs: Sequence[tuple[str, int]], config: EngineConfig, rounds: int = 1
) -> Iterator[Run]:
    """Run every (policy, batch size) pair, and again for each round, so that a drifting machine drifts for all.

    Raises KeyboardInterrupt when a run was interrupted, InputError when a request of it failed: neither is a result.
    """
    warm = Engine(loaded, config)  # nobody pays for the first touch of weights and code
    warm.generate([[1] * 8] * 2, SamplingParams(max_new_tokens=4), progress=False)
    for _ in range(rounds):
        for policy, size in pairs:
            if policy == "generate":
                yield Run(policy, size, *_generate_one_by_one(warm, workload))
            else:
                engine = Engine(loaded, replace(config, policy=policy, max_batch_size=size))
                outputs = engine.replay(workload.items, progress=False)
                for output in outputs:
                    if output.finish_reason is FinishReason.ABORT:
                        raise KeyboardInterrupt
                    if output.finish_reason is FinishReason.ERROR:
                        raise InputError(f"{policy} at batch size {size}: {output.request_id} failed: {output.error}")
                yield Run(policy, size, outputs, engine.metrics)


def _generate_one_by_one(engine: Engine, workload: Workload) -> tuple[list[RequestOutput], EngineMetrics]:
    metrics, outputs, start = EngineMetrics(), list[RequestOutput](), time.perf_counter()
    for index, item in enumerate(workload.items):
        arrival = start + item.arrival_s
        time.sleep(max(0.0, arrival - time.perf_counter()))
        tokens, now = engine.encode(item.prompt), time.perf_counter()
        stops = frozenset() if item.params.ignore_eos else engine.eos_ids
        request = Request(f"request-{index}", len(tokens), item.params, tokens, stops, arrival=arrival, scheduled=now)
        ids = torch.tensor([tokens], device=engine.model.device)
        engine.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=item.params.max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,  # a model may bring its own, which the engine's greedy decoding does not apply
            eos_token_id=sorted(stops) or None,
            pad_token_id=0,
            streamer=_Clock(request),
        )
        outputs.append(request.close(None, request.token_times[-1]))
        metrics.records.append(outputs[-1].metrics)
    counters, passes = metrics.counters, sum(len(output.token_ids) for output in outputs)
    counters.output_tokens = counters.steps = counters.forward_passes = counters.batch_sizes[1] = passes
    counters.tokens_computed = passes + sum(len(output.prompt_token_ids) - 1 for output in outputs)
    return outputs, metrics


class _Clock:
    """A streamer: Transformers hands it the prompt, then each token once that is on the host."""

    def __init__(self, request: Request) -> None:
        self.request, self.prompt_seen = request, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.request.append(int(value.flatten()[0]), time.perf_counter())
        self.prompt_seen = True

    def end(self) -> None:
        """The last token has been handed over already."""


def environment(loaded: LoadedModel) -> dict[str, Any]:
    """What the numbers depend on besides the code, and the most memory this process held, in bytes."""
    device = loaded.model.device
    cuda, peak = device.type == "cuda", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "model": loaded.spec,
        "revision": loaded.revision,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "weight_bytes": sum(p.nbytes for p in loaded.model.parameters()),
        "peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "peak_cuda_bytes": torch.cuda.max_memory_allocated(device) if cuda else 0,
    }
