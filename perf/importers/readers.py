"""The reader of each tool, and whose a file is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from perf.errors import Exit, GateError
from perf.importers import Measured, Reader, Tool, aiperf, genai, guidellm, sglang, vllm_bench
from perf.importers.fields import Fields, read_objects

READERS: Mapping[Tool, Reader] = {
    Tool.GUIDELLM: guidellm,
    Tool.AIPERF: aiperf,
    Tool.VLLM_BENCH: vllm_bench,
    Tool.SGLANG: sglang,
    Tool.GENAI: genai,
}


def read(tool: Tool, path: Path) -> list[tuple[str, Measured]]:
    """Read the loads in a file of a tool, each with the words for where in it that is.

    Raises:
        GateError: with code 2 if the file is not there or another tool's, with 3 if it is not fit to be
            imported.
    """
    found = []
    for one in read_objects(path):
        if not READERS[tool].owns(one):
            raise _not_ours(tool, one)
        found += [(one.where, measured) for measured in READERS[tool].read(one)]
    return found


def _not_ours(tool: Tool, found: Fields) -> GateError:
    other = next((name for name, reader in READERS.items() if reader.owns(found)), None)
    if other is None:
        return found.refuse(f"is no result of {tool}, nor of another tool that can be imported")
    way_out = f"python -m perf import {other} {found.path}"
    return GateError(f"{found.where}: is a result of {other}, not of {tool}: {way_out}", Exit.USAGE)
