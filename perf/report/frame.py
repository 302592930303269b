"""Runs as a table for pandas and CSV: everything that was recorded, a row a run and benchmark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from perf.gate.saved_runs import Run

if TYPE_CHECKING:
    import pandas as pd


def frame(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a run and benchmark: where it comes from, our record, `fingerprint.*`, `rounds.*`, each a JSON
    list of one value a round, and `extra_info.*`, the notes of others."""
    import pandas as pd

    rows = []
    for run in runs:
        source = {"run": run.name, "commit": run.commit.get("id"), "datetime": run.datetime}
        for name, b in run.benchmarks.items():
            prints = {f"fingerprint.{key}": value for key, value in b.fingerprint.items()}
            rounds = {f"rounds.{key}": json.dumps(values) for key, values in b.rounds.items()}
            notes = {f"extra_info.{key}": value for key, value in b.notes.items()}
            measured = {**b.info, **prints, **rounds, **notes}
            rows.append({**source, "benchmark": name, "group": b.group, **measured})
    return pd.DataFrame(rows)
