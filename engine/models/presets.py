"""The named architectures: published shapes, and tiny ones for tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.models.geometry import kv_bytes_per_token

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Preset:
    """An architecture without weights: Transformers' name for it, its sizes and what else is special."""

    model_type: str
    sizes: tuple[int, ...]  # vocabulary, hidden, MLP, layers, query heads, KV heads, positions
    rest: dict[str, Any]

    def config(self) -> PreTrainedConfig:
        """Return a fresh Transformers config: building a model writes into it, so it is never shared."""
        from transformers import AutoConfig

        names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
        names += " num_key_value_heads max_position_embeddings bos_token_id eos_token_id pad_token_id"
        shape = dict(zip(names.split(), (*self.sizes, 1, 2, 0), strict=True), tie_word_embeddings=False)
        return AutoConfig.for_model(self.model_type, **{**shape, **copy.deepcopy(self.rest)})


# The large ones have their published shapes, so that speed and memory are the real model's. The tiny ones
# are drawn wide, or greedy decoding would repeat one token whatever the prompt, and bugs would hide in it.
_TIED, _WIDE, _EPS = {"tie_word_embeddings": True}, {"initializer_range": 0.3}, {"rms_norm_eps": 1e-5}
_QWEN = {"rope_theta": 1e6, "bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643, **_TIED}
_SMOL = {"rope_theta": 1e5, "pad_token_id": 2, **_EPS, **_TIED}
_MISTRAL, _TINY = {"sliding_window": 4096, **_EPS}, (256, 64, 128, 3, 4, 2, 4096)
_SSFS = [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")]
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "layer_types": _SSFS, **_WIDE}
PRESETS: dict[str, Preset] = {
    "smollm2-135m": Preset("llama", (49152, 576, 1536, 30, 9, 3, 8192), _SMOL),  # SmolLM2-135M
    "qwen2.5-0.5b": Preset("qwen2", (151936, 896, 4864, 24, 14, 2, 32768), _QWEN),  # Qwen2.5-0.5B
    "qwen2-1.5b": Preset("qwen2", (151936, 1536, 8960, 28, 12, 2, 32768), _QWEN),  # Qwen2-1.5B
    "llama-7b": Preset("llama", (32000, 4096, 11008, 32, 32, 32, 4096), _EPS),  # Llama-2-7B
    "mistral-7b": Preset("mistral", (32000, 4096, 14336, 32, 32, 8, 32768), _MISTRAL),  # Mistral-7B-v0.1
    "tiny-qwen2": Preset("qwen2", _TINY, _WIDE | _TIED),  # tied embeddings
    "tiny-qwen3": Preset("qwen3", _TINY, {"head_dim": 32, **_WIDE}),  # QK norm, wide heads
    "tiny-llama": Preset("llama", _TINY, _WIDE),  # the plainest
    "tiny-mistral": Preset("mistral", _TINY, {"sliding_window": 16, **_WIDE}),  # sliding window 16
    "tiny-gemma3": Preset("gemma3_text", (256, 64, 128, 4, 4, 1, 4096), _GEMMA),  # window 8 in 3 layers of 4
}
SPECS = {"smollm2": PRESETS["smollm2-135m"], **{f"random:{name}": row for name, row in PRESETS.items()}}


def catalogue() -> list[dict]:
    """Return a row for each named spec, counted on the meta device: nothing is allocated or fetched."""
    import torch
    from transformers import AutoModelForCausalLM

    rows: list[dict] = []
    for spec, preset in SPECS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(preset.config())
        parameters = model.num_parameters()
        row = {"spec": spec, "architecture": type(model).__name__, "parameters": parameters}
        row |= {f"bytes_{bits}bit": parameters * bits // 8 for bits in (32, 16)}
        row |= {f"kv_bytes_per_token_{bits}bit": kv_bytes_per_token(model, bits // 8) for bits in (32, 16)}
        rows.append({**row, "positions": preset.sizes[-1]})
    return rows
