"""The backend that is this project's own server: its tokens are the engine's, and nothing of it is left."""

from __future__ import annotations

import uuid

import psutil
import pytest

from engine import SamplingParams, WorkItem, load
from perf.backends import Setup, Unavailable, find
from perf.measure.token_check import Reference


def test_its_tokens_are_the_models_and_its_process_ends_with_it() -> None:
    loaded = load("random:tiny-llama")
    params = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
    items = [WorkItem([5 + n, 9, 20], params) for n in range(5)]
    session = find("serve").open(Setup(loaded, "cpu", "float32", 4))
    try:
        served = session.run(items)
        assert [len(tokens) for tokens in served.tokens] == [6] * 5
        checked = session.check(items, Reference(loaded))
        assert (checked.same, checked.checked, checked.against) == (5, 5, "the model's own choices")
        assert session.fingerprint["tells"] == "token ids and usage"
        assert session.fingerprint["refused_fields"] == "none"
    finally:
        session.close()
    assert not [child for child in psutil.Process().children(recursive=True) if "serve" in child.cmdline()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ray", "ray-2"])
def test_the_same_on_ray(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve", reason="needs Ray: pip install 'dynamic-batch[ray]'")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)  # or Ray keeps one in the home folder
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    loaded = load("random:tiny-llama")
    params = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
    items = [WorkItem([5 + n, 9, 20], params) for n in range(8)]
    session = find(name).open(Setup(loaded, "cpu", "float32", 4))
    try:
        children = psutil.Process().children(recursive=True)
        served = session.run(items)
        assert [len(tokens) for tokens in served.tokens] == [6] * 8
        assert served.extra["server_preemptions"] == 0  # the metrics of all replicas
        checked = session.check(items, Reference(loaded))
        assert (checked.same, checked.checked) == (8, 8)
    finally:
        session.close()
    assert not psutil.wait_procs(children, timeout=30)[1]


def test_a_cluster_that_others_share_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(Unavailable, match="RAY_ADDRESS"):
        find("ray").open(Setup(load("random:tiny-llama"), "cpu", "float32", 4))


def test_weights_that_another_process_cannot_make_are_refused() -> None:
    with pytest.raises(Unavailable, match="weights of seed 3"):
        find("serve").open(Setup(load("random:tiny-llama"), "cpu", "float32", 4, seed=3))
