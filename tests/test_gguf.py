"""GGUF files: every key and tensor is honoured, as the model that was written shows, or refused by name."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from engine import Engine, EngineConfig, SamplingParams
from engine.models import ModelError, load
from tests.gguf_writer import tiny, write_gguf
from tests.oracle import Oracle

IDS = torch.arange(3, 60)[None]
GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 256, "tie_word_embeddings": True}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


def assert_same(path: Path, made: PreTrainedModel) -> None:
    """The file gives the logits of the model that it was written from."""
    found = load(str(path)).model
    torch.testing.assert_close(found(IDS).logits, made(IDS).logits, rtol=1e-4, atol=1e-4)


# What is honoured


@pytest.mark.parametrize(
    ("kind", "changes", "keys"),
    [
        ("llama", {}, {"attention.key_length": 16, "attention.value_length": 16, "expert_count": 0}),
        ("llama", {"rms_norm_eps": 0.1}, {}),
        ("llama", {"max_position_embeddings": 77}, {"attention.sliding_window": 77}),
        ("llama", {}, {"attention.causal": True, "attention.clamp_kqv": 0.0}),
        ("llama", {}, {"tensor_data_layout": "Meta AI original pth", "rope.scaling.finetuned": True}),
        ("llama", {}, {"attention.scale": 0.25, "logit_scale": 1.0, ".somebody.quantized_by": "somebody"}),
        ("qwen2", {}, {}),
        ("qwen2", {"head_dim": 32}, {"attention.key_length": 32, "attention.value_length": 32}),
        ("qwen3", {"head_dim": 32}, {}),
        ("qwen3", {"head_dim": 32}, {"attention.key_length": None, "attention.value_length": None}),
        ("gemma2", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
         {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
        ("gemma3_text", GEMMA, {"rope.freq_base_swa": 10000.0, "attention.scale": 1 / 16}),
        ("phi3", {"sliding_window": 8}, {"attention.sliding_window": 8, "rope.dimension_count": 16}),
        ("phi3", {"partial_rotary_factor": 0.5}, {"rope.dimension_count": 8}),
        ("starcoder2", {"sliding_window": 8, "norm_epsilon": 0.1}, {"attention.sliding_window": 8}),
        ("starcoder2", {"rope_theta": 500.0}, {}),
        ("gpt2", {"n_inner": 128, "n_positions": 77}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_keys_that_transformers_drops_are_honoured(kind: str, changes: dict, keys: dict, path: Path) -> None:
    assert_same(path, write_gguf(path, tiny(kind, **changes), {**PAD, **keys}))


PAD = {".tokenizer.ggml.padding_token_id": 0}  # Phi-3's own lies beyond so small a vocabulary
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
             "rope.scaling.original_context_length": 32}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        (LINEAR, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        (LINEAR, {"rope.scaling.factor": 4.0}),
        (LINEAR, {"rope.scale_linear": 4.0}),
        (PLAIN, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
        (PLAIN, {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}),
        (YARN, YARN_KEYS),
        ({**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
         {**YARN_KEYS, "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_scaled_rope_is_taken_over(kind: str, rope: dict, keys: dict, path: Path) -> None:
    assert_same(path, write_gguf(path, tiny(kind, rope_parameters=dict(rope)), keys))


def test_gemma3s_scaling_is_that_of_its_full_attention_layers(path: Path) -> None:
    rope = {
        "full_attention": {**LINEAR, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    made = tiny("gemma3_text", **GEMMA, num_hidden_layers=6, rope_parameters=rope)
    assert_same(path, write_gguf(path, made, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}))


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


def llama3_factors(size: int) -> np.ndarray:
    """Return what the converter writes of Llama 3's scaling: a divisor of each frequency."""
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * LLAMA3["rope_theta"] ** (i / size)
        low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
        smooth = (LLAMA3["original_max_position_embeddings"] / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / LLAMA3["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def test_rope_freqs_divide_the_frequencies(path: Path) -> None:
    factors = llama3_factors(16)
    assert len(set(factors)) > 3
    made = tiny(rope_parameters=dict(LLAMA3))
    assert_same(path, write_gguf(path, made, None, {"rope_freqs.weight": factors}))
    loaded, oracle = load(str(path)), Oracle(load(str(path)))
    engine, prompts = Engine(loaded, EngineConfig()), [list(range(5, 5 + n)) for n in (3, 40, 100)]
    for output in engine.generate(prompts, SamplingParams(max_new_tokens=8, ignore_eos=True), progress=False):
        oracle.check(output, 8)
    assert engine.max_positions == 512
    assert engine.config.runner == "packed"


def test_rope_freqs_of_ones_are_plain_rope(path: Path) -> None:
    write_gguf(path, tiny(), None, {"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    assert load(str(path)).model.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_phi3s_long_and_short_factors_are_taken_over(path: Path) -> None:
    long, short = (np.linspace(1, most, 8).astype(np.float32) for most in (6, 2))
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": long.tolist(),
            "short_factor": short.tolist(), "original_max_position_embeddings": 128,
            "attention_factor": 1.25}  # fmt: skip
    made = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=128)
    keys = {"rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.25, **PAD}
    write_gguf(path, made, keys, {"rope_factors_long.weight": long, "rope_factors_short.weight": short})
    assert_same(path, made)
    found, far = load(str(path)).model, torch.arange(3, 203)[None]
    torch.testing.assert_close(found(far).logits, made(far).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layer_is_the_files_own_or_the_embedding(tied: bool, path: Path) -> None:
    made = write_gguf(path, tiny(tie_word_embeddings=tied))
    found = load(str(path)).model
    assert found.config.tie_word_embeddings is tied
    assert (found.get_input_embeddings().weight is found.get_output_embeddings().weight) is tied
    assert_same(path, made)


def test_quantized_weights_and_their_tied_output_layer_are_unpacked(path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    made = tiny(tie_word_embeddings=True)
    table = made.get_input_embeddings().weight
    packed = gguf.quantize(table.numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter
    original = writer.add_tensor

    def add(self: Any, name: str, array: np.ndarray) -> None:
        if name == "token_embd.weight":
            return original(self, name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        return original(self, name, array)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "add_tensor", add)
        write_gguf(path, made)
    found = load(str(path)).model
    unpacked = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(found.get_input_embeddings().weight, unpacked)
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight


def test_ends_of_turns_and_messages_end_an_output(path: Path) -> None:
    write_gguf(path, tiny(), {".tokenizer.ggml.eos_token_id": 5, ".tokenizer.ggml.eot_token_id": 7,
                              ".tokenizer.ggml.eom_token_id": 5})  # fmt: skip
    loaded = load(str(path))
    assert loaded.model.generation_config.eos_token_id == [5, 7]
    assert Engine(loaded).eos_ids == {5, 7}


# What is refused


@pytest.mark.parametrize(
    "keys",
    [
        {"attention.sliding_window": 8},
        {"attention.key_length": 32},
        {"attention.value_length": 32},
        {"attention.scale": 0.1},
        {"attention.causal": False},
        {"attention.clamp_kqv": 8.0},
        {"attention.max_alibi_bias": 8.0},
        {"attention.head_count_kv": [2, 1]},
        {"attention.layer_norm_rms_epsilon": 1e-6, "attention.group_norm_groups": 4},
        {"logit_scale": 0.5},
        {"residual_scale": 0.5},
        {"embedding_scale": 8.0},
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"expert_count": 8},
        {"expert_used_count": 2},
        {"rope.dimension_count": 8},
        {"rope.freq_base_swa": 500.0},
        {"rope.scaling.type": "longrope"},
        {"rope.scaling.type": "su"},
        {"rope.scaling.attn_factor": 2.0},
        {"rope.scaling.yarn_attn_factor": 1.5, **YARN_KEYS},
        {"rope.scaling.yarn_log_multiplier": 0.1, **YARN_KEYS},
        {"rope.scaling.alpha": 1000.0},
        {"attention.sliding_window": "x"},
        {"rope.freq_base": "x"},
        {"rope.freq_base": 0.0},
        {"rope.freq_base": math.nan},
        {"rope.scaling.factor": -2.0, "rope.scaling.type": "linear"},
        {"rope.scaling.factor": math.inf, "rope.scaling.type": "linear"},
        {"rope.scaling.factor": [1.0], "rope.scaling.type": "linear"},
        {"rope.scaling.original_context_length": 0, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
        {"rope.scaling.yarn_beta_fast": math.nan, **YARN_KEYS},
        {"rope.dimension_count": "x"},
        {"attention.head_count_kv": 0},
        {"context_length": 0},
        {"something.new": 1},
        {"tensor_data_layout": "another"},
        {".adapter.type": "lora"},
        {".general.type": "adapter"},
        {".split.count": 3},
        {".diffusion.shift_logits": True},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_a_key_that_is_not_honoured_is_refused_by_name(keys: dict, path: Path) -> None:
    write_gguf(path, tiny(), keys)
    with pytest.raises(ModelError) as caught:
        load(str(path))
    name = list(keys)[-1] if "layer_norm" in next(iter(keys)) else next(iter(keys))
    assert name.removeprefix(".") in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_window_is_refused_where_no_layer_has_one(path: Path) -> None:
    write_gguf(path, tiny("qwen2"), {"attention.sliding_window": 8})
    with pytest.raises(ModelError, match=r"qwen2\.attention\.sliding_window=8"):
        load(str(path))


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_q.bias", "blk.1.attn_q_norm.weight", "blk.2.attn_q.weight", "output.bias",
     "something.weight", "rope_factors_long.weight", "cls.output.weight"],
)  # fmt: skip
def test_a_tensor_without_a_parameter_is_refused_by_name(name: str, path: Path) -> None:
    write_gguf(path, tiny(), None, {name: np.ones(8, dtype=np.float32)})
    with pytest.raises(ModelError, match=name.replace(".", r"\.")) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {"rope_freqs.weight": np.zeros(8, np.float32)},
            r"rope_freqs\.weight, a tensor of numbers that must be above 0",
        ),
        (
            {"rope_freqs.weight": np.full(8, np.nan, np.float32)},
            r"rope_freqs\.weight, a tensor of numbers that must be",
        ),
        ({"rope_freqs.weight": np.full(7, 2, np.float32)}, r"rope_freqs\.weight, a tensor of 7 numbers"),
        ({"blk.0.attn_q.weight": None}, r"lacks 1 of its weights, such as model\.layers\.0\.self_attn"),
        (
            {"blk.0.ffn_up.weight": np.ones((64, 64), dtype=np.float32)},
            r"mlp\.up_proj\.weight: \[64, 64\] for \[128, 64\]",
        ),
    ],
)
def test_tensors_of_other_sizes_or_missing(tensors: dict, said: str, path: Path) -> None:
    write_gguf(path, tiny(), None, tensors)
    with pytest.raises(ModelError, match=said) as caught:
        load(str(path))
    assert str(path) in str(caught.value)


def test_rope_freqs_do_not_go_with_another_scaling(path: Path) -> None:
    write_gguf(path, tiny(), YARN_KEYS, {"rope_freqs.weight": llama3_factors(16)})
    with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
        load(str(path))


# Files as such


def test_a_file_gives_the_weights_that_were_written(path: Path) -> None:
    made = write_gguf(path, tiny())
    found = load(str(path))
    assert found.tokenizer is None
    assert len(found.revision) == 64
    for name, weight in made.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], weight), name
    assert load(str(path), dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_file_cut_anywhere_is_one_line(path: Path, tmp_path: Path) -> None:
    write_gguf(path, tiny())
    data, cut = path.read_bytes(), tmp_path / "cut.gguf"
    for size in (0, 3, 4, 10, 24, 200, 1000, len(data) // 2, len(data) - 40):
        cut.write_bytes(data[:size])
        with pytest.raises(ModelError, match=r"is cut short or not a GGUF file"):
            load(str(cut))
    cut.write_bytes(b"PK\3\4" + bytes(5000))
    with pytest.raises(ModelError, match=r"is cut short or not a GGUF file"):
        load(str(cut))


def test_without_the_packages_the_way_to_them_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"GGUF")
    for package in ("gguf", "accelerate"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            with pytest.raises(ModelError, match=rf"needs {package}: pip install 'dynamic-batch\[gguf\]'"):
                load(str(path))
