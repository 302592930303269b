"""One workload through one backend: opened once, its tokens proven, then timed round after round.

The order is the point: tokens are checked before anything is timed, and again after every round that gave
others; whatever fails on the way marks the benchmark as failed, so that nothing of it is saved.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine import EngineMetrics, Workload, make_workload, max_positions
from perf.backends import INT8, Backend, Checked, Outcome, Session, Setup, Unavailable, check_takes, find
from perf.gate import entries, metrics
from perf.gate.entries import SCHEMA, Flat, plain
from perf.gate.pooling import Sample, gathered
from perf.measure import machine_speed
from perf.measure.fingerprint import fingerprint
from perf.measure.host_memory import HostMemory, give_back
from perf.measure.nvml import GpuReading, Monitor
from perf.measure.session import BenchSession, free
from perf.measure.token_check import WrongTokens

CHECKED = 16  # requests of a workload whose tokens are checked on CUDA; on a CPU all are
# what a backend that tells only the end can't have
TIMES = ("queue", "ttft", "prefill", "decode", "tpot", "itl")
# what only an engine that counts its steps knows
OF_STEPS = (
    "steps", "forward_passes", "tokens_computed", "padded_tokens", "padding_ratio", "preemptions", "host_pct",
    "kv_bytes_peak", "kv_unused_tokens", "kv_unused_mean", "batch_size_mean",
)  # fmt: skip
LATENCY_OF = {"tpot_p95_ms": "tpot_ms", "itl_p99_ms": "itl_ms"}  # whose values a pooled metric is of
Derive = Callable[[Flat, EngineMetrics], Flat]


@dataclass(frozen=True)
class Round:
    """One timed run: wall seconds of the call, its flat metrics, what the GPU did, and its sample.

    sample: every gated metric that it has, a number each; of a pooled one the values themselves; and under
    "voided" why it does not count, if it does not.
    """

    seconds: float
    flat: Flat
    gpu: GpuReading
    sample: Sample

    @property
    def voided(self) -> str | None:
        return self.sample.get("voided")


class Trial:
    """One workload on one backend, opened once and then run round after round.

    session: one that is open already, of the same backend and model; else it is opened.
    """

    def __init__(
        self,
        bench: BenchSession,
        group: str,
        backend: str | Backend,
        workload: str | Workload,
        *,
        device: str,
        max_batch_size: int,
        arrivals: str = "auto",
        spec: str | None = None,
        options: Mapping[str, Any] | None = None,
        derive: Derive | None = None,
        session: Session | None = None,
    ) -> None:
        self.bench, self.group, self.device, self.derive = bench, group, device, derive
        self.backend = find(backend) if isinstance(backend, str) else backend
        if reason := self.backend.missing(device):
            raise Unavailable(f"{self.backend.name}: {reason}")
        remote = getattr(self.backend, "remote", False)
        self.held = None if remote and (spec or bench.model) is None else bench.hold(device, spec)
        limits: dict[str, Any] = {"vocab_size": None}
        dtype = bench.dtype or "float32"
        if self.held is not None:
            model = self.held.loaded.model
            config = model.config.get_text_config(decoder=True)
            limits = {"vocab_size": config.vocab_size, "max_positions": max_positions(config)}
            limits["tokenizer"] = self.held.loaded.tokenizer
            dtype = str(model.dtype).removeprefix("torch.")
        rounded = bench.dtype == INT8
        if rounded and not getattr(self.backend, "rounds_weights", False):
            raise Unavailable(f"{self.backend.name}: it makes no int8 of a model's weights")
        self.workload = (
            make_workload(workload, arrivals=arrivals, **limits) if isinstance(workload, str) else workload
        )
        check_takes(self.backend, self.workload.items)
        self.setup = Setup(
            None if self.held is None else self.held.loaded,
            device,
            INT8 if rounded else dtype,
            max_batch_size,
            threads=torch.get_num_threads(),
            options=dict(options or {}),
        )
        self._lengths = [] if self.held is None else self.workload.lengths()
        self._dtype = dtype  # of products that the machine is measured by
        self.speed_before = bench.measure_speed(device, dtype)
        self.rounds: list[Round] = []
        self.checked = Checked(0, 0, 0)
        self._monitor = Monitor(device)
        self._memory = HostMemory()
        self._outcome: Outcome | None = None
        self.session = session or self.backend.open(self.setup)

    def prove(self) -> float:
        """Run once, not as a round, and check the tokens; return the seconds of the run. It also warms up.

        All that there is then is set aside from the collection of garbage until `close`: a full one between
        rounds would otherwise look through it, and take longer than a short round. Memory that is free is
        given back, or rounds would peak by what loading happened to leave.
        """
        self._reset()
        started = time.perf_counter()
        outcome = self.session.run(self.workload.items)
        machine_speed.sync(self.device)
        seconds = time.perf_counter() - started
        self.check(outcome)
        del outcome
        gc.collect()
        gc.freeze()
        give_back()
        return seconds

    def check(self, outcome: Outcome) -> None:
        """Raise WrongTokens unless every request got as many tokens as it asked for, and those of the sample
        are the model's own; counts how many requests have exactly its choice, and how many part from it at a
        near-tie."""
        items = self.workload.items
        judge = None if self.held is None else self.held.reference
        if hasattr(self.session, "check"):
            self.checked = self.session.check(items, judge)
            if getattr(self.backend, "exact", True) and self.checked.differ:
                raise WrongTokens(f"{self.backend.name}: {self.checked.differ} of {self.checked.checked} "
                                  f"answers are not {self.checked.against}")  # fmt: skip
            return
        assert judge is not None
        for index, (item, tokens) in enumerate(zip(items, outcome.tokens, strict=True)):
            if len(tokens) != item.params.max_new_tokens:
                asked = item.params.max_new_tokens
                raise WrongTokens(
                    f"{self.backend.name}: requests[{index}] asked for {asked} tokens, got {len(tokens)}"
                )
        count = min(len(items), CHECKED) if self.device == "cuda" else len(items)
        sample = np.linspace(0, len(items) - 1, count).round().astype(int).tolist()
        verdicts = [
            (index, judge.judge(self.workload.whole_prompt(index, outcome.tokens), outcome.tokens[index]))
            for index in sample
        ]
        for index, verdict in verdicts:
            if verdict.wrong_at is not None and getattr(self.backend, "exact", True):
                raise WrongTokens(
                    f"{self.backend.name}: token {verdict.wrong_at} of requests[{index}] is not the model's "
                    f"choice: its logit is {verdict.gap:.3g} below the best"
                )
        self.checked = Checked.by_model([verdict for _, verdict in verdicts])

    def before(self) -> None:
        """Prepare a round, untimed."""
        self._reset()
        gc.collect()
        machine_speed.sync(self.device)
        self._monitor.__enter__()
        self._memory.begin()

    def _reset(self) -> None:
        if hasattr(self.session, "reset"):
            self.session.reset()

    def run(self) -> None:
        """Run the timed part: the whole workload, to the last token on the host."""
        self._outcome = self.session.run(self.workload.items)
        machine_speed.sync(self.device)

    def after(self, seconds: float | None = None) -> Sample:
        """Conclude a round, untimed: check its tokens, if they are new, and keep its metrics.

        Returns:
            Every gated metric that the round has, by name: a number, but for a pooled one the list of its
            values. Counters are of requests that come all at once only: of others they depend on the clock.
            With "voided", the reason, where a slowdown of the hardware hit the round.
        """
        rss_peak = self._memory.peak()  # before anything else is allocated
        self._monitor.__exit__(None, None, None)
        assert self._outcome is not None
        outcome, self._outcome = self._outcome, None
        self.check(outcome)
        flat: Flat = outcome.metrics.flat()
        if not outcome.metrics.counters.steps:
            flat |= dict.fromkeys(OF_STEPS)
        if not outcome.keeps_times:
            flat |= {name: None for name in flat if name.split("_")[0] in TIMES}
        derived = self.derive({**flat, **outcome.extra}, outcome.metrics) if self.derive else {}
        for what, names in ((f"extra of {self.backend.name}", outcome.extra), ("derive=", derived)):
            entries.check_names(what, names)
            flat |= names
        if self.workload.arrivals == "all" and self.held is not None:
            rate = self.bench.machine_speed(self.device).matmul_gflops
            flat["useful_flops_pct"] = self.held.costs.useful_flops_pct(self._lengths, flat["wall_s"], rate)
        if self.device == "cuda":
            flat["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
        elif self.device == "cpu" and getattr(self.session, "in_process", True):
            flat["rss_peak_bytes"] = rss_peak
        sample = self._sample(flat, outcome)
        self.rounds.append(Round(seconds or flat["wall_s"], flat, self._monitor.reading, sample))
        return sample

    after.tells_sample = True  # type: ignore[attr-defined]  # to perf/ab/turn_agent.py

    def _sample(self, flat: Flat, outcome: Outcome) -> Sample:
        """Return what `after` says."""
        sample: Sample = {}
        counts = self.workload.arrivals == "all" and outcome.exact
        for name in metrics.GATED:
            if name in metrics.POOLED:
                values = outcome.metrics.latencies(LATENCY_OF[name]) if outcome.keeps_times else []
                if values:
                    sample[name] = values
            elif not counts and metrics.METRICS[name].is_counter:
                continue
            elif flat.get(name) is not None:
                sample[name] = flat[name]
        if voided := self._monitor.reading.slowdown or outcome.voided:
            sample["voided"] = voided
        return plain(sample)

    def time_round(self) -> None:
        """Prepare, time and conclude a round, where nobody else does."""
        self.before()
        started = time.perf_counter()
        self.run()
        self.after(time.perf_counter() - started)

    def info(self) -> Flat:
        """Return everything recorded, flat; only `fingerprint` and `rounds` are nested.

        Raises:
            RuntimeError: if every round was hit by a slowdown of the hardware.
            ValueError: for a value that JSON has no word for.
        """
        good = [round_ for round_ in self.rounds if round_.voided is None]
        reasons = sorted({round_.voided for round_ in self.rounds if round_.voided})
        if not good:
            raise RuntimeError(
                f"all {len(self.rounds)} rounds were voided: {', '.join(reasons)}: nothing was measured"
            )
        after = machine_speed.measure(self.device, self._dtype)
        middle = sorted(good, key=lambda round_: round_.flat["tokens_per_s"])[len(good) // 2]
        samples, tails = gathered([round_.sample for round_ in good])
        policy = getattr(self.backend, "policy", self.backend.name)
        loaded, served = self.setup.held, getattr(self.session, "served_model", None)
        info: Flat = {
            "schema": SCHEMA,
            "group": self.group,
            "backend": self.backend.name,
            "model": served or (loaded.spec if loaded else "unknown"),
            "model_revision": loaded.revision if loaded else None,
            "dtype": self.setup.dtype,
            "device": self.device,
            "policy": policy,
            "runner": getattr(self.session, "runner", self.backend.name),
            "batch_size": self.setup.max_batch_size,
            "workload": self.workload.name,
            "arrivals": self.workload.arrivals,
            "seed": self.workload.seed,
            **middle.flat,
            **tails,
            "same_tokens": self.checked.same,
            "near_ties": self.checked.near_ties,
            "checked_requests": self.checked.checked,
            "checked_against": self.checked.against,
            "canary_matmul_gflops": self.speed_before.matmul_gflops,
            "canary_copy_gbps": self.speed_before.copy_gbps,
            "canary_drift_pct": self.speed_before.drift_pct(after),
            "gpu_peak_bytes": middle.flat.get("gpu_peak_bytes"),
            "rss_peak_bytes": middle.flat.get("rss_peak_bytes"),
            "gpu_util_pct": middle.gpu.util_pct,
            "gpu_energy_j": middle.gpu.energy_j,
            "rounds_voided": len(self.rounds) - len(good),
            "void_reason": ", ".join(reasons) or None,
        }
        nested = {
            "fingerprint": getattr(self.session, "fingerprint", None)
            or fingerprint(self.device, self.setup.dtype, loaded.revision if loaded else None),
            "rounds": samples,
        }
        return plain({**info, **nested})

    def close(self) -> None:
        """End the session and free what it held."""
        gc.unfreeze()
        self.session.close()
        free()
