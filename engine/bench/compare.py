"""The comparison itself: one workload on one model, by several policies at several batch sizes.

`generate` is Transformers' own `model.generate`, one prompt at a time at batch size 1 and on padded batches
above; all else are policies of the engine.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from engine.bench.options import GENERATE
from engine.bench.workload import Workload
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import InputError
from engine.metrics import EngineMetrics
from engine.models import LoadedModel
from engine.progress import Progress
from engine.request import FinishReason, Request, RequestOutput, SamplingParams, StreamChunk, WorkItem
from engine.runner.memory import peak_bytes
from engine.step import Choice, StepResult


@dataclass(frozen=True, slots=True)
class Run:
    """One workload by one policy at one batch size: outputs in the workload's order, and what was measured.

    `copied_bytes` are weights held a second time, in an order that suits the machine's products.
    """

    policy: str
    batch_size: int
    outputs: list[RequestOutput]
    metrics: EngineMetrics
    copied_bytes: int = 0


def compare(
    loaded: LoadedModel,
    workload: Workload,
    combinations: Sequence[tuple[str, int]],
    config: EngineConfig,
    rounds: int = 1,
    progress: Progress | None = None,
) -> Iterator[Run]:
    """Run every (policy, batch size), and again for each round, so that a drifting machine drifts for all.

    What a request leaves open is greedy, whatever the model's generation_config says, in every run alike.

    Args:
        progress: where to say how far it is; shown nowhere if None.

    Raises:
        KeyboardInterrupt: when a run was interrupted, which is no result.
        InputError: when a request of a run failed, which is none either.
    """
    progress = progress or Progress("", shown=False)
    config = replace(config, generation_config="none")
    # nobody pays for the first touch of weights and code
    warm = Engine(loaded, replace(config, policy="sequential"))
    warm.generate([[1] * 8] * 2, SamplingParams(max_new_tokens=4), progress=False)
    most = sum(item.params.resolved({}).max_new_tokens for item in workload.items)
    for number, (policy, size) in enumerate([*combinations] * rounds, 1):
        what = f"run {number} of {len(combinations) * rounds}, {policy} at batch size {size}"
        if policy == GENERATE:
            progress.begin(what, most, "tokens")
            yield Run(policy, size, *transformers_generate(warm, workload.items, size, progress.advance))
            continue
        progress.begin(f"{what}: preparing")
        engine = Engine(loaded, replace(config, policy=policy, max_batch_size=size, metrics_window=None))
        progress.begin(what, most, "tokens")
        outputs = engine.replay(workload.items, progress=False, on_step=partial(_count, progress))
        if any(output.finish_reason is FinishReason.ABORT for output in outputs):
            raise KeyboardInterrupt
        if failed := next((output for output in outputs if output.error is not None), None):
            raise InputError(f"{policy} at batch size {size}: {failed.request_id} failed: {failed.error}")
        yield Run(policy, size, outputs, engine.metrics, engine.runner.copied_bytes)


def _count(progress: Progress, chunks: list[StreamChunk]) -> None:
    """Count the tokens of a step."""
    progress.advance(sum(len(chunk.token_ids) for chunk in chunks))


def transformers_generate(
    engine: Engine,
    items: Sequence[WorkItem],
    size: int,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> tuple[list[RequestOutput], EngineMetrics]:
    """Run Transformers' own greedy `generate` on left-padded batches of up to `size` requests that are due.

    A batch runs until its last request has ended. The engine checks the prompts and knows the model; it runs
    nothing. Outputs are in the order of `items`. `on_tokens` is called with how many tokens each forward pass
    gave.

    Raises:
        InputError: for items that follow others, and prompts that cannot be served.
    """
    if (index := next((i for i, item in enumerate(items) if item.follows is not None), None)) is not None:
        problem = f"{GENERATE} holds no conversations: use a policy of the engine"
        raise InputError(f"items[{index}] follows items[{items[index].follows}], and {problem}")
    metrics, start = EngineMetrics(), time.perf_counter()
    requests = []
    for index, item in enumerate(items):
        tokens = engine.encode(item.prompt)
        stops = frozenset() if item.params.ignore_eos else engine.eos_ids
        arrival, params = start + item.arrival_s, item.params.resolved(engine.defaults)
        requests.append(Request(f"request-{index}", len(tokens), params, tokens, stops, arrival=arrival))
    pending = sorted(requests, key=lambda request: request.arrival)
    while pending:
        time.sleep(max(0.0, pending[0].arrival - time.perf_counter()))
        now = time.perf_counter()
        batch = [request for request in pending[:size] if request.arrival <= now]
        pending = pending[len(batch) :]
        _generate_batch(engine.model, batch, metrics, on_tokens)
        for request in batch:
            metrics.add(request.close(None, request.token_times[-1]).metrics)
    return [request.result for request in requests if request.result is not None], metrics


def _generate_batch(
    model: PreTrainedModel, batch: list[Request], metrics: EngineMetrics, on_tokens: Callable[[int], object]
) -> None:
    """Generate for one batch, each forward pass a step that computes a rectangle of positions."""
    width, now = max(request.prompt_len for request in batch), time.perf_counter()
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        request.scheduled = now
        ids[row, width - request.prompt_len :] = torch.tensor(request.tokens)
        mask[row, width - request.prompt_len :] = 1

    def on_step(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Count a step. Transformers calls this with each new token, and asks which rows have ended."""
        tokens, now = input_ids[:, -1].tolist(), time.perf_counter()
        running = [row for row, request in enumerate(batch) if request.finish_reason is None]
        needed = [len(batch[row].tokens) - batch[row].computed for row in running]
        padded = len(batch) * max(needed) - sum(needed)
        choices = [Choice(token) if row in running else None for row, token in enumerate(tokens)]
        result = StepResult(choices, 1, sum(needed), padded, model_s=0.0, kv_bytes=0)
        metrics.count_step(len(batch), result, step_s=0.0)
        for row in running:
            batch[row].computed = len(batch[row].tokens)
            batch[row].append(tokens[row], now)
        on_tokens(len(running))
        return torch.tensor([request.finish_reason is not None for request in batch], device=input_ids.device)

    model.generate(  # type: ignore[operator]
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max(request.params.max_new_tokens for request in batch),
        do_sample=False,
        # a model may bring its own, which the engine's greedy decoding does not apply
        repetition_penalty=1.0,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[on_step],
    )


def environment(loaded: LoadedModel) -> dict[str, Any]:
    """Return what the numbers depend on besides the code, and the most memory this process held, in bytes."""
    device = loaded.model.device
    cuda = device.type == "cuda"
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
        "peak_rss_bytes": peak_bytes(),
        "peak_cuda_bytes": torch.cuda.max_memory_allocated(device) if cuda else 0,
    }
