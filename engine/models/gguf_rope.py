"""A GGUF file's rotary embedding (RoPE), as `rope_parameters` of a Transformers config."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from engine.models.gguf_keys import head_dim

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from engine.models.gguf_file import GgufFile

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FREQS, LONG, SHORT)
ORIGINAL = "rope.scaling.original_context_length"
# Read by `_scaling`, or saying only how a model was made.
READ = {"rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", ORIGINAL, "rope.scaling.attn_factor",
        "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.finetuned",
        "rope.dimension_sections"}  # fmt: skip
NEUTRAL = {
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "rope.scaling.yarn_ext_factor": (1,),
}  # fmt: skip


def set_rope(file: GgufFile, config: PreTrainedConfig) -> None:
    """Put the file's rope.* keys and tensors into the config.

    Raises:
        ModelError: naming a key or tensor that has no exact counterpart there.
    """
    own, given = file.own, getattr(config, "rope_parameters", None) or {}
    full = given.get("full_attention", given)  # of layers with a window, that stays as it is
    found = [name for name in (*own, *file.tensors) if name.startswith("rope")]
    if not given:
        if found:
            raise file.refusal(found[0], f"and {config.model_type} has no rotary embedding")
        return
    for key, value in own.items():
        if key == "rope.freq_base":
            full["rope_theta"] = value
        elif key == "rope.freq_base_swa" and "sliding_attention" in given:
            given["sliding_attention"]["rope_theta"] = value
        elif key == "rope.dimension_count":
            _set_width(file, config, full, value)
        elif key == "rope.dimension_count_swa":
            if value != head_dim(config):
                raise file.refusal(key)
        elif key.startswith("rope.") and key not in READ and value not in NEUTRAL.get(key, ()):
            raise file.refusal(key)
    full.update(_scaling(file, config, own, nested=full is not given))
    original = full.get("original_max_position_embeddings")
    if original is not None and hasattr(config, "original_max_position_embeddings"):  # Phi-3 has it twice
        config.original_max_position_embeddings = original


def _set_width(file: GgufFile, config: PreTrainedConfig, full: dict[str, Any], value: int) -> None:
    """Set how many of a head's dimensions are rotated; a config says which part of them."""
    size = getattr(config, "global_head_dim", None) or head_dim(config)
    part = full.get("partial_rotary_factor", 1.0)
    if value not in (getattr(config, "rotary_dim", None), int(size * part)):
        if "partial_rotary_factor" not in full:
            why = f"for heads of {size}, all of which {config.model_type} rotates"
            raise file.refusal("rope.dimension_count", why)
        full["partial_rotary_factor"] = value / size


def _scaling(file: GgufFile, config: PreTrainedConfig, own: dict[str, Any], nested: bool) -> dict[str, Any]:
    """Return the scaling as a config has it: nothing where the file has none."""
    kind, attention = own.get("rope.scaling.type"), own.get("rope.scaling.attn_factor", 1.0)
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear")) or 1.0
    original = own.get(ORIGINAL, config.max_position_embeddings)
    if tensors := [name for name in ROPE_TENSORS if name in file.tensors]:
        alone = not nested and factor == 1.0
        if alone and tensors == [FREQS] and kind in (None, "none", "linear") and attention == 1.0:
            # A frequency is divided by the same number at every position: longrope whose long factors are its
            # short ones, and which would come to the long ones only beyond the last position.
            return _longrope(file, config, FREQS, FREQS, config.max_position_embeddings, 1.0)
        if alone and tensors == [LONG, SHORT] and kind in (None, "none", "longrope"):
            return _longrope(file, config, LONG, SHORT, original, attention)
        why = f"a tensor that does not go with a scaling of type {kind}, factor {factor:g}"
        raise file.refusal(tensors[0], why)
    if attention != 1.0:
        raise file.refusal("rope.scaling.attn_factor")
    if kind in (None, "none", "linear"):
        return {} if factor == 1.0 or kind == "none" else {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        keys = {name: f"rope.scaling.yarn_{name}" for name in ("beta_fast", "beta_slow")}
        betas = {name: own[key] for name, key in keys.items() if key in own}
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas}
    raise file.refusal("rope.scaling.type", "a scaling of RoPE that is not honoured here")


def _longrope(
    file: GgufFile, config: PreTrainedConfig, long: str, short: str, original: int, attention: float
) -> dict[str, Any]:
    """Return a scaling that divides by the numbers of `short`, or of `long` beyond `original` positions."""
    width = int(head_dim(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))
    factors = {name: [float(factor) for factor in file.tensors[name].data] for name in (long, short)}
    for name, values in factors.items():
        if len(values) != width // 2:
            raise file.refusal(name, f"a tensor of {len(values)} numbers for {width // 2} frequencies")
        if not all(0 < factor < math.inf for factor in values):
            raise file.refusal(name, "a tensor of numbers that must be above 0")
    if attention == 1.0 and all(factor == 1.0 for values in factors.values() for factor in values):
        return {}
    return {
        "rope_type": "longrope",
        "long_factor": factors[long],
        "short_factor": factors[short],
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }
