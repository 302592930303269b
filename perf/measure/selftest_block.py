"""A block of the gate's self-test: a process that prepares, and then measures whenever it is asked to.

Started by perf/gate/selftest.py; requests come in on stdin and answers go out on stdout, a line each.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import IO

import torch

from perf.gate.entries import KEY
from perf.gate.saved_runs import parse
from perf.measure.inject_slowdown import inject_slowdown
from perf.measure.session import BenchSession
from perf.measure.trial import Trial

ROUNDS = 6


def serve(requests: IO[str], replies: IO[str]) -> None:
    """A block's process: prepare as `perf_case` does, then time and save some rounds for each line of
    `requests`."""

    torch.set_num_threads(1)
    bench = BenchSession(model=None, dtype=None, rounds=None, quick=False, inject_slowdown=0.0)
    trial = Trial(bench, "selftest", "continuous", "mixed-16", device="cpu", max_batch_size=8)
    trial.prove()
    gc.freeze()  # all that was imported; else collecting it between rounds takes longer than a round
    print("ready", file=replies, flush=True)
    for line in requests:
        request = json.loads(line)
        trial.rounds.clear()
        with inject_slowdown(request["effect"]):
            for _ in range(ROUNDS):
                trial.before()
                trial.run()
                trial.after()
        data = {"benchmarks": [{"fullname": "selftest", "extra_info": {KEY: trial.info()}}]}
        parse(data, request["path"])  # what could not be judged fails here, where the reason is
        Path(request["path"]).write_text(json.dumps(data), encoding="utf-8")
        print("ready", file=replies, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not be taken for an answer
    serve(sys.stdin, answers)
