"""dynamic-batch: dynamic batching for unmodified Hugging Face Transformers causal language models.

The public API and nothing else. What needs torch or numpy is imported when first used, so that
`import engine` and `python -m engine --help` wait for neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.errors import InputError
from engine.machine import cache_dir, cpu_name, processors
from engine.metrics import Counters, EngineMetrics, RequestMetrics
from engine.models import (
    LoadedModel,
    kv_bytes_per_token,
    kv_layers,
    load,
    max_positions,
    smollm2_folder,
    smollm2_gguf,
)
from engine.request import FinishReason, RequestOutput, SamplingParams, StreamChunk, WorkItem

if TYPE_CHECKING:
    from engine.async_engine import AsyncEngine
    from engine.bench.compare import transformers_generate as generate_with_transformers
    from engine.bench.workload import Workload, make_workload
    from engine.engine import Engine

__version__ = "0.1.0"
__all__ = [
    "AsyncEngine", "Counters", "Engine", "EngineConfig", "EngineMetrics", "FinishReason", "InputError",
    "LoadedModel", "RequestMetrics", "RequestOutput", "SamplingParams", "StreamChunk", "WorkItem", "Workload",
    "cache_dir", "cpu_name", "generate_with_transformers", "kv_bytes_per_token", "kv_layers", "load",
    "make_workload", "max_positions", "processors", "smollm2_folder", "smollm2_gguf",
]  # fmt: skip
_LATER = {  # where each is, and what it is called there
    "AsyncEngine": ("async_engine", "AsyncEngine"),
    "Engine": ("engine", "Engine"),
    "Workload": ("bench.workload", "Workload"),
    "generate_with_transformers": ("bench.compare", "transformers_generate"),
    "make_workload": ("bench.workload", "make_workload"),
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        module, attribute = _LATER[name]
        return getattr(import_module(f"engine.{module}"), attribute)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
