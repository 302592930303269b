"""Results that other load tools wrote, as rounds of ours: a module a tool, and what each of them gives.

A reader knows one tool's files and how its definitions differ from ours. It refuses by name what it does not
know, and neither judges nor saves: perf/importers/record.py makes a saved run of what was read. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from perf.gate.entries import Scalar
from perf.gate.pooling import Sample
from perf.importers.fields import Fields

NOT_STATED = "not stated"  # by the file: a model, say, that the tool did not write down


class Tool(StrEnum):
    """Tools whose results can be imported, by the name that the command takes."""

    GUIDELLM = "guidellm"
    AIPERF = "aiperf"
    VLLM_BENCH = "vllm-bench"
    SGLANG = "sglang"
    GENAI = "genai"


@dataclass(frozen=True, slots=True)
class Identity:
    """What was run, as far as a file says: equal in all rounds of a benchmark, and in base and head.

    arrivals: `all`, `poisson:2` and the like, or `concurrency:8`. requests: None where a time limit ended the
    run, for then their number is a result. offered_rate: requests a second.
    """

    model: str
    workload: str
    arrivals: str
    requests: int | None
    offered_rate: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """One load that a file has the results of: a round of one benchmark.

    version: the tool's; None where the file does not say. seconds: of the whole load, by the tool's clock.
    sample: the gated metrics by our names, a number each, and of a pooled one the values themselves. shown:
    other numbers of the round. by_request: whether they are of records of each request, or of the tool's
    summaries. notes: how the tool's definitions differ from ours.
    """

    version: str | None
    identity: Identity
    seconds: float
    sample: Sample
    shown: Mapping[str, Scalar] = field(default_factory=dict)
    by_request: bool = True
    notes: tuple[str, ...] = ()


class Reader(Protocol):
    """A tool's module."""

    def owns(self, found: Fields) -> bool:
        """Return whether an object, the first of a file, looks as if this tool had written it."""

    def read(self, found: Fields) -> list[Measured]:
        """Read the loads of one object of a file.

        Raises:
            GateError: naming the file and the key, for whatever is unknown, missing, or of failed requests.
        """
