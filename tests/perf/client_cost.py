"""What the HTTP client itself costs and adds: `python -m tests.perf.client_cost`.

The server is a process of its own, whose answers take a known time. Told are the processor time that the
client spends on a token at 32 streams, and by how much it mistakes a first token that comes after exactly
50 ms.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import join
from tempfile import TemporaryDirectory

import numpy as np

from engine import SamplingParams, WorkItem
from perf.backends import Outcome, Setup
from perf.backends.http.backend import Http
from perf.servers.launch import running
from perf.servers.target import Target
from tests.perf import scripted_server

FIRST_MS, GAP_MS, STREAMS, TOKENS, ROUNDS = 50, 20, 32, 200, 5


@contextmanager
def server(**how: float) -> Iterator[Target]:
    """A scripted server in a process of its own."""
    options = [f"{name}={value}" for name, value in how.items()]
    command = join([sys.executable, scripted_server.__file__, "{port}", *options])
    with (
        TemporaryDirectory() as folder,
        running("server", command, Path.cwd(), os.environ, Path(folder) / "log") as target,
    ):
        yield target


def rounds(
    target: Target, streams: int, requests: int, tokens: int
) -> Iterator[tuple[Outcome, float, float]]:
    """Each round's outcome, and the seconds of wall and of processor time that it took."""
    params = SamplingParams(max_new_tokens=tokens, temperature=0, ignore_eos=True)
    items = [WorkItem(list(range(20 + i, 60 + i)), params) for i in range(requests)]
    session = Http().open(Setup(None, "cpu", "float32", streams, options={"target": target}))
    try:
        session.run(items)  # which opens the connections
        for _ in range(ROUNDS):
            session.reset()
            wall, cpu = time.perf_counter(), time.process_time()
            outcome = session.run(items)
            yield outcome, time.perf_counter() - wall, time.process_time() - cpu
    finally:
        session.close()


def main() -> None:
    with server(first_ms=FIRST_MS) as target:
        found = [ms for one, *_ in rounds(target, 1, 40, 1) for ms in one.metrics.latencies("ttft_ms")]
    off = np.array(found) - FIRST_MS
    with server(gap_ms=GAP_MS) as target:
        costs = [
            (
                cpu / one.metrics.counters.output_tokens * 1e6,
                one.metrics.counters.output_tokens / wall,
                cpu / wall,
            )
            for one, wall, cpu in rounds(target, STREAMS, STREAMS, TOKENS)
        ]
    us, rate, share = np.median(np.array(costs), axis=0)
    told = {
        "ttft_off_p50_ms": round(float(np.median(off)), 3),
        "ttft_off_p95_ms": round(float(np.quantile(off, 0.95)), 3),
        "within_1_ms_pct": round(100 * float((np.abs(off) < 1).mean()), 1),
        "streams": STREAMS, "tokens_per_s": round(float(rate)), "cpu_us_per_token": round(float(us), 1),
        "cpu_share_of_one_pct": round(100 * float(share), 1),
    }  # fmt: skip
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
