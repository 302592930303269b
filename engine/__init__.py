"""dynamic-batch: dynamic batching for unmodified Hugging Face Transformers causal language models.

The public API and nothing else. What needs torch or numpy is imported when first used, so that
`import engine` and `python -m engine --help` wait for neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.errors import InputError
from engine.metrics import EngineMetrics, RequestMetrics
from engine.models import LoadedModel, load
from engine.request import FinishReason, RequestOutput, SamplingParams, StreamChunk

if TYPE_CHECKING:
    from engine.aio import AsyncEngine
    from engine.engine import Engine
    from engine.workload import Workload, make

__version__ = "0.1.0"
__all__ = [
    "AsyncEngine", "Engine", "EngineConfig", "EngineMetrics", "FinishReason", "InputError", "LoadedModel",
    "RequestMetrics", "RequestOutput", "SamplingParams", "StreamChunk", "Workload", "load", "make",
]  # fmt: skip
_LATER = {"AsyncEngine": "aio", "Engine": "engine", "Workload": "workload", "make": "workload"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"engine.{_LATER[name]}"), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
