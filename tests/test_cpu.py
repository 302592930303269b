"""The compiled step of models built like Llama: what the model gives, to the bit in any company, by any
threads."""

from __future__ import annotations

import logging
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from numba import njit
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from engine import Engine, EngineConfig, SamplingParams
from engine.backends.cpu import can_compile, gemm, simd, vector_math
from engine.backends.cpu.attention import QUERIES
from engine.backends.cpu.model import CompiledDecoder
from engine.backends.cpu.vector_math import address
from engine.backends.cpu.x_rows import BLOCK_DEPTH, BLOCK_ROWS
from engine.backends.transformers.backend import TransformersBackend
from engine.models import LoadedModel, load
from engine.models.attention_trace import attention_layers
from engine.models.decoder_spec import describe
from engine.step import Batch, Span
from tests.oracle import Oracle
from tests.pairwise import grid
from tests.serving import runner_of

COMPILED = ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral")


@njit
def wide(x_RM, w_MW, out_RW, scales_R, scaled, add):
    rows, size = x_RM.shape
    gemm.multiply_wide(
        rows, w_MW.dtype, address(x_RM), 4 * size, address(w_MW), 4 * w_MW.shape[1], size, address(out_RW),
        4 * out_RW.shape[1], address(scales_R) if scaled else 0, 0, 0, add, address(w_MW), address(w_MW),
    )  # fmt: skip


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("add", [0, 1])
def test_tiles_multiply_and_a_row_knows_no_neighbours(add, scaled):
    rng, width = np.random.default_rng(0), gemm.WIDE
    w, scales = rng.normal(size=(38, width)).astype(np.float32), rng.normal(size=20).astype(np.float32)
    x, before = (rng.normal(size=(20, count)).astype(np.float32) for count in (38, width))
    expected = x.astype(float) @ w * (scales[:, None] if scaled else 1) + before * add
    alone = before.copy()
    for r in range(20):
        wide(x[r : r + 1], w, alone[r : r + 1], scales[r : r + 1], scaled, add)
    np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-5)
    for rows in range(20):
        out = before.copy()
        wide(x[:rows], w, out[:rows], scales[:rows], scaled, add)
        assert np.array_equal(out[:rows], alone[:rows])
        assert np.array_equal(out[rows:], before[rows:]), "nothing beyond is touched"


@njit
def powers(x_N, narrow_N):
    """Return the sums of e^x of numbers that become that, in float32 and in bfloat16."""
    end = 4 * len(x_N)
    both = vector_math.exp_minus_max_sum_narrow(address(narrow_N), address(narrow_N) + end, np.float32(1.0))
    return vector_math.exp_minus_max_sum(address(x_N), address(x_N) + end, np.float32(1.0)), both


@pytest.mark.parametrize("size", [16, 48, 128])
def test_powers_in_bfloat16_are_those_in_float32_rounded_and_their_sum_is_not(size):
    x = np.random.default_rng(size).normal(scale=9, size=size).astype(np.float32)
    x[[0, 5]] = -np.inf, 1.0
    narrow = x.copy()
    found, narrow_found = powers(x, narrow)
    assert found == narrow_found
    rounded = torch.from_numpy(x).bfloat16()
    assert torch.equal(torch.from_numpy(narrow).view(torch.bfloat16)[:size], rounded)


@njit
def of_vectors(x_N, out_N, up_N):
    vector_math.exp_minus_max_sum(address(x_N), address(x_N) + 4 * len(x_N), np.float32(0.0))
    for n in range(0, len(out_N), simd.LANES):
        vector_math.silu(address(out_N) + 4 * n, address(up_N) + 4 * n)


@njit
def gelu(x_N, up_N):
    for n in range(0, len(x_N), simd.LANES):
        vector_math.gelu(address(x_N) + 4 * n, address(up_N) + 4 * n)


def test_functions_of_vectors_are_right_to_the_last_places():
    x = np.concatenate([np.linspace(-87, 88, 4000), np.linspace(-1, 1, 96)]).astype(np.float32)
    up = np.random.default_rng(0).normal(size=len(x)).astype(np.float32)
    power, gated = x.copy(), x.copy()
    of_vectors(power, gated, up)
    np.testing.assert_allclose(power, np.exp(x.astype(float)), rtol=3e-7)
    exact = torch.from_numpy(x).double()
    torch.testing.assert_close(
        torch.from_numpy(gated).double(),
        nn.functional.silu(exact) * torch.from_numpy(up),
        rtol=1e-6,
        atol=1e-30,
    )
    gated = x.copy()
    gelu(gated, up)
    expected = nn.functional.gelu(exact, approximate="tanh") * torch.from_numpy(up)
    torch.testing.assert_close(torch.from_numpy(gated).double(), expected, rtol=1e-5, atol=1e-6)
    beyond = np.array([-np.inf, -1e30, 1e30, np.inf] * 4, np.float32)
    of_vectors(beyond, gated[:0], up[:0])
    assert (beyond[:2] < 1e-37).all()
    assert (beyond[2:4] > 1e37).all()
    numbers = np.array([np.nan, *range(15)], np.float32)
    of_vectors(numbers, gated[:0], up[:0])
    assert np.isnan(numbers).tolist() == [True] + [False] * 15


@njit
def inverse_rms(x_N, size):
    return vector_math.inverse_rms(address(x_N), size, 1e-5)


@pytest.mark.parametrize("size", [1, 15, 16, 90])
def test_a_norm_is_of_whole_vectors_and_of_what_is_left(size):
    x_N = np.random.default_rng(0).normal(size=100).astype(np.float32)
    for begin in (0, 7):
        exact = (x_N[begin : begin + size].astype(float) ** 2).mean() + 1e-5
        assert inverse_rms(x_N[begin:], size) == pytest.approx(exact**-0.5, rel=1e-6)


def compiled_decoder(model, page: int = 16, pages: int = 200) -> CompiledDecoder:
    spec = describe(model, attention_layers(model))
    assert spec is not None
    assert can_compile(spec)
    found = CompiledDecoder(spec, page)
    found.allocate_kv(pages)
    return found


def random_model(seed: int = 0, **changes) -> torch.nn.Module:
    """A model built like Llama in a shape of its own."""
    sizes = dict(
        vocab_size=259, hidden_size=96, intermediate_size=136, num_hidden_layers=2, num_attention_heads=6
    )
    sizes |= dict(num_key_value_heads=2, head_dim=32, initializer_range=0.3)
    config = AutoConfig.for_model(changes.pop("kind", "llama"), **(sizes | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():  # made as ones and zeros, which hide much
            if "norm" in name or "bias" in name:
                parameter.normal_(1.0, 0.3)
    return model


SHAPES = {
    "plain": {},
    "biases": dict(attention_bias=True, mlp_bias=True),
    "gelu": dict(hidden_act="gelu_pytorch_tanh"),
    "qwen2": dict(kind="qwen2"),
    "qwen3": dict(kind="qwen3"),
    "window": dict(kind="mistral", sliding_window=9),
    "gemma2": dict(kind="gemma2", sliding_window=9, attn_logit_softcapping=3.0, final_logit_softcapping=5.0),
    "olmo2": dict(kind="olmo2"),
    "cohere": dict(kind="cohere", use_qk_norm=True),
    "glm4": dict(kind="glm4", pad_token_id=0),
    "alone": dict(num_attention_heads=1, num_key_value_heads=1),
    "group": dict(hidden_size=98, num_attention_heads=QUERIES + 1, num_key_value_heads=1, head_dim=16),
    "deep": dict(hidden_size=BLOCK_DEPTH + 36, intermediate_size=2 * BLOCK_DEPTH + 6),
}


@pytest.mark.parametrize(("shape", "page"), grid(list(SHAPES), [16, 5, 40]))
def test_any_model_built_like_llama_gives_its_own_logits(shape, page):
    """In chunks that share steps with others, whose sizes fill no block, and one by one."""
    model = random_model(**SHAPES[shape])
    packed, rng = compiled_decoder(model, page), np.random.default_rng(0)
    texts = [rng.integers(0, 259, size).tolist() for size in (BLOCK_ROWS + 37, 1, 30)]
    with torch.inference_mode():
        expected = [model(torch.tensor([text])).logits[0] for text in texts]
        pages = -(-len(texts[0]) // page)
        tables = [list(range(row * pages, (row + 1) * pages)) for row in range(3)]
        for cuts in (
            ([0, 101], [0, 1], [0, 30]),
            ([0, 7, 70, 100, 101], [0, 0, 1, 1, 1], [0, 13, 14, 14, 30]),
        ):
            for begins, ends in zip(
                list(zip(*cuts, strict=True))[:-1], list(zip(*cuts, strict=True))[1:], strict=True
            ):
                tokens, spans, at = [], [], []
                for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
                    if begin < end:
                        spans.append(Span(len(tokens), len(tokens) + end - begin, begin, tables[row]))
                        tokens += texts[row][begin:end]
                        at += [(row, i) for i in range(begin, end)]
                found = packed.logits(Batch(tokens, spans, list(range(len(tokens)))))
                close = torch.stack([expected[row][i] for row, i in at])
                torch.testing.assert_close(found, close, rtol=1e-3, atol=1e-4 * float(close.abs().max()))


@given(
    texts=st.lists(st.tuples(st.integers(1, 90), st.sampled_from([1, 1, 3, 90])), min_size=1, max_size=9),
    cut=st.integers(1, 100),
    threads=st.sampled_from([1, 2, 3]),
    page=st.sampled_from([8, 5]),
    name=st.sampled_from(["plain", "window", "qwen3", "gemma2", "olmo2", "cohere"]),
)
def test_the_bits_are_the_same_in_any_company(texts, cut, threads, page, name):
    """All prompts in two steps, the last tokens of each together, by several threads; and each alone by one
    thread, in chunks of some size."""
    packed, count = compiled_decoder(random_model(**SHAPES[name]), page), len(texts)
    prompts = [[(31 * i + 7 * k) % 259 for k in range(length)] for i, (length, _) in enumerate(texts)]
    tables = [list(range(20 * i, 20 * i + 20)) for i in range(count)]
    firsts = [max(length - last, 0) for length, last in texts]

    def step(begins: list[int], ends: list[int]) -> torch.Tensor:
        spans, tokens, wanted = [], [], []
        for prompt, table, begin, end in zip(prompts, tables, begins, ends, strict=True):
            if begin < end:
                spans.append(Span(len(tokens), len(tokens) + end - begin, begin, table))
                tokens += prompt[begin:end]
                wanted.append(len(tokens) - 1)
        return packed.logits(Batch(tokens, spans, wanted))

    packed.use(threads)
    if any(firsts):
        step([0] * count, firsts)
    together = step(firsts, [length for length, _ in texts])
    packed.use(1)
    packed.allocate_kv(200)
    for i, prompt in enumerate(prompts):
        for begin in range(0, len(prompt), cut):
            part = prompt[begin : begin + cut]
            alone = packed.logits(Batch(part, [Span(0, len(part), begin, tables[i])], [len(part) - 1]))
        assert torch.equal(alone[0], together[i])


def test_only_wanted_tokens_go_through_all_of_the_last_layer():
    packed = compiled_decoder(random_model())
    text, spans = [(7 * k) % 259 for k in range(70)], [Span(0, 70, 0, list(range(5)))]
    whole = packed.logits(Batch(text, spans, list(range(70))))
    for wanted in ([69], [0, 1, 30, 68], []):
        packed.allocate_kv(5)
        assert torch.equal(packed.logits(Batch(text, spans, wanted)), whole[wanted])


@pytest.mark.parametrize(("page", "head"), [(16, 32), (5, 32), (1, 32), (16, 48)])
def test_a_token_that_is_no_number_spoils_its_request_alone(page, head):
    """Its pages lie between those of others, and vectors are read beyond the end of a page."""
    model = random_model(head_dim=head)
    packed = compiled_decoder(model, page)
    texts, count = [[5, 6, 7], [5, 250, 7], [5, 6, 8]], -(-3 // page)

    def run() -> torch.Tensor:
        spans = [Span(3 * i, 3 * i + 3, 0, list(range(i, 3 * count, 3))) for i in range(3)]
        return packed.logits(Batch(list(chain(*texts)), spans, [2, 5, 8]))

    clean = run()
    model.get_input_embeddings().weight[250] = torch.nan
    for _ in range(2):  # the second time over pages that hold it
        spoilt = run()
        assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])
        assert spoilt[1].isnan().all()
    model.get_input_embeddings().weight[250] = 0.5
    packed.clear(list(range(1, 3 * count, 3)))
    assert run().isfinite().all()


@pytest.mark.parametrize("name", COMPILED)
def test_models_built_like_llama_are_compiled_and_their_weights_held_once_more(name):
    model = load(f"random:{name}").model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    packed = runner_of(model)
    assert isinstance(packed.backend, CompiledDecoder)
    linear = sum(module.weight.nbytes for module in model.modules() if type(module) is nn.Linear)
    assert linear <= packed.copied_bytes <= 1.5 * linear, "and what fills the last panels"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_models_of_other_numbers_run_as_they_are():
    model = load("random:tiny-llama", dtype="float64").model
    assert isinstance(runner_of(model).backend, TransformersBackend)


def test_parts_that_do_something_else_than_they_look_like_run_as_they_are(caplog):
    class Halved(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    model = random_model()
    model.model.layers[1].mlp.__class__ = Halved
    with caplog.at_level(logging.WARNING):
        assert isinstance(runner_of(model).backend, TransformersBackend)
    assert "gives other logits when packed" in caplog.text
    loaded = LoadedModel("llama", model, None, "random")
    engine = Engine(loaded, EngineConfig(kv_memory=2**24))
    for output in engine.generate([[5, 6, 7], [8] * 20], SamplingParams(max_new_tokens=6, ignore_eos=True)):
        Oracle(loaded).check(output, 6)


def test_without_numba_a_model_runs_as_it_is_and_says_so(tiny, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "engine.backends.cpu.model", None)
    with caplog.at_level(logging.WARNING):
        packed = runner_of(tiny("tiny-llama").model)
    assert isinstance(packed.backend, TransformersBackend)
    assert "not compiled (import of engine.backends.cpu.model halted" in caplog.text
