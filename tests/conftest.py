"""Models that tests share: loaded once, and the oracle's answers for them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from transformers import AutoModelForCausalLM

if not torch.cuda.is_available():
    # kernels run on the CPU then, if set before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
# as in a shell's background job, and so in all that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from engine import sampling
from engine.models import PRESETS, LoadedModel, load
from engine.sampling.device import sample_together
from tests.oracle import Oracle

# The same examples at every run; pytest's --hypothesis-profile=full asks for more of them than a plain run.
# Tests whose examples cost little take a multiple: settings(max_examples=10 * settings().max_examples).
settings.register_profile("full", derandomize=True, deadline=None, max_examples=200)
settings.register_profile("quick", settings.get_profile("full"), max_examples=20)
settings.load_profile("quick")  # pytest loads the one that it is asked for after this
TINY = ("tiny-qwen2", "tiny-llama", "tiny-gemma3")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for tiny models: dividing their products among several takes longer than computing them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if any("smollm2" in name for name in request.fixturenames) else 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[sampling.sample, sample_together], ids=["host", "device"])
def sample(request: pytest.FixtureRequest) -> Callable:
    """Both implementations of the sampler: the CPU's, and the one for a device, which runs anywhere."""
    return request.param


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Oracle]:
    """`tiny(name, dtype)` gives a random-weights model with its oracle."""
    known: dict[tuple[str, str], Oracle] = {}

    def get(name: str = "tiny-qwen2", dtype: str = "float32") -> Oracle:
        if (name, dtype) not in known:
            known[name, dtype] = Oracle(load(f"random:{name}", dtype=dtype))
        return known[name, dtype]

    return get


@pytest.fixture(scope="session")
def roped() -> Callable[[str], Oracle]:
    """`roped(kind)` gives a tiny Llama whose RoPE changes beyond 32 of its 64 positions (longrope) or all
    (dynamic)."""

    def get(kind: str) -> Oracle:
        config = PRESETS["tiny-llama"].config()
        config.max_position_embeddings = 64
        config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
        if kind == "longrope":
            factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
            config.rope_parameters |= {"original_max_position_embeddings": 32, **factors}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        return Oracle(LoadedModel(f"llama with {kind}", model, None, "made"))

    return get


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    return load("smollm2")


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter holds bfloat16 as 16-bit integers and multiplies these as such: give its products
    floats."""
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    product = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self, a, b, *rest):
        return product(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
