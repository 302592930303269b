"""EngineConfig: how an engine batches, on what, and within which limits. Frozen, and valid once it exists."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import InputError
from engine.request import check_integer, check_number

POLICIES = ("sequential", "dynamic")
RUNNERS = ("auto", "padded")
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Configuration of an `Engine`. Raises InputError for a value out of bounds.

    Args:
        policy: who is admitted when: "sequential" runs one request at a time (the baseline); "dynamic" fills a batch
            in arrival order and runs it to completion.
        runner: how keys and values are held: "padded" in Transformers' own cache, with masks; "auto" chooses.
        device: "auto" (CUDA if there is one, else the CPU) or a torch device: "cpu", "cuda", "cuda:1".
        dtype: "auto" (float16 on CUDA, float32 elsewhere), float64, float32, bfloat16 or float16.
        max_batch_size: requests that share a step at most.
        max_step_tokens: positions one forward pass computes at most, padding included (but at least one a row).
        kv_memory: for keys and values: bytes (an int), or a fraction (a float up to 1) of the memory free at start.
        seed: seeds `random:` weights, and the draws of requests that bring no seed.
    """

    policy: str = "dynamic"
    runner: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    max_batch_size: int = 32
    max_step_tokens: int = 8192
    kv_memory: int | float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("policy", POLICIES), ("runner", RUNNERS), ("dtype", ("auto", *DTYPES))):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        check_integer("max_batch_size", self.max_batch_size, 1)
        check_integer("max_step_tokens", self.max_step_tokens, 1)
        check_integer("seed", self.seed, 0)
        if isinstance(self.kv_memory, int):
            check_integer("kv_memory", self.kv_memory, 1)
        else:
            check_number("kv_memory", self.kv_memory, 1e-9, 1.0)
