"""Steps whose tokens stay on the device, a step ahead of the host, without a GPU: the oracle's tokens all the
same."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import engine.runner.memory
from engine import Engine, EngineConfig, InputError, SamplingParams
from engine.backends.cuda import can_run
from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.batch_layout import upload
from engine.backends.transformers.backend import TransformersBackend
from engine.models import PRESETS, LoadedModel, kv_bytes_per_token, load
from engine.models.attention_trace import attention_layers
from engine.models.decoder_spec import describe
from tests import reference
from tests.oracle import Oracle
from tests.serving import (
    NAMES,
    cuda_backend,
    drive,
    exactly,
    packed as build,
    run_out_of_memory,
    use_cuda_backend,
    work_of,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _cuda_backend(monkeypatch, request):
    if "triton_kernels" not in request.fixturenames:
        use_cuda_backend(monkeypatch)


@pytest.fixture
def triton_kernels(monkeypatch) -> None:
    """The real ones, in the interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("tests/test_gpu.py serves whole models with the real kernels")
    monkeypatch.setattr("engine.runner.packed.decoder_backend", cuda_backend)


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
    """Among greedy ones, in any mix, each draws what it draws alone from the unmodified model."""
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
        patch.setattr("engine.runner.packed.decoder_backend", lambda spec, config: None)
        expected = build(oracle, max_batch_size=1).generate(prompts, params, progress=False)
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-9)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3"])
def test_nan_fails_its_request_alone_while_the_next_step_is_in_flight(tiny, name, monkeypatch):
    oracle: Oracle = tiny(name)
    server = build(oracle, 200, max_batch_size=3, page_size=4)
    work = work_of(3)
    requests = [server.add_request(prompt, exactly(8)) for prompt, _ in work]
    server.step()
    server.step()
    poisoned, embedding = [], torch.nn.functional.embedding

    def poison(ids, weight):
        output = embedding(ids, weight)
        if weight is server.runner.backend.decoder.spec.embedding_VM:
            poisoned.append(1)
            output = output.clone()
            output[1] = torch.nan
        return output

    with monkeypatch.context() as patch:
        patch.setattr("engine.backends.cuda.model.F.embedding", poison)
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
        patch.setattr(server.runner.backend, "_logits", raising(RuntimeError("boom")))
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
    monkeypatch.setattr("engine.backends.cuda.model.ATTENDED_ROWS", 3)
    for options in (
        dict(max_batch_size=8),
        dict(max_batch_size=3, max_step_tokens=5),
        dict(max_batch_size=2),
    ):
        assert run(list(range(len(work))), **options) == alone


def raising(error: Exception) -> Callable:
    def raise_it(*args):
        raise error

    return raise_it


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.backends.cuda.kernels.max_split_rows", lambda dtype, layer_bytes: 4)
        server = build(oracle, page_size=4, max_batch_size=2, **config)
    assert isinstance(server.runner.backend, CudaBackend), "its kernels are proven at load"
    assert server.runner.backend.decoder.split_rows == 4
    for output, (_, limit) in zip(drive(server, work), work, strict=True):
        oracle.check(output, limit)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3"])
def test_the_kernels_serve_a_small_model(name):
    """A chunk with a past, a decode beside a chunk, rows few enough for split products and not."""
    serve_by_kernels(small(name), [([7, 8, 9], 3), ([*range(20, 31)], 2)], kv_tokens=24, max_step_tokens=7)


@pytest.mark.slow
@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3"])
def test_the_kernels_serve_a_model(tiny, name):
    serve_by_kernels(tiny(name), work_of(3), max_step_tokens=30)


def test_decode_steps_alone_are_captured_and_padded(tiny, monkeypatch):
    """And give what they give as they are, padding and all."""
    oracle: Oracle = tiny("tiny-qwen2")
    server = build(oracle, max_batch_size=8, max_step_tokens=50, page_size=4)
    backend, run = server.runner.backend, server.runner.backend.graphs.run
    padded = []

    def checked(shape, layout):
        exact = layout.shape(greedy=False)
        assert all(size <= bound for size, bound in zip(exact[:6], shape[:6], strict=True))
        found = run(shape._replace(greedy=False), layout)[: len(layout.keep_K)].clone()
        ints_I = upload(layout.ints(exact), torch.device("cpu"))
        plain = backend._logits(exact, ints_I, backend._block_tables.tables_RN)
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
        padded.append(shape.rows - exact.rows)
        return run(shape, layout)

    monkeypatch.setattr(backend.graphs, "run", checked)
    for output, (_, limit) in zip(drive(server, work_of(40)), work_of(40), strict=True):
        oracle.check(output, limit)
    assert len(padded) > 5
    assert any(padded), "no step had more rows than requests"
    assert not all(padded), "no step had as many rows as requests"
    assert {(shape.tokens, shape.requests) for shape in backend.graphs.known} == {(0, 0)}


@pytest.mark.parametrize("name", NAMES)
def test_joined_weights_are_the_models_own(name):
    """Nothing is held twice, two engines share what is joined, and the model gives what it gave."""
    model = load(f"random:{name}").model
    ids = torch.tensor([[5, 9, 100, 7]])
    with torch.inference_mode():
        before = model(ids).logits
    server = build(Oracle(LoadedModel(name, model, None, "random")))
    assert isinstance(server.runner.backend, CudaBackend)
    spec = describe(model, attention_layers(model))
    assert spec is not None
    assert can_run(spec)
    first = CudaBackend(spec, 4, 2)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    second = CudaBackend(spec, 4, 2)
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()], "joined again"
    assert first.copied_bytes == second.copied_bytes == 0
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for one, other in zip(first.decoder.layers, second.decoder.layers, strict=True):
        for a, b in ((one.qkv, other.qkv), (one.gate_up, other.gate_up)):
            assert a.weight_NM.data_ptr() == b.weight_NM.data_ptr()
            assert a.weight_NM.untyped_storage().data_ptr() in storages
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    model.get_input_embeddings().requires_grad_()
    model(ids).logits.sum().backward()  # its weights are no tensors of inference alone


def test_heads_in_another_order_are_copies_that_leave_the_model_as_it_was():
    sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, pad_token_id=0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = AutoConfig.for_model("glm", **sizes, **heads)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    server = build(Oracle(LoadedModel("glm", model, None, "random")))
    attention = model.base_model.layers[0].self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert server.runner.copied_bytes == 2 * sum(weight.nbytes for weight in weights)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kernel", [
    "split_k_product", "gated", "attend_rows", "attend_chunks", "add_norm", "row_product",
    "gated_row_product",
])  # fmt: skip
def test_a_kernel_that_is_wrong_is_seen_at_load(tiny, monkeypatch, caplog, kernel):
    """Of steps of one row, of few and of many; the model then runs as it was written."""
    oracle: Oracle = tiny("tiny-llama")
    right = getattr(reference, kernel)
    monkeypatch.setattr(f"engine.backends.cuda.kernels.{kernel}", lambda *args: right(*args).mul_(1.2))
    server = build(oracle)
    assert "gives other logits when packed" in caplog.text
    assert isinstance(server.runner.backend, TransformersBackend)
    for output, (_, limit) in zip(drive(server, work_of(5)), work_of(5), strict=True):
        oracle.check(output, limit)


@pytest.mark.parametrize("error", [TypeError("unexpected argument"), RuntimeError("out of shared memory")])
def test_what_fails_in_the_proof_makes_the_model_run_as_it_was_written(tiny, monkeypatch, caplog, error):
    oracle: Oracle = tiny("tiny-llama")
    monkeypatch.setattr("engine.backends.cuda.kernels.write_pages", raising(error))
    server = build(oracle)
    assert f"cannot run packed: {error}: it is computed by" in caplog.text
    (prompt, limit), *_ = work_of(1)
    oracle.check(server.generate([prompt], exactly(limit), progress=False)[0], limit)


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
