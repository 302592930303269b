"""Ctrl-C while a bench runs: what has finished is shown and written, and the exit code says so."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest

from engine import Engine, FinishReason
from engine.cli import main
from engine.output import INTERRUPTED

TINY = "random:tiny-qwen2"


@pytest.mark.parametrize("finished", [2, 0])
def test_an_interrupt_shows_what_finished(tmp_path, monkeypatch, capfd, finished):
    replay, runs = Engine.replay, itertools.count()

    def interrupted(self, items, **options):
        outputs = replay(self, items, **options)
        if len(items) > 2 and next(runs) == finished:  # of two: the warm-up
            return [replace(output, finish_reason=FinishReason.ABORT) for output in outputs]
        return outputs

    monkeypatch.setattr(Engine, "replay", interrupted)
    work = ["--workload", "mixed-3", "--batch-sizes", "2", "--csv", "out.csv"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("engine.progress.LINE_EVERY_S", math.inf)  # or a busy machine would add lines
    with pytest.raises(SystemExit) as exit:
        main(["bench", "--model", TINY, *work])
    out, err = capfd.readouterr()
    assert (exit.value.code, err) == (INTERRUPTED, "interrupted: showing the runs that finished\n")
    if not finished:
        assert (out, list(tmp_path.iterdir())) == ("", [])
        return
    assert re.findall(r"^(sequential|dynamic|continuous) +(\d) ", out, re.MULTILINE) == [
        ("sequential", "1"),
        ("dynamic", "2"),
    ]
    assert pd.read_csv(tmp_path / "out.csv").groupby("run").size().tolist() == [3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("wait_for", ["a finished run", "nothing"])
def test_ctrl_c_shows_what_finished(tmp_path, wait_for):
    policies = "sequential,dynamic" if wait_for == "a finished run" else "dynamic,sequential"
    workload = "paper-40" if wait_for == "nothing" else "mixed-3"
    work = ["--workload", workload, "--rounds", "100000", "--csv", "out.csv"]
    command = [sys.executable, "-c", INTERRUPTIBLE, "bench", "--model", TINY, "--policies", policies, *work]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    runs = 1 if wait_for == "nothing" else 4
    assert process.stderr is not None
    for line in process.stderr:
        runs -= line == "RUN\n"
        if runs == 0:
            break
    time.sleep(0.3)
    err = "five interrupts changed nothing"
    try:
        # Python drops an interrupt that falls into a finaliser, and then one presses again
        for _ in range(5):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, err = process.communicate(timeout=12)
                break
    finally:
        process.kill()
    assert process.returncode == INTERRUPTED, err
    assert "Traceback" not in err
    assert "interrupted: showing the runs that finished" in err
    if wait_for == "nothing":
        assert (out, list(tmp_path.iterdir())) == ("", [])
        return
    assert re.search(r"^sequential +1 ", out, re.MULTILINE)
    assert re.search(r"^dynamic +8 ", out, re.MULTILINE)
    rows = pd.read_csv(tmp_path / "out.csv")
    assert (rows.groupby("run").size() == 3).all()
    assert set(rows.finish_reason) == {"length"}


INTERRUPTIBLE = """
import sys
from engine import Engine, cli
replay = Engine.replay
def told(self, items, **kwargs):
    if len(items) > 2:  # not the warm-up
        print("RUN", file=sys.stderr, flush=True)
    return replay(self, items, **kwargs)
Engine.replay = told
cli.main()
"""
