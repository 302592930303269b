"""From a workload and a backend to one recorded benchmark: prove the tokens, warm up, time rounds, write it
down.

The order is the point: tokens are checked before anything is timed, and again after every round that gave
others; whatever fails on the way marks the benchmark as failed, so that nothing of it is saved.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine import EngineMetrics, LoadedModel, Workload, load, make
from engine.models import positions
from perf import canary, entries, metrics, tolerances
from perf.backends import Backend, Outcome, Setup, Unavailable, find
from perf.canary import Canary
from perf.correct import Reference, WrongTokens
from perf.entries import SCHEMA, Flat, plain
from perf.fingerprint import fingerprint
from perf.gpu import GpuReading, Monitor
from perf.roofline import Costs, costs

ROUNDS = 5
CHECKED = 16  # requests of a workload whose tokens are checked on CUDA; on a CPU all are
# what a backend that tells only the end can't have
TIMES = ("queue", "ttft", "prefill", "decode", "tpot", "itl")
Derive = Callable[[Flat, EngineMetrics], Flat]


@dataclass(frozen=True)
class Round:
    """One timed run: wall seconds of the call, its flat metrics, what the GPU did."""

    seconds: float
    flat: Flat
    gpu: GpuReading


class Bench:
    """What the benchmarks of a session share: the options, and one model at a time with its reference."""

    def __init__(
        self, *, model: str | None, dtype: str | None, rounds: int | None, quick: bool, plant: float
    ) -> None:
        self.model, self.dtype, self.rounds, self.quick, self.plant = model, dtype, rounds, quick, plant
        self.recorded: list[Flat] = []
        self._canaries: dict[str, Canary] = {}
        self._key: tuple[str, str, str] | None = None
        self._held: tuple[LoadedModel, Reference, Costs] | None = None

    def spec(self, device: str) -> str:
        """The model to run on a device: `--model`, else a small one on a CPU and the published 0.5B shape on
        CUDA."""
        return self.model or ("random:qwen2.5-0.5b" if device == "cuda" else "random:tiny-llama")

    def hold(self, device: str, spec: str | None = None) -> tuple[LoadedModel, Reference, Costs]:
        """The model on its device; the one held before goes first, so that two never share the memory."""
        dtype = self.dtype or ("float16" if device == "cuda" else "float32")
        key = (spec or self.spec(device), device, dtype)
        if self._held is None or key != self._key:
            self.drop()
            loaded = load(key[0], device=device, dtype=dtype)
            self._held, self._key = (loaded, Reference(loaded), costs(loaded.model)), key
        return self._held

    def canary(self, device: str) -> Canary:
        """The device's rates, measured once a session: what percentages of the roofline are of."""
        if device not in self._canaries:
            dtype = str(self.hold(device)[0].model.dtype).removeprefix("torch.")
            self._canaries[device] = canary.measure(device, dtype)
        return self._canaries[device]

    def real(self, device: str) -> bool:
        """Whether the model is worth a full workload: one that was asked for, or any on CUDA."""
        return self.model is not None or device == "cuda"

    def drop(self) -> None:
        """Forget the model."""
        self._held = self._key = None
        free()

    def planted(self) -> AbstractContextManager[object]:
        """The slowdown asked for by `--perf-plant`, for the self-test of the gate; else nothing."""
        if not self.plant:
            return nullcontext()
        from perf.selftest import plant

        return plant(self.plant)


class Trial:
    """One way of running one workload, opened once and then run round after round."""

    def __init__(
        self,
        bench: Bench,
        group: str,
        backend: str | Backend,
        workload: str | Workload,
        *,
        device: str,
        max_batch_size: int,
        arrivals: str = "all",
        spec: str | None = None,
        options: Mapping[str, Any] | None = None,
        derive: Derive | None = None,
    ) -> None:
        self.bench, self.group, self.device, self.derive = bench, group, device, derive
        self.backend = find(backend) if isinstance(backend, str) else backend
        if reason := self.backend.missing(device):
            raise Unavailable(f"{self.backend.name}: {reason}")
        self.loaded, self.reference, self.costs = bench.hold(device, spec)
        config = self.loaded.model.config.get_text_config(decoder=True)
        limits = {"vocab_size": config.vocab_size, "max_positions": positions(config)[0]}
        tokenizer = self.loaded.tokenizer
        self.workload = (
            make(workload, tokenizer=tokenizer, arrivals=arrivals, **limits)
            if isinstance(workload, str)
            else workload
        )
        dtype = str(self.loaded.model.dtype).removeprefix("torch.")
        self.setup = Setup(
            self.loaded,
            device,
            dtype,
            max_batch_size,
            threads=torch.get_num_threads(),
            options=dict(options or {}),
        )
        self.before_canary = canary.measure(device, dtype)
        self.rounds: list[Round] = []
        self.same_tokens = self.near_ties = 0
        self._monitor = Monitor(device)
        self._outcome: Outcome | None = None
        self.session = self.backend.open(self.setup)

    def prove(self) -> None:
        """Run once, untimed, and check the tokens. It also warms up."""
        self._reset()
        self.check(self.session.run(self.workload.items))
        canary.sync(self.device)

    def check(self, outcome: Outcome) -> None:
        """Raise WrongTokens unless every request got as many tokens as it asked for, and those of the sample
        are the model's own; counts how many requests have exactly its choice, and how many part from it at a
        near-tie."""
        items = self.workload.items
        for index, (item, tokens) in enumerate(zip(items, outcome.tokens, strict=True)):
            if len(tokens) != item.params.max_new_tokens:
                asked = item.params.max_new_tokens
                raise WrongTokens(
                    f"{self.backend.name}: requests[{index}] asked for {asked} tokens, got {len(tokens)}"
                )
        count = min(len(items), CHECKED) if self.device == "cuda" else len(items)
        sample = np.linspace(0, len(items) - 1, count).round().astype(int).tolist()
        verdicts = [
            (index, self.reference.judge(items[index].prompt, outcome.tokens[index])) for index in sample
        ]
        for index, verdict in verdicts:
            if verdict.wrong_at is not None and getattr(self.backend, "exact", True):
                raise WrongTokens(
                    f"{self.backend.name}: token {verdict.wrong_at} of requests[{index}] is not the model's "
                    f"choice: its logit is {verdict.gap:.3g} below the best"
                )
        self.same_tokens = sum(verdict.same for _, verdict in verdicts)
        self.near_ties = sum(verdict.ties > 0 and verdict.wrong_at is None for _, verdict in verdicts)
        self.checked = count

    def before(self) -> None:
        """What precedes a round and is not timed."""
        self._reset()
        gc.collect()
        canary.sync(self.device)
        self._monitor.__enter__()

    def _reset(self) -> None:
        if hasattr(self.session, "reset"):
            self.session.reset()

    def run(self) -> None:
        """The timed part: the whole workload, to the last token on the host."""
        self._outcome = self.session.run(self.workload.items)
        canary.sync(self.device)

    def after(self, seconds: float | None = None) -> None:
        """What follows a round: its metrics and, if they are new, its tokens."""
        self._monitor.__exit__(None, None, None)
        assert self._outcome is not None
        outcome, self._outcome = self._outcome, None
        self.check(outcome)
        flat: Flat = outcome.metrics.flat()
        if not outcome.keeps_times:
            flat |= {name: None for name in flat if name.split("_")[0] in TIMES}
        derived = self.derive({**flat, **outcome.extra}, outcome.metrics) if self.derive else {}
        for what, names in ((f"extra of {self.backend.name}", outcome.extra), ("derive=", derived)):
            entries.check_names(what, names)
            flat |= names
        lengths = [(len(item.prompt), item.params.resolved().max_new_tokens) for item in self.workload.items]
        if self.workload.arrivals == "all":
            rate = self.bench.canary(self.device).matmul_gflops
            flat["useful_flops_pct"] = self.costs.useful_flops_pct(lengths, flat["wall_s"], rate)
        if self.device == "cuda":
            flat["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
        self.rounds.append(Round(seconds or flat["wall_s"], flat, self._monitor.reading))

    def info(self) -> Flat:
        """Everything recorded, flat; only `fingerprint` and `rounds` are nested.

        Raises:
            RuntimeError: if every round was hit by a slowdown of the hardware.
            ValueError: for a value that JSON has no word for.
        """
        good = [round_ for round_ in self.rounds if round_.gpu.slowdown is None]
        reasons = sorted({round_.gpu.slowdown for round_ in self.rounds if round_.gpu.slowdown})
        if not good:
            raise RuntimeError(
                f"all {len(self.rounds)} rounds were hit by {', '.join(reasons)}: nothing was measured"
            )
        after = canary.measure(self.device, self.setup.dtype)
        middle = sorted(good, key=lambda round_: round_.flat["tokens_per_s"])[len(good) // 2]
        samples = {
            name: [round_.flat[name] for round_ in good]
            for name in metrics.GATED
            if all(round_.flat.get(name) is not None for round_ in good)
        }
        if self.workload.arrivals != "all":
            samples = {
                name: values for name, values in samples.items() if metrics.METRICS[name].direction != "exact"
            }
        policy = getattr(self.backend, "policy", self.backend.name)
        info: Flat = {
            "schema": SCHEMA,
            "group": self.group,
            "backend": self.backend.name,
            "model": self.loaded.spec,
            "model_revision": self.loaded.revision,
            "dtype": self.setup.dtype,
            "device": self.device,
            "policy": policy,
            "runner": getattr(self.session, "runner", self.backend.name),
            "batch_size": self.setup.max_batch_size,
            "workload": self.workload.name,
            "arrivals": self.workload.arrivals,
            "seed": self.workload.seed,
            **middle.flat,
            "same_tokens": self.same_tokens,
            "near_ties": self.near_ties,
            "checked_requests": self.checked,
            "canary_matmul_gflops": self.before_canary.matmul_gflops,
            "canary_copy_gbps": self.before_canary.copy_gbps,
            "canary_drift_pct": self.before_canary.drift_pct(after),
            "gpu_peak_bytes": middle.flat.get("gpu_peak_bytes"),
            "gpu_util_pct": middle.gpu.util_pct,
            "gpu_energy_j": middle.gpu.energy_j,
            "rounds_voided": len(self.rounds) - len(good),
            "void_reason": ", ".join(reasons) or None,
        }
        nested = {
            "fingerprint": fingerprint(self.device, self.setup.dtype, self.loaded.revision),
            "rounds": samples,
        }
        return plain({**info, **nested})

    def close(self) -> None:
        """End the session and free what it held."""
        self.session.close()
        free()


class PerfCase:
    """The `perf_case` fixture: measures one thing and records it on pytest-benchmark's fixture.

    gate: the test's tolerances as JSON text. own: the metrics that its own marks name, each to be recorded.
    """

    def __init__(self, bench: Bench, benchmark: Any, gate: str | None, own: Collection[str] = ()) -> None:
        self.bench, self.benchmark, self.gate, self.own = bench, benchmark, gate, own

    def rounds(self, rounds: int | None) -> int:
        """How many rounds to time: `--rounds`, else what the test asks for, else the least that allows a
        verdict."""
        return self.bench.rounds or rounds or ROUNDS

    def measure(
        self,
        group: str,
        backend: str | Backend,
        workload: str | Workload,
        *,
        rounds: int | None = None,
        warmup: int = 0,
        extra: Flat | None = None,
        **how: Any,
    ) -> Flat:
        """Prove, warm up and time; gives what it recorded. `how` is that of Trial, `extra` is added as it is.

        Raises:
            InputError: if a name in `extra` is one that the record says of itself.
            GateError: if one of the test's own marks names a metric that was not recorded.
            WrongTokens: before timing, if the tokens are not the model's own.
            Unavailable: if the backend cannot run here.
        """
        entries.check_names("extra=", extra or {})
        self.benchmark.group = group  # pytest-benchmark reads it when the timing begins
        with self.unsaved_if_it_fails():
            if how["device"] == "cuda":
                torch.cuda.reset_peak_memory_stats()
            trial = Trial(self.bench, group, backend, workload, **how)
            try:
                trial.prove()
                with self.bench.planted():
                    self.benchmark.pedantic(
                        trial.run, setup=trial.before, teardown=trial.after, rounds=self.rounds(rounds),
                        warmup_rounds=warmup, iterations=1,
                    )  # fmt: skip
                # run once, to see that it works: pytest-benchmark skips the teardown
                if self.benchmark.disabled:
                    trial.after()
                else:
                    del trial.rounds[:warmup]
                return self.record(self.recorded(trial, extra))
            finally:
                trial.close()

    def replay(self, trial: Trial, advance: Callable[[float], None], extra: Flat | None = None) -> Flat:
        """Record a trial whose rounds were timed before, telling the clock that times the test. Raises
        InputError and GateError as `measure` does."""
        entries.check_names("extra=", extra or {})
        self.benchmark.group = trial.group
        with self.unsaved_if_it_fails():
            seconds = iter([round_.seconds for round_ in trial.rounds])
            self.benchmark.pedantic(lambda: advance(next(seconds)), rounds=len(trial.rounds), iterations=1)
            return self.record(self.recorded(trial, extra))

    def recorded(self, trial: Trial, extra: Flat | None) -> Flat:
        """The record of a finished trial, with `extra` and those of the test's tolerances that it can use."""
        info = {**trial.info(), **plain(extra or {})}
        if gate := tolerances.used(self.gate, self.own, info):
            info["gate"] = gate
        return info

    @contextmanager
    def unsaved_if_it_fails(self) -> Iterator[None]:
        """pytest-benchmark keeps a time once it is taken, whatever fails later, unless it is told of the
        failure."""
        try:
            yield
        except BaseException:
            self.benchmark.has_error = True
            raise

    def record(self, info: Flat) -> Flat:
        """Put what was recorded where pytest-benchmark saves it from, under the one key that is ours."""
        entries.write(self.benchmark.extra_info, info)
        self.bench.recorded.append(info)
        return info


def free() -> None:
    """Collect what is no longer used, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
