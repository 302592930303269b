"""Deterministic counters, saved and compared exactly: the gate for machines whose clocks can't be trusted.

How many passes, tokens, pads and bytes a workload costs depends on the code alone. A change is either a
mistake or is meant; then `python -m perf counters --record` writes the new ones, and the review shows which,
and by how much.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from engine import Counters, Engine, EngineConfig, kv_bytes_per_token, load, make_workload
from perf.errors import Exit

FILE = Path(__file__).parents[1] / "counters.json"
MODELS = tuple(f"random:tiny-{name}" for name in ("qwen2", "qwen3", "llama", "mistral", "gemma3"))
WORKLOADS = ("chat-8", "paper-2", "mixed-8", "shared-prefix-8")
# Small batches and steps, so that batches fill, prompts are cut and requests wait; the last two share and
# preempt.
CONFIGS: dict[str, dict[str, Any]] = {
    "sequential": {"policy": "sequential"},
    "dynamic": {"policy": "dynamic", "max_batch_size": 4},
    "continuous": {
        "policy": "continuous",
        "max_batch_size": 4,
        "max_step_tokens": 128,
        "prefix_caching": False,
    },
    "continuous-shared": {"policy": "continuous", "max_batch_size": 4, "max_step_tokens": 128},
    "continuous-tight": {"policy": "continuous", "max_batch_size": 4, "max_step_tokens": 128},
}
TIGHT_KV_TOKENS = 384  # that the memory of "-tight" holds
Table = dict[str, dict[str, int]]


def measure(spec: str) -> Table:
    """Return the counters of one model, by "model workload config"; EOS is ignored throughout, so that no
    token matters."""
    loaded = load(spec)
    found: Table = {}
    for name in WORKLOADS:
        work = make_workload(name, vocab_size=loaded.model.config.vocab_size)
        items = [replace(item, params=replace(item.params, ignore_eos=True)) for item in work.items]
        for label, options in CONFIGS.items():
            config = EngineConfig(**options)
            if label.endswith("tight"):
                config = replace(config, kv_memory=TIGHT_KV_TOKENS * kv_bytes_per_token(loaded.model))
            engine = Engine(loaded, config)
            engine.replay(items, progress=False)
            counters = engine.metrics.counters
            names = [field.name for field in fields(Counters) if field.name != "batch_sizes"]
            found[f"{spec} {name} {label}"] = {key: getattr(counters, key) for key in names}
    return found


def saved(path: Path = FILE) -> Table:
    """Return the committed counters.

    Raises:
        FileNotFoundError: where none were recorded.
    """
    table: Table = json.loads(path.read_text())
    return table


def differences(base: Table, head: Table) -> Iterator[str]:
    """Give a line for each counter that is not what it was, and for each row that came or went."""
    for row in sorted({*base, *head}):
        if row not in head:
            yield f"{row}: gone"
        elif row not in base:
            yield f"{row}: new, not recorded"
        else:
            for key in sorted({*base[row], *head[row]}):
                old, new = base[row].get(key), head[row].get(key)
                if old != new:
                    yield f"{row}: {key} was {old}, is {new}"


def main(record: bool = False, path: Path = FILE) -> Exit:
    """Compare all counters with the committed ones, or write them; prints what differs."""
    head: Table = {}
    for spec in MODELS:
        head |= measure(spec)
    if record:
        rows = ",\n".join(f" {json.dumps(row)}: {json.dumps(values)}" for row, values in head.items())
        path.write_text("{\n" + rows + "\n}\n")
        print(f"wrote {len(head)} rows to {path}")
        return Exit.PASS
    if not path.is_file():
        print(f"no counters at {path}: record them with `python -m perf counters --record`")
        return Exit.NOT_COMPARABLE
    found = list(differences(saved(path), head))
    print("\n".join(found) or f"{len(head)} rows of counters are as recorded")
    if found:
        print("if this is meant, record it: python -m perf counters --record")
    return Exit.REGRESSION if found else Exit.PASS
