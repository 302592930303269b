"""The engine of this project as a backend, one for each of its policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine import Engine, EngineConfig, EngineMetrics, FinishReason, SamplingParams, WorkItem
from perf.backends import INT8, Checked, Judge, Outcome, Setup


class EngineSession:
    """One engine, kept for all runs. Prefix caching is off unless asked for; then each run has an engine of
    its own, or it would find the prompts of the one before computed."""

    def __init__(self, policy: str, setup: Setup) -> None:
        options = {"prefix_caching": False, "generation_config": "none", **setup.options}  # greedy, as judged
        options |= {"dtype": INT8} if setup.dtype == INT8 else {}
        self.loaded = setup.loaded
        self.config = EngineConfig(
            policy=policy, max_batch_size=setup.max_batch_size, seed=setup.seed, **options
        )
        self.engine = Engine(self.loaded, self.config)
        self.runner = self.engine.config.runner
        self.engine.generate([[1] * 8] * 2, SamplingParams(max_new_tokens=4, ignore_eos=True), progress=False)

    def reset(self) -> None:
        """Forget the prompts of earlier runs."""
        if self.config.prefix_caching:
            del self.engine  # its memory first
            self.engine = Engine(self.loaded, self.config)

    def run(self, items: Sequence[WorkItem]) -> Outcome:
        """Serve the requests; an engine error or an interrupt is raised, never measured."""
        self.engine.metrics = EngineMetrics()
        outputs = self.engine.replay(items, progress=False)
        for output in outputs:
            if output.finish_reason is FinishReason.ABORT:
                raise KeyboardInterrupt
            if output.finish_reason is FinishReason.ERROR:
                raise RuntimeError(f"{output.request_id} failed: {output.error}")
        return Outcome([output.token_ids for output in outputs], self.engine.metrics)

    def close(self) -> None:
        """Let the engine go, and its pages with it."""
        del self.engine


class RoundedSession(EngineSession):
    """An engine with weights in int8: its answers are its own, so they are those that it gives one by one."""

    def __init__(self, policy: str, setup: Setup) -> None:
        super().__init__(policy, setup)
        self._answers: list[tuple[int, ...]] = []
        self._alone: list[tuple[int, ...]] = []

    def run(self, items: Sequence[WorkItem]) -> Outcome:
        outcome = super().run(items)
        self._answers = outcome.tokens
        return outcome

    def check(self, items: Sequence[WorkItem], judge: Judge | None) -> Checked:
        """Hold the answers of the newest run against those of a batch of one."""
        if not self._alone:
            config = replace(self.config, policy="sequential", max_batch_size=1)
            self._alone = [output.token_ids for output in Engine(self.loaded, config).replay(
                [replace(item, arrival_s=0.0) for item in items], progress=False)]  # fmt: skip
        same = sum(found == alone for found, alone in zip(self._answers, self._alone, strict=True))
        return Checked(same, 0, len(items), "its own answers one by one")


class Continuous:
    """Requests join and leave the batch at every step; packed, paged."""

    name = policy = "continuous"
    conversations = rounds_weights = True

    def missing(self, device: str) -> str | None:
        """Return None: it is always here."""
        return None

    def open(self, setup: Setup) -> EngineSession:
        """Return an engine of this policy over the model that `setup` has loaded."""
        return (RoundedSession if setup.dtype == INT8 else EngineSession)(self.policy, setup)


class Dynamic(Continuous):
    """A batch is filled in order of arrival and run to completion."""

    name = policy = "dynamic"


class Sequential(Continuous):
    """One request at a time: the baseline."""

    name = policy = "sequential"
