"""The fingerprint: everything besides this project's code that speed depends on. Equal, or not comparable."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from engine import cpu_name
from perf.measure.nvml import driver_version


def fingerprint(device: str, dtype: str, model_revision: str | None) -> dict[str, str | None]:
    """Return what a run was made on, as flat strings; None where a thing is not there.

    The GPU's entries are None for a run on the CPU, since it does not depend on them.
    """
    cuda = device.startswith("cuda")
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": driver_version() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "triton": _installed("triton") if cuda else None,
        "python": platform.python_version(),
        "dtype": dtype,
        "model_revision": model_revision,
        "cpu": cpu_name(),
        "threads": str(torch.get_num_threads()),
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
