"""Specs: what each gives, and what a broken file or name is answered with.

Everything runs on tiny models made here; only `smollm2` is fetched and converted, once, into the real cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM

from engine.errors import InputError
from engine.machine import cache_dir
from engine.models import (
    PRESETS,
    LoadedModel,
    ModelError,
    catalogue,
    kv_bytes_per_token,
    load,
    smollm2 as wheel_model,
)

TINY = [name for name in PRESETS if name.startswith("tiny-")]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose seconds to them where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    return load("smollm2")


# Random weights


@pytest.mark.parametrize("name", TINY)
def test_same_seed_same_weights_and_the_callers_random_state_is_untouched(name: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (load(f"random:{name}", seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(first.model.state_dict().items(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    assert not torch.equal(*(made.model.state_dict()["lm_head.weight"] for made in (first, other)))
    assert first.revision == "random-seed-7"
    assert first.tokenizer is None
    assert not first.model.training
    assert not any(p.requires_grad for p in first.model.parameters())


@pytest.mark.parametrize("name", TINY)
def test_built_by_way_of_meta_nothing_is_left_uninitialised(name: str) -> None:
    """Buffers (rotary frequencies, embedding scales) and the spread of weights are a plain construction's."""
    ours = load(f"random:{name}").model
    plain = AutoModelForCausalLM.from_config(PRESETS[name].config(), dtype=torch.float32)
    buffers = dict(plain.named_buffers())
    assert dict(ours.named_buffers()).keys() == buffers.keys()
    assert all(torch.equal(value, buffers[key]) for key, value in ours.named_buffers())
    assert plain.state_dict().keys() == ours.state_dict().keys()
    for key, value in plain.state_dict().items():
        spread = ours.state_dict()[key].std().item()
        assert spread == pytest.approx(value.std().item(), rel=0.1, abs=1e-6), key
    tied = ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert tied == PRESETS[name].config().tie_word_embeddings


@pytest.mark.parametrize("name", TINY)
def test_greedy_output_varies_within_a_prompt_and_between_prompts(name: str) -> None:
    """A model that repeats one token, or ignores its context, would let a wrong mask or position pass."""
    model: Any = load(f"random:{name}").model
    prompts = torch.randint(3, 256, (4, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        drawn = model.generate(prompts, max_new_tokens=24, min_new_tokens=24, do_sample=False)[:, 40:]
        nudged = prompts.clone()
        nudged[:, 30] = (nudged[:, 30] + 1) % 256
        moved = (model(prompts).logits[:, -1] - model(nudged).logits[:, -1]).abs().max(-1).values
        top = model(prompts).logits.topk(2).values
    assert all(len(set(row.tolist())) >= 12 for row in drawn)
    assert len(set(drawn[:, 0].tolist())) >= 3
    assert (moved > 0.01).all()
    assert ((top[..., 0] - top[..., 1]).median() > 0.2).item()
    assert model.generation_config.eos_token_id == 2
    assert model.config.max_position_embeddings >= 2048


def test_tiny_gemma3_mixes_window_and_full_layers_with_one_kv_head() -> None:
    config = PRESETS["tiny-gemma3"].config()
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert (config.sliding_window, config.num_key_value_heads, config.query_pre_attn_scalar) == (8, 1, 24)


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, "float64", torch.float64])
def test_random_weights_are_drawn_in_the_dtype_asked_for(dtype: torch.dtype | str) -> None:
    model = load("random:tiny-llama", dtype=dtype).model
    assert str(model.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_config_is_never_shared_between_models() -> None:
    load("random:tiny-gemma3").model.config.layer_types[2] = "sliding_attention"
    assert PRESETS["tiny-gemma3"].config().layer_types[2] == "full_attention"


# The catalogue


def test_catalogue_has_the_published_parameter_counts_and_needs_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path / "cache"))
    rows = {row["spec"]: row for row in catalogue()}
    assert list(rows) == ["smollm2", *(f"random:{name}" for name in PRESETS)]
    published = {"smollm2": 134_515_008, "random:qwen2.5-0.5b": 494_032_768,
                 "random:qwen2-1.5b": 1_543_714_304, "random:llama-7b": 6_738_415_616,
                 "random:mistral-7b": 7_241_732_096}  # fmt: skip
    assert {spec: rows[spec]["parameters"] for spec in published} == published
    qwen = rows["random:qwen2.5-0.5b"]
    assert (qwen["kv_bytes_per_token_16bit"], qwen["bytes_16bit"]) == (12 * 1024, 988_065_536)
    assert qwen["kv_bytes_per_token_32bit"] == 24 * 1024
    assert qwen["positions"] == 32768
    assert rows["random:mistral-7b"]["kv_bytes_per_token_16bit"] == 128 * 1024
    assert all(row["architecture"].endswith("ForCausalLM") for row in rows.values())
    assert not (tmp_path / "cache").exists()


def test_kv_bytes_of_a_model_whose_config_has_neither_kv_heads_nor_head_size() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2"))
    assert kv_bytes_per_token(model, 2) == 2 * 12 * 768 * 2


# Specs that give nothing


@pytest.mark.parametrize(
    ("spec", "said"),
    [("foo", "smollm2"), ("random:foo", "random:"), ("random:qwen2.5", "qwen2.5-0.5b"), ("", "smollm2"),
     ("smolm2", "smollm2"), ("./no", "no folder"), ("no/x.gguf", "no folder"), ("/a/b/c", "no folder")],
)  # fmt: skip
def test_unknown_specs_are_named_and_answered_with_what_is_near(spec: str, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(spec)
    assert isinstance(caught.value, InputError)
    assert repr(spec) in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_dtype_and_device() -> None:
    with pytest.raises(ModelError, match=r"float64, float32, bfloat16, float16"):
        load("random:tiny-llama", dtype="int8")
    with pytest.raises(ModelError, match=r"float64, float32"):
        load("random:tiny-llama", dtype=torch.int32)
    with pytest.raises(ModelError, match=r"did not load"):
        load("random:tiny-llama", device="toaster")
    with pytest.raises(ModelError, match=r"did not load"):
        load("random:tiny-llama", device="cuda:99")


# Folders


def test_a_folder_gives_the_same_logits_and_no_tokenizer(tmp_path: Path) -> None:
    made = load("random:tiny-qwen2", seed=3).model
    made.save_pretrained(tmp_path)
    found = load(str(tmp_path))
    tokens = torch.arange(3, 40)[None]
    assert torch.equal(found.model(tokens).logits, made(tokens).logits)
    assert found.tokenizer is None
    assert found.revision == "local"
    assert load(str(tmp_path), dtype="float16").model.dtype == torch.float16


def test_a_cut_or_incomplete_folder_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    load("random:tiny-llama").model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file({key: value.clone() for key, value in weights.items()}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, such as model\.layers\.1\.mlp\.up_proj"):
        load(str(tmp_path))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"did not load"):
        load(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"did not load"):
        load(str(tmp_path))


def test_what_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    shape: dict[str, Any] = dict(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16
    )
    BertForMaskedLM(BertConfig(**shape)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match=r"not a causal LM but BertForMaskedLM"):
        load(str(tmp_path / "bert"))
    AutoConfig.for_model("t5", architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"did not load"):
        load(str(tmp_path / "t5"))


def edit(folder: Path, config: dict[str, Any] | None = None, weights: dict[str, Any] | None = None) -> str:
    """A folder with a tiny Llama, its config and its weights changed or added to."""
    from safetensors.torch import load_file, save_file

    load("random:tiny-llama").model.save_pretrained(folder)
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stated, **(config or {})}))
    file = folder / "model.safetensors"
    tensors = {**{key: value.clone() for key, value in load_file(file).items()}, **(weights or {})}
    save_file(tensors, file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.down_proj.bias", "v_head.summary.weight",
     "model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_norm.weight"],
)  # fmt: skip
def test_weights_that_the_config_has_no_place_for_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has 1 weights that LlamaForCausalLM has no place for") as caught:
        load(edit(tmp_path, weights={name: torch.ones(64)}))
    assert f"such as {name}:" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_buffers_that_older_versions_saved_are_none_of_them(tmp_path: Path) -> None:
    masks = {"self_attn.rotary_emb.inv_freq": torch.ones(8), "self_attn.bias": torch.ones(1, 1, 8, 8),
             "self_attn.masked_bias": torch.tensor(-1e4)}  # fmt: skip
    kept = {f"model.layers.0.{name}": tensor for name, tensor in masks.items()}
    found = load(edit(tmp_path, weights={**kept, "model.rotary_emb.inv_freq": torch.ones(8)})).model
    ids = torch.arange(3, 40)[None]
    assert torch.equal(found(ids).logits, load("random:tiny-llama").model(ids).logits)


@pytest.mark.parametrize(
    ("config", "said"),
    [({"vocab_size": 300}, r"has 2 weights of other sizes .*lm_head\.weight: \[256, 64\] for \[300, 64\]"),
     ({"vocab_size": 200}, r"has 2 weights of other sizes .*lm_head\.weight: \[256, 64\] for \[200, 64\]"),
     ({"intermediate_size": 64}, r"has 9 weights .*mlp\.down_proj\.weight: \[64, 128\] for \[64, 64\]")],
)  # fmt: skip
def test_weights_of_other_sizes_are_named(config: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        load(edit(tmp_path, config))


@pytest.mark.parametrize("with_model", [True, False])
def test_an_adapter_is_refused_whether_or_not_peft_is_here(with_model: bool, tmp_path: Path) -> None:
    if with_model:
        edit(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
    with pytest.raises(
        ModelError, match=r"has an adapter_config\.json: merge the adapter .*merge_and_unload"
    ) as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stated", "named"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "awq", "bits": 4}, "awq"),
     ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
     ({"quant_method": "fp8"}, "fp8"), ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
     ({"quant_method": "new"}, "new"),
     ({"load_in_8bit": True}, "a method not named")],
)  # fmt: skip
def test_quantized_weights_are_refused_by_method(stated: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"quantized by {named} \(quantization_config") as caught:
        load(edit(tmp_path, {"quantization_config": stated}))
    assert "\n" not in str(caught.value)


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {
        "AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}))  # fmt: skip
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError):
        load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_smollm2_answers_and_keeps_its_template(smollm2: LoadedModel) -> None:
    assert smollm2.revision == wheel_model.SMOLLM2_SHA256
    assert smollm2.tokenizer is not None
    model, tokenizer = smollm2.model, smollm2.tokenizer  # type: Any, Any
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    drawn = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(drawn)
    assert drawn[-1] == model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DYNAMIC_BATCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_dir() == Path.home() / ".cache" / "dynamic-batch"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/dynamic-batch")
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", "~/mine")
    assert cache_dir() == Path.home() / "mine"


def test_importing_this_room_imports_no_heavy_library() -> None:
    code = "import sys, engine.models; print({'torch', 'transformers', 'pandas', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(wheel_model.__file__).parents[2])  # fmt: skip
    assert done.stdout == "set()\n"
