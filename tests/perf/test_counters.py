"""The counters gate: every difference has a line, a change is recorded by one command, the file covers
everything."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from engine.models import PRESETS
from perf.errors import Exit
from perf.measure import counters

BASE = {"m w sequential": {"forward_passes": 10, "padded_tokens": 0}, "m w dynamic": {"forward_passes": 4}}


def test_equal_tables_differ_in_nothing():
    assert list(counters.differences(BASE, json.loads(json.dumps(BASE)))) == []


def test_every_kind_of_difference_has_its_line():
    head = {
        "m w sequential": {"forward_passes": 11, "preemptions": 2},
        "m w continuous": {"forward_passes": 4},
    }
    assert list(counters.differences(BASE, head)) == [
        "m w continuous: new, not recorded",
        "m w dynamic: gone",
        "m w sequential: forward_passes was 10, is 11",
        "m w sequential: padded_tokens was 0, is None",
        "m w sequential: preemptions was None, is 2",
    ]


def test_recording_and_comparing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file, costs = tmp_path / "counters.json", {"steps": 3}
    monkeypatch.setattr(counters, "measure", lambda spec: {f"{spec} w sequential": dict(costs)})
    assert counters.main(path=file) is Exit.NOT_COMPARABLE
    assert "--record" in capsys.readouterr().out
    assert counters.main(record=True, path=file) is Exit.PASS
    assert counters.main(path=file) is Exit.PASS
    assert f"{len(counters.MODELS)} rows of counters are as recorded" in capsys.readouterr().out
    costs["steps"] = 4
    assert counters.main(path=file) is Exit.REGRESSION
    assert "random:tiny-llama w sequential: steps was 3, is 4" in capsys.readouterr().out


def test_the_committed_file_has_every_tiny_model_workload_and_config_and_a_line_each():
    parts = itertools.product(counters.MODELS, counters.WORKLOADS, counters.CONFIGS)
    rows = set(map(" ".join, parts))
    assert set(counters.saved()) == rows
    assert len(counters.FILE.read_text().splitlines()) == len(rows) + 2
    assert {f"random:{name}" for name in PRESETS if name.startswith("tiny")} == set(counters.MODELS)


def test_the_committed_file_sees_padding_sharing_and_preemption():
    table = counters.saved()
    assert sum(row["padded_tokens"] for name, row in table.items() if name.endswith("dynamic")) > 0
    assert sum(row["prompt_tokens_cached"] for name, row in table.items() if name.endswith("shared")) > 0
    assert sum(row["preemptions"] for name, row in table.items() if name.endswith("tight")) > 0
    assert len({name.split()[1]: 0 for name in table}) == len(counters.WORKLOADS)
    for name, row in table.items():  # whatever the config, the work asked for is the same
        alone = table[" ".join([*name.split()[:2], "sequential"])]
        assert row["output_tokens"] == alone["output_tokens"], name
