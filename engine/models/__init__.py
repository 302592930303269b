"""From a model spec to a model, its tokenizer and its sizes; nothing here runs one.

torch and transformers are imported inside functions: a command without a model starts at once.
"""

from engine.models.geometry import kv_bytes_per_token, kv_shape, positions, ropes
from engine.models.loader import LoadedModel, load
from engine.models.presets import PRESETS, SPECS, Preset, catalogue
from engine.models.stored import ModelError

__all__ = [
    "PRESETS", "SPECS", "LoadedModel", "ModelError", "Preset", "catalogue", "kv_bytes_per_token", "kv_shape", "load",
    "positions", "ropes",
]  # fmt: skip
