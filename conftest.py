"""GPU tests skip where there is no GPU, and say so; `--require-gpu` makes that an error. Imports no torch by itself."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu", action="store_true", help="fail, rather than skip, gpu tests without a CUDA device"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu and not config.getoption("--require-gpu"):
        return
    import torch

    if torch.cuda.is_available():
        return
    if config.getoption("--require-gpu"):
        raise pytest.UsageError("--require-gpu: torch finds no CUDA device here, so no gpu test can run")
    for item in gpu:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))
