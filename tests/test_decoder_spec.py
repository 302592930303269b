"""What is read of a model's parts, and why it is not where it is not."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from engine import LoadedModel
from engine.backends.cpu import can_compile
from engine.backends.cpu.model import CompiledDecoder
from engine.backends.cuda import can_run
from engine.backends.transformers.backend import TransformersBackend
from engine.models.attention_trace import attention_layers
from engine.models.decoder_parts import OtherPartError, activation
from engine.models.decoder_spec import describe
from tests.oracle import Oracle
from tests.test_families import COMPILED, FULL, SIZES, SLIDING, check, made, oracle, spec_of


def test_a_layer_rotates_as_its_key_was_rotated():
    ropes = [layer.rope for layer in spec_of(oracle("gemma3").model).layers]
    assert [rope and rope.arguments for rope in ropes] == [(SLIDING,), (FULL,)] * 2
    no_rope = [layer.rope is None for layer in spec_of(oracle("smollm3").model).layers]
    assert no_rope == [False, False, False, True]
    no_rope = [layer.rope is None for layer in spec_of(oracle("cohere2").model).layers]
    assert no_rope == [False, True] * 2
    at_T = torch.arange(3)
    for name, interleaved, pairs in (
        ("glm4", True, 4),
        ("phi3, MQA, partial", False, 12),
        ("cohere", True, 8),
    ):
        rope = spec_of(oracle(name).model).layers[0].rope
        assert rope is not None
        assert (rope.interleaved, rope.angles(at_T).shape) == (interleaved, (2, 3, pairs))


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("llama", [True, False, True, False]),
        ("gemma2", [True] * 4),
        ("glm4", [True] * 4),
        ("olmo2", [False, True, False, True]),
        ("cohere", [True, False, True, False]),
    ],
)
def test_norms_have_their_roles(name, roles):
    model = oracle(name).model
    spec = spec_of(model)
    layer = spec.layers[0]
    norms = [layer.before_attention, layer.after_attention, layer.before_mlp, layer.after_mlp]
    assert [norm is not None for norm in norms] == roles
    assert spec.parallel == (name == "cohere")
    assert spec.norm.centred == (name == "cohere")
    plus = 1 if name == "gemma2" else 0
    assert torch.equal(spec.norm.scale, model.base_model.norm.weight + plus)


def test_multipliers_are_read():
    spec = spec_of(oracle("granite").model)
    assert (spec.embedding_scale, spec.residual_scale, spec.logits_scale) == (3.0, 0.5, 0.25)
    assert spec.layers[0].options.scale == 0.1
    assert spec_of(oracle("gemma2").model).embedding_scale == pytest.approx(8.0, rel=1e-7)
    assert spec_of(oracle("gemma2").model).logits_softcap == 5.0
    assert spec_of(oracle("cohere").model).logits_scale == 0.0625


def test_activations_are_known_by_their_results():
    """The exact GELU and its approximation by tanh differ by a few ten-thousandths at most."""
    names = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    for name, expected in names.items():
        assert activation(ACT2FN[name]) == expected
    for name in ("gelu", "relu", "quick_gelu", "mish", "tanh"):
        with pytest.raises(OtherPartError):
            activation(ACT2FN[name])


def test_a_fused_weight_is_not_copied():
    model = oracle("phi3").model
    layer, weight = spec_of(model).layers[1], model.base_model.layers[1].self_attn.qkv_proj.weight
    parts = [layer.q.weight_NM, layer.k.weight_NM, layer.v.weight_NM]
    assert [len(part) for part in parts] == [64, 32, 32]
    assert all(part.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() for part in parts)


def test_parts_are_known_by_what_they_do():
    """Llama with LayerNorms and biases in place of its norms: no family is built so."""
    model = made("llama", SIZES)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if "norm" in name:
                    norm = nn.LayerNorm(child.weight.shape, eps=1e-3)
                    nn.init.normal_(norm.weight, 1.0, 0.3)
                    nn.init.normal_(norm.bias, 0.0, 0.3)
                    setattr(module, name, norm.requires_grad_(False))
    engine = check(Oracle(LoadedModel("llama with LayerNorms", model, None, "random")), max_step_tokens=16)
    assert isinstance(engine.runner.backend, CompiledDecoder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("big", [5.0, 60.0, 400.0])
def test_one_large_channel_hides_nothing_in_16_bits(dtype, big):
    """Neither 1 + weight, where one weight is large, nor a rotation, where the slowest pair's keys are."""
    gemma = made("gemma3_text", COMPILED["gemma3"][1])
    gemma.base_model.norm.weight[3] = big
    for layer in gemma.base_model.layers:
        layer.self_attn.k_norm.weight[[7, 15]] = min(big, 60.0)
    spec, exact = spec_of(gemma.to(dtype)), gemma.base_model.norm.weight
    assert torch.equal(spec.norm.scale, 1 + exact.float())
    qwen = made("qwen2", SIZES | dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)))
    for layer in qwen.base_model.layers:
        layer.self_attn.k_proj.bias.view(2, 16)[:, [7, 15]] = big
    ropes = [layer.rope for layer in spec_of(qwen.to(dtype)).layers]
    assert all(rope is not None and not rope.interleaved for rope in ropes)


def test_why_a_model_is_not_compiled_is_said(caplog):
    reasons = {
        "ministral3, temperature": "positions that do more than rotate",
        "heads of 24": None,
        "no gates": "no gate_proj, no up_proj",
        "norms without weights": "OlmoLayerNorm in place of a norm with a weight and an epsilon",
        "learned positions": "other parts than a decoder's: embed_tokens, h, ",
        "experts and sinks": "attention sinks",
        "MLA, complex angles": "a RoPE module that gives no cosines and sines",
        "MLA": "no k_proj, no q_proj, no v_proj",
    }
    for name, reason in reasons.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, "engine.models.decoder_spec"):
            found = describe(oracle(name).model, attention_layers(oracle(name).model))
        if reason is None:
            assert found is not None
            assert not can_compile(found)
        else:
            assert found is None
            assert f"is no decoder that is known here: it has {reason}" in caplog.text


@pytest.mark.parametrize("where", ["last", "first"])
def test_norms_of_two_kinds_are_not_compiled(where):
    """Where some norms of the residual stream take its mean away, it must not be taken away for all."""
    model = made("llama", SIZES)
    if where == "first":
        model.base_model.layers[0].input_layernorm = nn.LayerNorm(64)
    else:
        model.base_model.norm = nn.LayerNorm(64)
    spec = describe(model, attention_layers(model))
    assert spec is None or not can_compile(spec)
    engine = check(Oracle(LoadedModel("norms of two kinds", model, None, "random")), max_step_tokens=16)
    assert isinstance(engine.runner.backend, TransformersBackend)


def test_a_padding_token_does_not_hide_what_positions_do():
    """Its embedding is zero, and so are all its keys: of one length, whatever a position does to them."""
    model = oracle("ministral3, temperature").model
    assert not model.get_input_embeddings().weight[0].any()
    layers = attention_layers(model)
    assert not any(layer.only_rotates for layer in layers)
    assert all(layer.key_TD.any() for layer in layers)


def test_a_model_whose_angles_cannot_all_be_kept_does_not_run_on_a_gpu():
    """A graph may not call the model's own module for them."""
    spec = spec_of(oracle("llama").model)
    assert can_run(replace(spec, positions=2**20))
    assert not can_run(replace(spec, positions=2**20 + 1))
