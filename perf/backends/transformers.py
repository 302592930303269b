"""Transformers itself as a backend: `generate` one prompt at a time, on padded batches, and its continuous
batching."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from engine import Engine, EngineConfig, WorkItem, generate_with_transformers
from perf.backends import Outcome, Setup, timeline


class GenerateSession:
    """`model.generate` on left-padded batches of up to `size` requests that are due, each batch to its
    end."""

    runner = "generate"

    def __init__(self, setup: Setup, size: int) -> None:
        # Asked for what it knows of the model; it runs nothing. Sequential, so that it joins no weights.
        config = EngineConfig(policy="sequential", kv_memory=1 << 30, generation_config="none")
        self.engine = Engine(setup.loaded, config)
        self.size = size

    def run(self, items: Sequence[WorkItem]) -> Outcome:
        """Generate for every request."""
        outputs, metrics = generate_with_transformers(self.engine, items, self.size)
        return Outcome([output.token_ids for output in outputs], metrics)

    def close(self) -> None:
        """Nothing is held but the model."""


class OneByOne:
    """`model.generate` as a first script has it: one prompt at a time."""

    name = "generate"

    def missing(self, device: str) -> str | None:
        """Return None: it is always here."""
        return None

    def open(self, setup: Setup) -> GenerateSession:
        """Return a session over the model as it is loaded."""
        return GenerateSession(setup, 1)


class PaddedBatches(OneByOne):
    """`model.generate` as a second script has it: left-padded batches."""

    name = "generate-padded"

    def open(self, setup: Setup) -> GenerateSession:
        """Return a session over the model as it is loaded."""
        return GenerateSession(setup, setup.max_batch_size)


class ContinuousSession:
    """Transformers' continuous batching, its cache kept for all runs and its thread for each.

    A thread that only waits still slows the others: OpenMP counts its workers, and with more of them than
    processors lets everybody's sleep at each barrier. The model is a copy that shares every weight: its
    attention is changed, and others measure the original.
    """

    runner = "transformers-cb"

    def __init__(self, setup: Setup) -> None:
        model = setup.loaded.model
        shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        self.model = copy.deepcopy(model, memo=shared)
        options = {
            "max_requests_per_batch": setup.max_batch_size,
            "use_cuda_graph": setup.device.startswith("cuda"),
            "allow_block_sharing": False,
            **setup.options,
        }
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
        self._how = {
            "generation_config": greedy,
            "continuous_batching_config": ContinuousBatchingConfig(**options),
        }

    def run(self, items: Sequence[WorkItem]) -> Outcome:
        """Hand every request over when it is due and collect results until all are there."""
        batching: Any = self.model.continuous_batching_context_manager
        # it fails in inference_mode
        with torch.no_grad(), batching(**self._how, persistent_manager=True) as manager:
            return self._run(manager, items)

    def _run(self, manager: Any, items: Sequence[WorkItem]) -> Outcome:
        start = time.perf_counter()
        names: dict[str, int] = {}
        tokens: list[list[int]] = [[] for _ in items]
        seconds: list[list[float]] = [[] for _ in items]
        pending = sorted(range(len(items)), key=lambda index: items[index].arrival_s)
        done = 0
        while done < len(items):
            while pending and items[pending[0]].arrival_s <= time.perf_counter() - start:
                index = pending.pop(0)
                item = items[index]
                name = manager.add_request(
                    list(item.prompt),
                    max_new_tokens=item.params.max_new_tokens,
                    record_timestamps=True,
                    eos_token_id=-1,
                )
                names[str(name)] = index
            wait = items[pending[0]].arrival_s - (time.perf_counter() - start) if pending else 1.0
            result = manager.get_result(timeout=max(1e-3, min(wait, 1.0)))
            if result is None and not manager.is_running():
                raise RuntimeError("Transformers' continuous batching stopped before its requests were done")
            if result is None:
                continue
            if result.error is not None:
                raise RuntimeError(f"Transformers' continuous batching failed: {result.error}")
            index = names[result.request_id]
            tokens[index] = list(result.generated_tokens)
            seconds[index] = [at - start for at in result.timestamps or ()]
            done += 1
        return timeline(items, tokens, seconds, began=start)

    def close(self) -> None:
        """Free its cache."""
        self.model.destroy_cached_continuous_batching_manager()  # type: ignore[operator]
        del self.model


class ContinuousBatching(OneByOne):
    """`model.continuous_batching_context_manager`."""

    name = "transformers-cb"

    def open(self, setup: Setup) -> ContinuousSession:  # type: ignore[override]
        """Make ready; its cache, sized by the memory that is free, comes with the first run."""
        return ContinuousSession(setup)
