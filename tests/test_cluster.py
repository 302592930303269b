"""A file of requests on two engines of a Ray cluster: one engine's answers, though an actor is killed."""

from __future__ import annotations

import os
import threading
import time

import psutil
import pytest

from engine import Engine, EngineConfig
from engine.batch import run as run_here
from tests.test_batch import line, read, write

pytest.importorskip("ray.data", reason="needs Ray: pip install 'dynamic-batch[ray]'")
pytestmark = pytest.mark.slow

ROWS = 10_000


def kill_an_actor(target, killed):
    """End a worker's process once some answers are there."""
    while not target.exists() or target.stat().st_size == 0:
        time.sleep(0.05)
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or ())
        if title.startswith("ray::") and "Worker" in title:
            process.kill()
            killed.append(process.pid)
            return


def test_two_replicas_of_which_one_is_killed_give_the_answers_of_one_engine(tiny, tmp_path):
    source = write(tmp_path / "in", [*(line(n) for n in range(ROWS)), "no json"])
    target, killed = tmp_path / "out", []
    killer = threading.Thread(target=kill_an_actor, args=(target, killed))
    killer.start()
    from engine.cluster.batch import Cluster, run

    config = EngineConfig(max_batch_size=32, device="cpu")
    found = run(source, target, "random:tiny-llama", config, "tiny", Cluster(replicas=2, cpus=0.5))
    killer.join()
    assert killed
    assert killed[0] != os.getpid()
    assert (found.rows, found.answered, found.failed) == (ROWS + 1, ROWS, 1)
    expected = tmp_path / "expected"
    run_here(Engine(tiny("tiny-llama").loaded, config), "tiny", source, expected, progress=False)

    def told(path):
        return {
            record["id"]: record["response"] and record["response"]["body"]["choices"]
            for record in read(path)
        }

    assert len(read(target)) == ROWS + 1
    assert told(target) == told(expected)
