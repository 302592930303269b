"""The meaning in a config of each key of a GGUF file's architecture: sizes, norms, attention, experts.

A key is copied into the config where that has a place for it which Transformers leaves alone, and must agree
with it elsewhere. Where the config has no such thing, the value must be one that changes nothing. The rest is
refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from engine.models.gguf_file import GgufFile


EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
# The attributes of a key: its value is copied to the first that the config has, or must agree with it.
COPIED: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "vocab_size": ("vocab_size",),
    "attention.layer_norm_rms_epsilon": EPSILONS,
    "attention.layer_norm_epsilon": EPSILONS,
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
}
AGREEING: dict[str, tuple[str, ...]] = {
    "embedding_length": ("hidden_size",),
    "embedding_length_out": ("hidden_size",),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",),
    "attention.head_count": ("num_attention_heads",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "full_attention_interval": ("full_attention_interval",),
    "shortconv.l_cache": ("conv_L_cache",),
    "ssm.conv_kernel": ("linear_conv_kernel_dim", "conv_kernel"),
    "ssm.state_size": ("linear_key_head_dim", "state_size"),
    "ssm.group_count": ("linear_num_key_heads",),
    "ssm.time_step_rank": ("linear_num_value_heads", "time_step_rank"),
}
# What changes nothing where there is no attribute: of these keys anything (layers that guess ahead choose no
# token, pooling is for embeddings), of the others a value or two.
ANY_VALUE = {"context_length", "nextn_predict_layers", "pooling_type", "decoder_start_token_id"}
FACTORS = ("logit_scale", "residual_scale", "embedding_scale", "expert_weights_scale", "expert_group_count",
           "expert_group_used_count", "interleave_moe_layer_step", "moe_every_n_layers")  # fmt: skip
OPTIONS = ("ssm.dt_b_c_rms", "attention.clamp_kqv", "attention.max_alibi_bias", "attention.q_lora_rank",
           "attention.kv_lora_rank", "attention.temperature_scale", "router_logit_softcapping",
           "leading_dense_block_count", "expert_shared_count", "n_deepstack_layers")  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth",),
    **dict.fromkeys(FACTORS, (0, 1)),
    **dict.fromkeys((*OPTIONS, *COPIED, *AGREEING), (0,)),
}
TEXTS = {"rope.scaling.type", "tensor_data_layout", "pooling_type"}
POSITIVE = {
    "block_count", "context_length", "embedding_length", "attention.head_count", "attention.head_count_kv",
    "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count", "rope.scaling.original_context_length",
}  # fmt: skip


def check_values(file: GgufFile) -> None:
    """Refuse by its key a value that no such key can have, before anything is computed from it.

    Raises:
        ModelError: for text or a truth where a number is due, a number that is negative or not finite, and 0
            where something is divided by it or has to be there.
    """
    for key, value in file.own.items():
        if key in TEXTS:
            if not isinstance(value, str):
                raise file.refusal(key, "which must be text")
            continue
        if isinstance(value, list) and key.startswith("rope.") and key != "rope.dimension_sections":
            raise file.refusal(key, "one value a layer")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, str) or not (number >= 0 and math.isfinite(number)):
                raise file.refusal(key, "which must be a number of 0 or more")
        if key in POSITIVE and not (any(value) if isinstance(value, list) else value):
            raise file.refusal(key, "which must be above 0")


def apply_keys(file: GgufFile, config: PreTrainedConfig) -> None:
    """Copy into the config what the file says and Transformers leaves out; rope.* keys are `gguf_rope`'s.

    Raises:
        ModelError: naming a key of the file's architecture that is not honoured.
    """
    own = file.own
    _apply_head_dim(file, config)
    for key, value in sorted(own.items()):
        agrees = COMPUTED[key](config, value, own) if key in COMPUTED else _apply(config, key, value)
        if not agrees and not key.startswith("rope."):
            raise file.refusal(key)


def _apply_head_dim(file: GgufFile, config: PreTrainedConfig) -> None:
    """Set the size of a head by the weights, or else by the file: a config may have its own default."""
    size, first = file.own.get("attention.key_length"), file.tensors.get("blk.0.attn_q.weight")
    if first is not None:
        size = int(first.shape[1]) // config.num_attention_heads  # GGUF has the inputs first
    if isinstance(size, int) and size != head_dim(config) and not hasattr(config, "global_head_dim"):
        config.head_dim = size


def head_dim(config: PreTrainedConfig) -> int:
    """Return the size of a query's head, by a config that may leave it to be derived."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def same(value: Any, own: Any) -> bool:
    """Return whether a file's value is the config's, but for the rounding of floats."""
    if isinstance(value, list):
        return bool(value) and all(same(each, own) for each in value)
    if isinstance(value, int | float) and isinstance(own, int | float):
        return math.isclose(value, own, rel_tol=1e-6)
    return bool(value == own) or (not value and own is None)


def _apply(config: PreTrainedConfig, key: str, value: Any) -> bool:
    """Return whether the config says the same, once the value is copied where it should be."""
    names = [name for name in (COPIED | AGREEING).get(key, ()) if hasattr(config, name)]
    if not names:
        return key in ANY_VALUE or value in NEUTRAL.get(key, ())
    name = next((name for name in names if getattr(config, name) is not None), names[0])
    if key in COPIED and not same(value, getattr(config, name)):
        setattr(config, name, value or None)
    return same(value, getattr(config, name))


Own = dict[str, Any]  # all keys of the architecture, for those that mean something together


def _kv_heads(config: PreTrainedConfig, value: Any, own: Own) -> bool:
    """One number, or one a layer with 0 for those that are convolutions."""
    names = ("num_key_value_heads", "num_kv_heads", "num_attention_heads")
    heads = next((found for name in names if (found := getattr(config, name, None)) is not None), 0)
    if isinstance(value, list) and 0 in value:
        types = getattr(config, "layer_types", None) or ["full_attention"] * len(value)
        return value == [0 if kind == "conv" else heads for kind in types]
    return same(value, heads)


def _feed_forward(config: PreTrainedConfig, value: Any, own: Own) -> bool:
    if hasattr(config, "state_size"):  # Mamba has no such layer
        return bool(value == 0)
    if hasattr(config, "n_inner"):
        config.n_inner = value
    names = [name for name in ("ffn_hidden_size", "n_inner", "intermediate_size") if hasattr(config, name)]
    return same(value, getattr(config, names[0]) if names else 4 * config.hidden_size)


def _key_length(config: PreTrainedConfig, value: Any, own: Own) -> bool:
    """The head size; in Gemma 4, that of layers with full attention."""
    return same(value, getattr(config, "global_head_dim", None) or head_dim(config))


def _scale(config: PreTrainedConfig, value: Any, own: Own) -> bool:
    divisor = getattr(config, "query_pre_attn_scalar", None) or head_dim(config)
    return value == 0 or same(value, divisor**-0.5)


def _window(config: PreTrainedConfig, value: Any, own: Own) -> bool:
    """A window goes where a config has layers with one; elsewhere it must be one that no request outgrows."""
    types = getattr(config, "layer_types", None)
    if hasattr(config, "sliding_window") and (types is None or "sliding_attention" in types):
        config.sliding_window = value or None
        return types is None or value > 0
    return value == 0 or value >= own.get("context_length", math.inf)


def _window_pattern(config: PreTrainedConfig, value: Any, own: Own) -> bool:
    """Which layers have a window: one truth a layer, or that each n-th has none."""
    windows = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()]
    if isinstance(value, list):
        return [bool(each) for each in value] == windows
    return windows == [value > 0 and (layer + 1) % value != 0 for layer in range(len(windows))]


def _inner_size(config: PreTrainedConfig, value: Any, own: Own) -> bool:
    if hasattr(config, "linear_value_head_dim"):
        return same(value, config.linear_value_head_dim * config.linear_num_value_heads)
    return same(value, config.intermediate_size)


def _gating(config: PreTrainedConfig, value: Any, own: Own) -> bool:
    """1 is a softmax over experts, 2 a sigmoid of each; 0 leaves it to the architecture."""
    return value in (0, {"sigmoid": 2}.get(getattr(config, "scoring_func", ""), 1))


COMPUTED: dict[str, Callable[[PreTrainedConfig, Any, Own], bool]] = {
    # A file counts the layers that guess ahead, a config does not.
    "block_count": lambda config, value, own: same(
        value, config.num_hidden_layers + own.get("nextn_predict_layers", 0)
    ),
    "attention.head_count_kv": _kv_heads,
    "feed_forward_length": _feed_forward,
    "attention.key_length": _key_length,
    "attention.value_length": lambda config, value, own: same(
        value, own.get("attention.key_length", head_dim(config))
    ),
    # of layers with a window
    "attention.key_length_swa": lambda config, value, own: same(value, head_dim(config)),
    "attention.value_length_swa": lambda config, value, own: same(value, head_dim(config)),
    "attention.scale": _scale,
    "attention.sliding_window": _window,
    "attention.sliding_window_pattern": _window_pattern,
    "ssm.inner_size": _inner_size,
    "expert_gating_func": _gating,
}
