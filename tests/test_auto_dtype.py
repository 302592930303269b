"""dtype="auto": what it is on a CPU, by what a config says and what the processor multiplies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import machine
from engine.models import load


@pytest.mark.parametrize(
    ("stored", "has_products", "loaded"),
    [
        ("bfloat16", True, "bfloat16"),
        ("bfloat16", False, "float32"),  # as fast at many rows, and wider
        ("float16", True, "float32"),  # bfloat16 would lose three bits of each weight
        ("float32", True, "float32"),
    ],
)
def test_dtype_auto_is_that_of_the_weights_where_the_processor_multiplies_it(
    stored: str, has_products: bool, loaded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: has_products)
    load("random:tiny-llama", dtype=stored).model.save_pretrained(tmp_path)
    model = load(str(tmp_path), dtype="auto").model
    assert str(model.dtype) == f"torch.{loaded}"
    line = f"{tmp_path} runs in {loaded} (dtype=auto); its config says {stored}"
    assert caplog.messages == ([line] if stored != "float32" else [])
    assert load("random:tiny-llama", dtype="auto").model.dtype == torch.float32


def test_a_processor_says_whether_it_multiplies_bfloat16(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\nbugs\t\t:\n")
    assert machine.multiplies_bfloat16(info)
    info.write_text("flags\t\t: fpu avx512f avx512_bf16x\nnotes\t: avx512_bf16\n")
    assert not machine.multiplies_bfloat16(info)
    assert not machine.multiplies_bfloat16(tmp_path / "none")
