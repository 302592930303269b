"""GGUF files of tiny models as llama.cpp's converter writes them: names, layout of weights, keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3_text": "gemma3",
         "phi3": "phi3", "gpt2": "gpt2", "starcoder2": "starcoder2"}  # fmt: skip
SHAPE = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip


def tiny(model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    """A model of random weights, seeded; `changes` to its config."""
    torch.manual_seed(0)
    shape = {**SHAPE, **changes}
    if model_type == "gpt2":
        del shape["num_key_value_heads"]
    config = AutoConfig.for_model(model_type, **shape)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def keys_of(model: PreTrainedModel) -> dict[str, Any]:
    """The keys of its architecture that a converter always writes, without their first part."""
    config: Any = model.config
    heads, kind = config.num_attention_heads, config.model_type
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "n_inner", None) or getattr(config, "intermediate_size", 256),
        "attention.head_count": heads,
        "vocab_size": config.vocab_size,
    }
    if kind != "gpt2":
        keys |= {"attention.head_count_kv": config.num_key_value_heads}
        rope = config.rope_parameters
        keys["rope.freq_base"] = float(rope.get("full_attention", rope)["rope_theta"])
    if hasattr(config, "rms_norm_eps"):
        keys["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    else:
        names = ("norm_epsilon", "layer_norm_epsilon")
        found = [getattr(config, name) for name in names if hasattr(config, name)]
        keys["attention.layer_norm_epsilon"] = found[0]
    if kind == "llama":
        keys["rope.dimension_count"] = getattr(config, "head_dim", None) or config.hidden_size // heads
    if kind in ("qwen3", "gemma2", "gemma3_text"):
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if kind.startswith("gemma"):
        keys["attention.sliding_window"] = config.sliding_window
    return keys


def tensors_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Its weights by GGUF's names, in GGUF's layout."""
    gguf = pytest.importorskip("gguf")
    config: Any = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == TYPES[config.model_type])
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {}
    for long, weight in model.state_dict().items():
        if long == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, leaf = long.rpartition(".")
        short, array = names.get_name(stem), weight.float().numpy()
        assert short, long
        heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", 0)}
        count = heads.get(short.rpartition(".")[2])
        if count and TYPES[config.model_type] == "llama":  # the halves of a rotary pair lie side by side
            array = array.reshape(count, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if config.model_type.startswith("gemma") and short.endswith("norm"):
            array = array + 1
        if config.model_type == "gpt2" and leaf == "weight" and array.ndim == 2 and short.startswith("blk"):
            array = array.T
        found[f"{short}.{leaf}"] = np.ascontiguousarray(array)
    return found


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> PreTrainedModel:
    """Write `model` with `keys` and `tensors` changed or added; None leaves one out. Gives the model.

    A key that begins with "." has no architecture before it.
    """
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    path.unlink(missing_ok=True)
    arch = TYPES[model.config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**keys_of(model), **(keys or {})}.items():
        if value is not None:
            add_key(writer, key.removeprefix(".") if key.startswith(".") else f"{arch}.{key}", value)
    for name, array in {**tensors_of(model), **(tensors or {})}.items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add_key(writer: Any, key: str, value: Any) -> None:
    """Add a key of the type that its value has."""
    kinds = {bool: writer.add_bool, int: writer.add_int32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)
