"""How much of a machine's memory is counted as free."""

from __future__ import annotations

import psutil
import pytest
import torch

from engine.runner.memory import free_bytes


def test_what_torch_keeps_of_freed_memory_is_free(monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cuda:1")
    gigabytes = {"mem_get_info": (3, 80), "memory_reserved": 70, "memory_allocated": 20}
    for name, value in gigabytes.items():
        monkeypatch.setattr(torch.cuda, name, lambda at, value=value: value if at == device else None)
    assert free_bytes(device) == 53


def test_free_on_a_cpu_is_what_the_system_says():
    assert 0 < free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total
