"""From a model's name to a model, its tokenizer, its sizes and its parts; nothing here generates.

torch and transformers are imported inside functions: a command without a model starts at once.
"""

from engine.models.errors import ModelError
from engine.models.generation import sampling_defaults, with_defaults
from engine.models.geometry import (
    config_numbers,
    kv_bytes_per_token,
    kv_layers,
    max_positions,
    positions,
    refuse_other_state,
    ropes,
    telling_positions,
)
from engine.models.loader import LoadedModel, load
from engine.models.presets import PRESETS, SPECS, Preset, catalogue
from engine.models.smollm2 import smollm2_folder, smollm2_gguf
from engine.models.vocabulary import eos_ids, vocabulary

__all__ = [
    "PRESETS", "SPECS", "LoadedModel", "ModelError", "Preset", "catalogue", "config_numbers", "eos_ids",
    "kv_bytes_per_token", "kv_layers", "load", "max_positions", "positions", "refuse_other_state", "ropes",
    "sampling_defaults", "smollm2_folder", "smollm2_gguf", "telling_positions", "vocabulary", "with_defaults",
]  # fmt: skip
