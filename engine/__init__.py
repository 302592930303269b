"""dynamic-batch: dynamic batching for unmodified Hugging Face Transformers causal language models.

The public API and nothing else. Names are imported when first used, so that `python -m engine --help` and
`import engine` cost milliseconds and not an import of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # "as" marks a re-export
    from engine.aio import AsyncEngine as AsyncEngine
    from engine.config import EngineConfig as EngineConfig
    from engine.engine import Engine as Engine
    from engine.errors import InputError as InputError
    from engine.metrics import EngineMetrics as EngineMetrics, RequestMetrics as RequestMetrics
    from engine.models import LoadedModel as LoadedModel, load as load
    from engine.request import (
        FinishReason as FinishReason,
        RequestOutput as RequestOutput,
        SamplingParams as SamplingParams,
        StreamChunk as StreamChunk,
    )
    from engine.workload import Workload as Workload, make as make

__version__ = "0.1.0"
_HOME = {
    "engine.aio": ("AsyncEngine",),
    "engine.config": ("EngineConfig",),
    "engine.engine": ("Engine",),
    "engine.errors": ("InputError",),
    "engine.metrics": ("EngineMetrics", "RequestMetrics"),
    "engine.models": ("LoadedModel", "load"),
    "engine.request": ("FinishReason", "RequestOutput", "SamplingParams", "StreamChunk"),
    "engine.workload": ("Workload", "make"),
}
__all__ = [name for names in _HOME.values() for name in names]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
