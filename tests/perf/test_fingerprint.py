"""The fingerprint: flat strings, honest about what is not there, and different when the ground is."""

from __future__ import annotations

from pathlib import Path

import torch

from perf.measure.fingerprint import cpu_name, fingerprint

KEYS = {"gpu", "driver", "cuda", "torch", "transformers", "triton", "python", "dtype", "model_revision",
        "cpu",
        "threads"}  # fmt: skip


def test_on_a_cpu_it_is_flat_strings_and_does_not_depend_on_a_gpu():
    found = fingerprint("cpu", "float32", "random-seed-0")
    assert set(found) == KEYS
    assert {key for key, value in found.items() if value is None} == {"gpu", "driver", "cuda", "triton"}
    assert all(isinstance(value, str) and value for value in found.values() if value is not None)
    assert found["torch"] == str(torch.__version__)


def test_dtype_revision_and_threads_change_it():
    base = fingerprint("cpu", "float32", "random-seed-0")
    assert fingerprint("cpu", "float64", "random-seed-0") != base
    assert fingerprint("cpu", "float32", None)["model_revision"] is None
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert fingerprint("cpu", "float32", "random-seed-0")["threads"] == str(threads + 1)
    finally:
        torch.set_num_threads(threads)


def test_the_processor_is_named_as_the_kernel_names_it(tmp_path: Path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t: fpu\nmodel name\t: another\n")
    assert cpu_name(file) == "Some CPU @ 3 GHz"
    file.write_text("processor\t: 0\n")
    assert cpu_name(file) == cpu_name(tmp_path / "absent") != ""
