"""Made-up saved runs in pytest-benchmark's own shape, for tests of what reads them: exact, seeded, nothing
measured."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from perf.gate import saved_runs
from perf.gate.metrics import METRICS
from perf.gate.noise import Found, write_noise
from perf.gate.saved_runs import Run

PRINT = {
    "gpu": "NVIDIA H200",
    "driver": "580.82.07",
    "cuda": "13.0",
    "torch": "2.11.0",
    "transformers": "5.17.0",
}
PRINT |= {"triton": "3.6.0", "python": "3.12.4", "dtype": "float16", "model_revision": "seed 0", "cpu": None}
EXACT = {
    "forward_passes": 64,
    "tokens_computed": 3579,
    "padded_tokens": 0,
    "output_tokens": 1199,
    "preemptions": 0,
}
GATED = (
    "tokens_per_s",
    "ttft_p50_ms",
    "ttft_p95_ms",
    "tpot_p50_ms",
    "latency_p95_ms",
    "goodput",
    "startup_s",
)
GATED += ("decode_bandwidth_pct", "prefill_mfu_pct", *EXACT)
WHAT = {
    "schema": 1,
    "backend": "engine",
    "model": "random:qwen2.5-0.5b",
    "dtype": "float16",
    "device": "cuda",
}
WHAT |= {
    "policy": "continuous",
    "runner": "packed",
    "batch_size": 32,
    "workload": "mixed-32",
    "arrivals": "all",
}


def entry(name: str, group: str, noise: random.Random, rounds: int = 5, **info: Any) -> dict[str, Any]:
    """One benchmark: metrics are jittered by 1 % a round, counters are not."""
    extra = {
        **WHAT,
        **EXACT,
        "group": group,
        "rounds_voided": 0,
        "void_reason": None,
        "fingerprint": PRINT,
        **info,
    }
    extra["rounds"] = {
        key: [extra[key] * (1 if key in EXACT else 1 + noise.gauss(0, 0.01)) for _ in range(rounds)]
        for key in GATED
        if extra.get(key) is not None
    }
    fullname = f"perf/benchmarks/test_{group}.py::test_{group}[{name}]"
    return {
        "group": group,
        "name": f"test_{group}[{name}]",
        "fullname": fullname,
        "extra_info": extra,
        "stats": {},
    }


def speeds(tokens_per_s: float, batch: int, load: float = 0.0) -> dict[str, float]:
    """Throughput and the latencies that would go with it."""
    tpot = 1e3 * batch / tokens_per_s
    found = {"tokens_per_s": tokens_per_s}
    for metric, middle in (("ttft", 6 + tpot * 2), ("tpot", tpot), ("latency", 6 + 64 * tpot)):
        spread = 1 + 8 * load**4
        found |= {f"{metric}_p50_ms": middle, f"{metric}_p95_ms": middle * 1.4 * spread}
        found[f"{metric}_p99_ms"] = middle * 1.8 * spread**1.3
    return found


def benchmarks(seed: int = 0, speed: float = 1.0) -> list[dict[str, Any]]:
    """A whole GPU suite in small: `speed` multiplies every rate and divides every time."""
    noise, found = random.Random(seed), []
    for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        rate = speed * 160_000 * batch / (batch + 45)
        found.append(
            entry(
                str(batch),
                "batch_size",
                noise,
                batch_size=batch,
                workload=f"paper-{batch}",
                **speeds(rate, batch),
            )
        )
    for policy, rate in (("sequential", 2900), ("dynamic", 38_000), ("continuous", 61_000)):
        found.append(entry(policy, "policy", noise, policy=policy, **speeds(speed * rate, 32)))
    for tokens in (128, 512, 2048, 8192):
        mfu = 62.0 * speed * tokens / (tokens + 300)
        found.append(
            entry(str(tokens), "prefill", noise, prompt_tokens=tokens, batch_size=1, prefill_mfu_pct=mfu)
        )
    for batch, context in ((1, 512), (32, 512), (32, 4096), (256, 1024)):
        share = speed * (58 if batch == 1 else 71)
        sizes = {"batch_size": batch, "context": context, "decode_bandwidth_pct": share}
        found.append(entry(f"{batch}-{context}", "decode", noise, **sizes))
    for rate in (4.0, 8.0, 16.0, 24.0, 32.0):
        load = rate / 32
        some = speeds(speed * 64 * 60 * math.tanh(1.5 * load) * 8, 32, load) | {
            "slo_ttft_ms": 200,
            "slo_tpot_ms": 20,
        }
        good = rate * min(1.0, 1.35 - 0.6 * load)
        name = {"arrivals": f"poisson:{rate:g}", "offered_rate": rate, "goodput": speed * good}
        found.append(entry(f"{rate:g}", "load", noise, **some, **name))
    for backend, rate in (
        ("generate", 2500),
        ("transformers-cb", 19_000),
        ("vllm", 48_000),
        ("engine", 61_000),
    ):
        found.append(
            entry(backend, "peers", noise, backend=backend, policy=backend, **speeds(rate * speed, 32))
        )
    for model, rate in (
        ("qwen2.5-0.5b", 61_000),
        ("qwen2-1.5b", 31_000),
        ("llama-7b", 8200),
        ("mistral-7b", 7900),
    ):
        found.append(entry(model, "scale", noise, model=f"random:{model}", **speeds(rate * speed, 32)))
    found.append(entry("cuda", "startup", noise, startup_s=7.3 / speed))
    return found


def save(
    folder: Path, name: str, entries: list[dict[str, Any]] | None = None, number: int = 1, **top: Any
) -> Path:
    """Write a run as pytest-benchmark's storage has it; gives its path."""
    commit = {"id": f"{number:x}" * 40, "dirty": False, "branch": "main", "time": "2026-11-24T02:00:00+00:00"}
    data: Mapping[str, Any] = {
        "machine_info": {
            "node": "runner",
            "python_version": "3.12.4",
            "machine": "x86_64",
            "cpu": {"brand_raw": "CPU"},
        },
        "commit_info": commit,
        "benchmarks": benchmarks(number) if entries is None else entries,
        "datetime": f"2026-11-{number:02d}T02:10:00+00:00",
        "version": "5.3.1",
        **top,
    }
    path = folder / f"{number:04d}_{name}.json"
    path.write_text(json.dumps(data))
    return path


def several(run: Run, sessions: int = 3) -> Run:
    """So many sessions that agree to the last digit: what is uncertain of them is in their rounds."""
    return saved_runs.merge([run] * sessions)


def quiet(storage: Path, runs: Iterable[Path], deviation: float = 1e-4) -> None:
    """Keep in a storage that sessions of these runs' benchmarks are known to differ by so little."""
    found = [
        Found(benchmark.fullname, benchmark.fingerprint, metric, deviation**2, 100)
        for path in runs
        for benchmark in saved_runs.read(path).benchmarks.values()
        for metric in benchmark.rounds
        if not METRICS[metric].is_counter
    ]
    write_noise(storage, found)
