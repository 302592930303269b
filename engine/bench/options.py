"""The options of a comparison, checked before any work: no torch may enter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from engine.bench.workload import check_workload
from engine.config import POLICIES, EngineConfig
from engine.errors import InputError, check, shown

GENERATE = "generate"  # Transformers' own, which is no policy of the engine
PLOTS = (".png", ".svg", ".pdf")


def combinations(policies: Sequence[str], batch_sizes: Sequence[int]) -> list[tuple[str, int]]:
    """Return the (policy, batch size) pairs to compare.

    "sequential" runs once, "generate" at every size, the others at those above 1.

    Raises:
        InputError: for an unknown policy, a batch size below 1, or nothing to run.
    """
    for policy in policies:
        if policy not in (known := (GENERATE, *POLICIES)):
            raise InputError(f"policies has {policy!r}: choose from {', '.join(known)}")
    for size in batch_sizes:
        check("batch-sizes", size, int, 1)
    several = [size for size in batch_sizes if size > 1]
    sizes = {"sequential": [1], GENERATE: batch_sizes}
    pairs = [(policy, size) for policy in policies for size in sizes.get(policy, several)]
    if not pairs:
        raise InputError("nothing to run: give policies, and a batch size above 1 for those that batch")
    return list(dict.fromkeys(pairs))


@dataclass(frozen=True)
class BenchOptions:
    """The options of `python -m engine bench`, by their names, and what they come to.

    Raises InputError for whatever can be known to be wrong before a model is loaded.
    """

    model: str
    policies: str
    batch_sizes: str
    workload: str
    arrivals: str
    rounds: int
    device: str
    dtype: str
    seed: int
    csv: Path | None
    json: Path | None
    plot: Path | None
    wide: bool
    combinations: list[tuple[str, int]] = field(init=False)
    config: EngineConfig = field(init=False)

    def __post_init__(self) -> None:
        names = [policy.strip() for policy in self.policies.split(",")]
        try:
            sizes = [int(size) for size in self.batch_sizes.split(",")]
        except ValueError:
            problem = "must be whole numbers, comma-separated: 1,4,16"
            raise InputError(f"batch-sizes={shown(self.batch_sizes)} {problem}") from None
        object.__setattr__(self, "combinations", combinations(names, sizes))
        for option, path in (("csv", self.csv), ("json", self.json), ("plot", self.plot)):
            if path and (path.is_dir() or not os.access(path.parent, os.W_OK)):
                problem = "cannot be written: name a file in a folder that is there"
                raise InputError(f"{option}={str(path)!r} {problem}")
        if self.plot and self.plot.suffix not in PLOTS:
            raise InputError(f"plot={str(self.plot)!r} must end in one of {', '.join(PLOTS)}")
        if self.plot and find_spec("matplotlib") is None:
            raise InputError("plot needs matplotlib: pip install 'dynamic-batch[plot]'")
        if check_workload(self.workload, seed=self.seed, arrivals=self.arrivals) and GENERATE in names:
            has = f"and workload={shown(self.workload)} has some"
            problem = f"which holds no conversations, {has}: leave it out"
            raise InputError(f"policies has {GENERATE!r}, {problem}")
        if self.dtype == "int8" and GENERATE in names:
            problem = "which is Transformers' own: leave it out of dtype='int8'"
            raise InputError(f"policies has {GENERATE!r}, {problem}")
        config = EngineConfig(device=self.device, dtype=self.dtype, seed=self.seed, generation_config="none")
        object.__setattr__(self, "config", config)
