"""From a model spec to a model, its tokenizer and its sizes; nothing here runs one.

torch and transformers are imported inside functions: a command without a model starts at once.
"""

from engine.models.geometry import (
    config_numbers,
    kv_bytes_per_token,
    kv_layers,
    positions,
    refuse_other_state,
    ropes,
    telling_positions,
)
from engine.models.loader import LoadedModel, load
from engine.models.presets import PRESETS, SPECS, Preset, catalogue
from engine.models.stored import ModelError

__all__ = [
    "PRESETS", "SPECS", "LoadedModel", "ModelError", "Preset", "catalogue", "config_numbers", "kv_bytes_per_token",
    "kv_layers", "load", "positions", "refuse_other_state", "ropes", "telling_positions",
]  # fmt: skip
