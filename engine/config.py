"""EngineConfig: how an engine batches, on what, and within which limits. Frozen, and valid once it exists."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from engine.errors import InputError, bounded, check, check_choice, check_fields, check_text, plain, shown

POLICIES = ("sequential", "dynamic", "continuous")
RUNNERS = ("auto", "packed", "padded")
DTYPES = ("float64", "float32", "bfloat16", "float16")
GENERATION_CONFIGS = ("auto", "none")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Configuration of an `Engine`. Raises InputError for a value out of bounds.

    Args:
        policy: who is admitted when: "sequential" runs one request at a time (the baseline); "dynamic" fills
            a batch in arrival order and runs it to completion; "continuous" admits at every step.
        runner: how keys and values are held: "packed" in pages, without any padding; "padded" in
            Transformers' own cache, with masks (not for "continuous"); "auto" is packed for "continuous" and
            padded for the other two, and falls back to padded, with a warning, for a model that cannot run
            packed. (Deterministic and int8 engines are always packed.)
        device: "auto" (CUDA if there is one, else the CPU) or a torch device: "cpu", "cuda", "cuda:1".
        dtype: "auto" (float16 on CUDA; on a CPU bfloat16 for a folder or hub id whose config says so, where
            the processor multiplies it, else float32; unlike machines answer alike in a dtype that is named),
            float64, float32, bfloat16 or float16; or "int8":
            float32 with the weights of linear layers in int8, and keys and values in bfloat16, for models
            that run compiled (packed on a CPU): fewer bytes to read, and not quite the same model. On a CPU,
            bfloat16 runs compiled too, with sums in float32; float16 and float64 do not.
        max_batch_size: requests that share a step at most.
        max_step_tokens: tokens a step computes at most; longer prompts are computed in several. None: 512
            packed on a CPU, where more do not fit its caches, else 8192. (Padded: positions of one forward
            pass, padding included, but at least one a row.)
        page_size: tokens of one page of KV memory (packed).
        prefix_caching: keep what was computed and reuse it for prompts that begin the same (packed).
        deterministic: bitwise the same logits for a request whatever shares its batch (packed).
            Slower on CUDA; refused for models that run as Transformers wrote them.
        kv_memory: for keys and values: bytes (an int), or a fraction (a float up to 1) of the memory free at
            start.
        seed: seeds `random:` weights, and the draws of requests that bring no seed.
        metrics_window: requests whose own metrics are kept, the last that ended: percentiles are of these,
            counters and rates of all. None: all of them, which an engine that serves for days has no memory
            for.
        generation_config: where the parameters come from that a request does not state: "auto" is the model's
            generation_config (max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty; as with
            `generate`, tokens are drawn only if it says `do_sample`), "none" what SamplingParams says.
            EOS ids are the model's either way.
    """

    policy: str = "continuous"
    runner: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    max_batch_size: int = bounded(32, int, 1)
    max_step_tokens: int | None = bounded(None, int, 1)
    page_size: int = bounded(16, int, 1)
    prefix_caching: bool = bounded(True, bool)
    deterministic: bool = bounded(False, bool)
    kv_memory: int | float = 0.6
    seed: int = bounded(0, int, 0, 2**63 - 1)
    metrics_window: int | None = bounded(1000, int, 1, 2**31, optional=True)
    generation_config: str = "auto"

    def __post_init__(self) -> None:
        choices = {"policy": POLICIES, "runner": RUNNERS, "dtype": ("auto", *DTYPES, "int8")}
        for name, allowed in {**choices, "generation_config": GENERATION_CONFIGS}.items():
            check_choice(name, getattr(self, name), allowed)
        check_fields(self)
        if not isinstance(self.device, str) or not self.device:
            raise InputError(f"device={shown(self.device)} must be auto, cpu, cuda or cuda:N")
        check_text("device", self.device)
        bytes_or_share: Any = (int, 1) if isinstance(plain(self.kv_memory), int) else (float, 1e-9, 1)
        object.__setattr__(self, "kv_memory", check("kv_memory", self.kv_memory, *bytes_or_share))
        if self.runner == "padded" and (self.policy == "continuous" or self.deterministic):
            raise InputError(
                "runner='padded' can be neither continuous nor deterministic: use runner='packed'"
            )
        if self.dtype == "int8":
            bad = "runner" if self.runner == "padded" else "device"
            if bad == "runner" or self.device.split(":")[0] not in ("auto", "cpu"):
                problem = f"{bad}={getattr(self, bad)!r}: change one of the two"
                raise InputError(f"dtype='int8' runs packed on a CPU, not with {problem}")

    @property
    def must_pack(self) -> bool:
        """True if no runner but the packed one will do."""
        return self.runner == "packed" or self.deterministic or self.dtype == "int8"

    @property
    def kv_itemsize(self) -> int | None:
        """Bytes of a number of keys and values in pages, or None: of the model's own dtype."""
        return 2 if self.dtype == "int8" else None

    def resolve(self, device: str, dtype: str) -> EngineConfig:
        """Return this for a model's device and dtype, with the runner and a step's tokens chosen too.

        Raises:
            InputError: for a model that cannot be quantized, where it should be.
        """
        if self.dtype == "int8":
            if not device.startswith("cpu") or dtype != "float32":
                raise InputError(
                    f"dtype='int8' quantizes a float32 model on a CPU; this one is {dtype} on {device}: "
                    "load it with dtype='float32', device='cpu'"
                )
            dtype = "int8"
        runner = self.runner
        if runner == "auto":
            runner = "packed" if self.policy == "continuous" or self.must_pack else "padded"
        tokens = self.max_step_tokens or (512 if runner == "packed" and device.startswith("cpu") else 8192)
        return replace(self, device=device, dtype=dtype, runner=runner, max_step_tokens=tokens)
