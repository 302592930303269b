"""Steps whose tokens stay on the device, a step ahead of the host, without a GPU: the oracle's tokens all the
same."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import engine.backends.cuda.attention
import engine.engine
import engine.runner.memory
from engine import Engine, EngineConfig, InputError, SamplingParams
from engine.backends.cuda.graphs import upload
from engine.backends.cuda.model import ACTIVATIONS, Angles, FusedLayer, FusedNorm, LastNorm
from engine.models import PRESETS, LoadedModel, kv_bytes_per_token
from engine.runner.cuda import CudaRunner, bucket
from engine.runner.packed import PackedRunner
from tests import reference
from tests.oracle import Oracle
from tests.serving import (
    NAMES,
    drive,
    exactly,
    packed as build,
    run_out_of_memory,
    use_device_runner,
    work_of,
)


@pytest.fixture(autouse=True)
def _device_runner(monkeypatch):
    use_device_runner(monkeypatch)


def test_steps_are_launched_before_the_one_before_is_read(tiny, monkeypatch):
    oracle: Oracle = tiny()
    server = build(oracle, max_batch_size=8)
    events = []
    launch = server.runner.launch

    def watched(step):
        number, ticket = len([e for e in events if e[0] == "launch"]), launch(step)
        events.append(("launch", number))

        def collect():
            events.append(("collect", number))
            return ticket.collect()

        return SimpleNamespace(is_async=ticket.is_async, collect=collect)

    monkeypatch.setattr(server.runner, "launch", watched)
    outputs = server.generate([prompt for prompt, _ in work_of(5)], exactly(6), progress=False)
    for output in outputs:
        oracle.check(output, 6)
    steady = [event for i in range(1, 6) for event in (("launch", i), ("collect", i - 1))]
    assert events == [("launch", 0), *steady, ("collect", 5)]
    assert server.metrics.counters.forward_passes == 6, (
        "an end by length is known ahead: nothing is computed in vain"
    )
    assert not server.has_work


def test_sampled_requests_wait_for_their_tokens_and_keep_them(tiny):
    """Among greedy ones, in any mix, each draws what it draws alone on the runner of the CPU."""
    oracle: Oracle = tiny("tiny-llama", "float64")
    work = work_of(12)
    params = [
        [
            exactly(limit + 3),
            exactly(limit + 4, temperature=0.8, seed=i, top_k=20),
            exactly(limit + 2, repetition_penalty=1.3),
            SamplingParams(
                max_new_tokens=limit + 5, min_new_tokens=limit + 1, stop_token_ids=tuple(range(0, 256, 2))
            ),
            exactly(limit + 1, logprobs=3),
        ][i % 5]
        for i, (_, limit) in enumerate(work)
    ]
    prompts = [prompt for prompt, _ in work]
    found = build(oracle, max_batch_size=5).generate(prompts, params, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.engine, "make_runner", lambda model, pool, *rest: PackedRunner(model, pool))
        expected = build(oracle, max_batch_size=1).generate(prompts, params, progress=False)
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-9)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3"])
def test_nan_fails_its_request_alone_while_the_next_step_is_under_way(tiny, name):
    oracle: Oracle = tiny(name)
    server = build(oracle, 200, max_batch_size=3, page_size=4)
    work = work_of(3)
    requests = [server.add_request(prompt, exactly(8)) for prompt, _ in work]
    server.step()
    server.step()
    poisoned = []

    def poison(module, inputs, output):
        output = output.clone()
        output[:, 1] = torch.nan
        poisoned.append(1)
        return output

    with server.runner.model.get_input_embeddings().register_forward_hook(poison):
        server.step()
    while server.has_work:
        server.step()
    assert poisoned == [1]
    assert requests[1].result.finish_reason == "error"
    assert "NaN" in requests[1].result.error
    for i in (0, 2):
        oracle.check(requests[i].result, 8)
    for output, (_, limit) in zip(drive(server, work_of(16)), work_of(16), strict=True):
        oracle.check(output, limit)


def test_a_step_that_fails_takes_its_requests_alone_and_loses_no_token_read_late(tiny, monkeypatch):
    oracle: Oracle = tiny()
    server = build(oracle, max_batch_size=2)
    work = work_of(4)
    requests = [server.add_request(prompt, exactly(6)) for prompt, _ in work]
    for _ in range(3):
        server.step()
    with monkeypatch.context() as patch:
        patch.setattr(server.runner, "_logits", lambda *args: (_ for _ in ()).throw(RuntimeError("boom")))
        with pytest.raises(RuntimeError, match="boom"):
            server.step()
    for request in requests[:2]:
        assert "boom" in request.result.error
        assert request.result.token_ids == oracle.answer(request.tokens[: request.prompt_len], 6)[:3]
    while server.has_work:
        server.step()
    for request in requests[2:]:
        oracle.check(request.result, 6)


def test_out_of_memory_makes_steps_smaller(tiny, monkeypatch):
    oracle: Oracle = tiny()
    server = build(oracle, max_batch_size=8)
    run_out_of_memory(oracle, server, monkeypatch)
    assert server.scheduler.max_step_tokens <= 80


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3"])
def test_deterministic_means_the_same_bits_in_any_company(tiny, name, monkeypatch):
    oracle: Oracle = tiny(name)
    work = work_of(8, seed=3)

    def run(chosen, **options):
        server = build(oracle, deterministic=True, page_size=4, **options)
        params = [exactly(work[i][1], logprobs=5) for i in chosen]
        outputs = server.generate([work[i][0] for i in chosen], params, progress=False)
        return {i: (o.token_ids, o.logprobs) for i, o in zip(chosen, outputs, strict=True)}

    alone = {i: run([i])[i] for i in range(len(work))}
    monkeypatch.setattr(engine.backends.cuda.attention, "ROWS", 3)
    for options in (
        dict(max_batch_size=8),
        dict(max_batch_size=3, max_step_tokens=5),
        dict(max_batch_size=2),
    ):
        assert run(list(range(len(work))), **options) == alone


def small(name: str) -> Oracle:
    """A tiny model made smaller: one layer, or two, one with a window, if the model has any."""
    config = PRESETS[name].config()
    config.update(dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1))
    config.update(dict(num_attention_heads=2, head_dim=16, num_key_value_heads=1))
    if name == "tiny-gemma3":
        config.num_hidden_layers = 2
        config.update(dict(sliding_window=3, layer_types=["sliding_attention", "full_attention"]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return Oracle(LoadedModel(name, model, None, "random"))


def serve_by_kernels(oracle: Oracle, work: list[tuple[list[int], int]], **config) -> None:
    """Serve a model through the Triton kernels, in the interpreter where there is no GPU."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("tests/test_gpu.py serves whole models with the real kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.engine, "make_runner", lambda *args: CudaRunner(*args[:4]))
        patch.setattr("engine.backends.cuda.kernels.split_k.few_rows", lambda dtype, layer_bytes: 4)
        server = build(oracle, page_size=4, max_batch_size=2, **config)
    layer = server.runner.model.base_model.layers[0]
    assert isinstance(layer, FusedLayer), "its fused kernels are proven at load"
    assert layer.stream.few == 4
    for output, (_, limit) in zip(drive(server, work), work, strict=True):
        oracle.check(output, limit)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3"])
def test_the_kernels_serve_a_small_model(name):
    """A chunk with a past, a decode beside a chunk, rows few enough for thin products and not."""
    serve_by_kernels(small(name), [([7, 8, 9], 3), ([*range(20, 31)], 2)], kv_tokens=24, max_step_tokens=7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3"])
def test_the_kernels_serve_a_model(tiny, name):
    serve_by_kernels(tiny(name), work_of(3), max_step_tokens=30)


def test_decode_steps_alone_are_captured_and_padded(tiny, monkeypatch):
    """And give what they give as they are, padding and all."""
    oracle: Oracle = tiny("tiny-qwen2")
    server = build(oracle, max_batch_size=8, max_step_tokens=50, page_size=4)
    runner, run = server.runner, server.runner.graphs.run
    padded = []

    def checked(sizes, laid):
        exact = laid.sizes(greedy=False)
        assert all(size <= bound for size, bound in zip(exact[:6], sizes[:6], strict=True))
        found = run(sizes._replace(greedy=False), laid)[: len(laid.keep_K)].clone()
        plain = runner._logits(exact, upload(laid.ints(exact), runner.device))
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
        padded.append(sizes.rows - exact.rows)
        return run(sizes, laid)

    monkeypatch.setattr(runner.graphs, "run", checked)
    for output, (_, limit) in zip(drive(server, work_of(40)), work_of(40), strict=True):
        oracle.check(output, limit)
    assert len(padded) > 5
    assert any(padded), "no step had more rows than requests"
    assert not all(padded), "no step had as many rows as requests"
    assert {(sizes.tokens, sizes.requests) for sizes in runner.graphs.known} == {(0, 0)}


def test_buckets_waste_little():
    for rows in range(1, 600):
        assert rows <= bucket(rows) <= max(rows + 15, 2 * rows - 1)
        assert rows < 80 or bucket(rows) < 1.1 * rows
    assert len({bucket(rows) for rows in range(1, 513)}) == 45
    assert np.all(np.diff([bucket(rows) for rows in range(1, 600)]) >= 0)


@pytest.mark.parametrize("name", NAMES)
def test_layers_like_llamas_or_gemmas_are_fused(tiny, name):
    model = build(tiny(name)).runner.model.base_model
    assert all(isinstance(layer, FusedLayer) and layer.stream.few == 5 for layer in model.layers)
    assert isinstance(model.norm, LastNorm)
    assert isinstance(model.rotary_emb, Angles)
    assert not any("RMSNorm" in type(module).__name__ for module in model.modules())


def test_other_layers_keep_their_own_code_and_get_fused_norms(tiny, monkeypatch):
    monkeypatch.delitem(ACTIVATIONS, "SiLUActivation")
    oracle = tiny("tiny-llama")
    server = build(oracle)
    model = server.runner.model.base_model
    assert not any(isinstance(layer, FusedLayer) for layer in model.layers)
    assert isinstance(model.norm, FusedNorm)
    for output, (_, limit) in zip(drive(server, work_of(5)), work_of(5), strict=True):
        oracle.check(output, limit)


def test_layers_that_only_look_like_llamas_run_as_they_are(tiny, monkeypatch, caplog):
    oracle: Oracle = tiny("tiny-llama")
    add = FusedLayer._add

    def louder(self, *args):
        add(self, *args)
        self.stream.added = 1.2 * self.stream.added

    monkeypatch.setattr(FusedLayer, "_add", louder)
    server = build(oracle)
    assert "gives other logits on the device" in caplog.text
    assert not any(isinstance(module, FusedLayer | FusedNorm) for module in server.runner.model.modules())
    for output, (_, limit) in zip(drive(server, work_of(5)), work_of(5), strict=True):
        oracle.check(output, limit)


def test_thin_products_that_are_wrong_are_left_out(tiny, monkeypatch, caplog):
    oracle: Oracle = tiny("tiny-llama")
    right = reference.split_k_product
    monkeypatch.setattr(reference, "split_k_product", lambda *args: 1.2 * right(*args))
    server = build(oracle)
    assert "steps of few rows take the same products as others" in caplog.text
    assert {layer.stream.few for layer in server.runner.model.base_model.layers} == {0}
    for output, (_, limit) in zip(drive(server, work_of(5)), work_of(5), strict=True):
        oracle.check(output, limit)


@pytest.mark.parametrize("error", [TypeError("unexpected argument"), RuntimeError("out of shared memory")])
def test_what_fails_in_the_proof_makes_the_engine_fall_back_to_padded(tiny, monkeypatch, error):
    oracle: Oracle = tiny("tiny-llama")
    monkeypatch.setattr(reference, "write_pages", lambda *args: (_ for _ in ()).throw(error))
    with pytest.raises(InputError, match=f"cannot run packed: {error}"):
        build(oracle)
    with pytest.warns(UserWarning, match=f"cannot run packed: {error}; using runner='padded'"):
        server = Engine(oracle.loaded, EngineConfig(kv_memory=10**6))
    (prompt, limit), *_ = work_of(1)
    oracle.check(server.generate([prompt], exactly(limit), progress=False)[0], limit)


def test_rope_that_reads_positions_on_the_host_makes_the_engine_fall_back_to_padded(roped):
    oracle: Oracle = roped("dynamic")
    with pytest.warns(UserWarning, match="has dynamic RoPE, which reads .*; using runner='padded'"):
        server = Engine(oracle.loaded)
    oracle.check(server.generate([[5, 6, 7]], exactly(6), progress=False)[0], 6)


def test_memory_for_keys_and_values_is_what_a_step_leaves(tiny, monkeypatch):
    oracle: Oracle = tiny()
    asked = []

    def step_bytes(model, tokens, rows):
        asked.append((tokens, rows))
        return 1000

    monkeypatch.setattr(engine.runner.memory, "step_bytes", step_bytes)
    monkeypatch.setattr(engine.runner.memory, "free_bytes", lambda device: 1_013_000)
    token_bytes = kv_bytes_per_token(oracle.model)
    for share in (0.5, 1.0):
        server = Engine(
            oracle.loaded, EngineConfig(kv_memory=share, max_batch_size=3, max_step_tokens=5000, page_size=1)
        )
        assert server.scheduler.memory.pages == int(share * 1_010_000) // token_bytes
    assert asked[-2:] == [(4096, 3), (3, 3)], "no request is longer than the model's positions"
    with pytest.raises(
        InputError, match=r"kv_memory=2000000 .* 1013000 bytes are free, and a step .* takes 3000"
    ):
        Engine(oracle.loaded, EngineConfig(kv_memory=2_000_000))
