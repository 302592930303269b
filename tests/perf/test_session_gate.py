"""The gate of a session before it begins: what it needs, and what it knows of its machine."""

from __future__ import annotations

import pytest

from perf.errors import Exit, GateError
from perf.gate import saved_runs, saving, session_gate
from perf.gate.session_gate import check_session


@pytest.mark.parametrize(("off", "says"), [
    (saving.XDIST, "xdist turns benchmarks off: run without -n"),
    (saving.DISABLE, "run without --benchmark-disable"),
    (saving.SKIP, "run without --benchmark-skip"),
])  # fmt: skip
def test_a_session_that_times_nothing_is_a_usage_error(tmp_path, off, says):
    with pytest.raises(GateError, match=says) as error:
        check_session("main", tmp_path, off)
    assert error.value.code is Exit.USAGE


def test_a_session_without_its_baseline_ends_before_it_begins(tmp_path):
    with pytest.raises(GateError, match="no run 'main'") as error:
        check_session("main", tmp_path)
    assert error.value.code is Exit.NOT_COMPARABLE


def test_a_storage_that_is_no_folder_tells_nothing():
    base = saved_runs.parse({"benchmarks": [{"fullname": "t", "stats": {"data": [1.0]}}]}, "x.json")
    noise = session_gate._noise("elasticsearch+http://user:secret@here:9200/i/t", base)
    assert (noise.groups, noise.found) == ({}, {})
    assert "noise is taken for unknown: storage elasticsearch+http://... is an" in noise.notes[0]
