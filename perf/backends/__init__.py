"""Backends: whatever turns prompts into tokens, behind one small protocol, so that the suite measures them
all alike.

A backend is told a model and a batch size, is handed requests, and gives back tokens and when each reached
the host. What to run, how often, whether the tokens are right and what is recorded is the suite's business,
not a backend's.

To measure an engine of your own, write these two classes and name the first by `--backend
package.module:MyBackend`, or in the entry point group `dynamic_batch.backends`:

    class MyBackend:
        name = "mine"

        def missing(self, device):
            return None  # or one line that says what it lacks and how to get it

        def open(self, setup):
            return MySession(setup)  # load setup.folder() or use setup.loaded.model

    class MySession:
        def run(self, items):  # items[i].prompt is token ids, due at items[i].arrival_s
            tokens, seconds = my_engine(items)  # a list a request: its tokens, and when each came,
            return timeline(items, tokens, seconds)  # in seconds after the call

        def close(self): ...
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from engine import EngineMetrics, InputError, LoadedModel, RequestMetrics, WorkItem

GROUP = "dynamic_batch.backends"
BUILT_IN = {
    "sequential": "perf.backends.engine:Sequential",
    "dynamic": "perf.backends.engine:Dynamic",
    "continuous": "perf.backends.engine:Continuous",
    "generate": "perf.backends.transformers:OneByOne",
    "generate-padded": "perf.backends.transformers:PaddedBatches",
    "transformers-cb": "perf.backends.transformers:ContinuousBatching",
    "openvino": "perf.backends.peers:OpenVINO",
    "ctranslate2": "perf.backends.peers:CTranslate2",
    "vllm": "perf.backends.peers:VLLM",
    "vllm-cpu": "perf.backends.peers:VLLMOnCPU",
    "llama-cpp": "perf.backends.peers:LlamaCpp",
    "http": "perf.backends.http.backend:Http",
    "serve": "perf.backends.serve:Serve",
    "ray": "perf.backends.serve:OnRay",
    "ray-2": "perf.backends.serve:TwoOnRay",
}
INT8 = "int8"  # a dtype of weights that backends round, of a model in float32


class Unavailable(InputError):
    """This backend cannot run this model on this machine: a reason to skip it by name, not a failure."""


@dataclass(frozen=True)
class Setup:
    """Model that a backend is to load, and how much it may run at once.

    `loaded` is the model as Transformers has it, for backends in this process and for the check of the
    tokens; those that read files take `folder()`. `dtype` is that of the model, or "int8": a float32 model
    whose weights the backend rounds. `options` are the backend's own settings by name. `held` is the same as
    `loaded`, and None for a remote backend whose model is not known here.
    """

    held: LoadedModel | None
    device: str
    dtype: str
    max_batch_size: int
    seed: int = 0
    threads: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loaded(self) -> LoadedModel:
        assert self.held is not None, "only a remote backend is opened without a model"
        return self.held

    def folder(self) -> Path:
        """Return the model's folder, as `save_pretrained` writes it: in the cache if it came from nowhere."""
        from perf.backends.peers import model_folder

        return model_folder(self.loaded, self.dtype)


@dataclass(frozen=True)
class Outcome:
    """One run: output tokens in the order of the requests, and what was measured.

    `keeps_times` is False for a backend that tells only when requests end: it has no TTFT and no TPOT.
    `extra` is whatever else it knows of the run, by the names it is to be recorded under. `voided` says why
    the run must not count as a round. `exact` is False where its counters may differ from run to run.
    """

    tokens: list[tuple[int, ...]]
    metrics: EngineMetrics
    keeps_times: bool = True
    extra: Mapping[str, float | str] = field(default_factory=dict)
    voided: str | None = None
    exact: bool = True


@dataclass(frozen=True)
class Checked:
    """How many answers were checked, against what; how many were the same, and parted at a near-tie."""

    same: int
    near_ties: int
    checked: int
    against: str = "the model's own choices"

    @property
    def differ(self) -> int:
        """How many are others, and not for a near-tie."""
        return self.checked - self.same - self.near_ties

    @classmethod
    def by_model(cls, verdicts: Sequence[Any]) -> Checked:
        """Return what a Judge said of as many answers."""
        ties = sum(verdict.ties > 0 and verdict.wrong_at is None for verdict in verdicts)
        return cls(sum(verdict.same for verdict in verdicts), ties, len(verdicts))


class Judge(Protocol):
    """The model as Transformers runs it, which says whether an answer is its own choice."""

    def judge(self, prompt: Sequence[int], output: Sequence[int]) -> Any:
        """Return a verdict with `same`, `ties` and `wrong_at`; see perf/measure/token_check.py."""


class Session(Protocol):
    """A loaded model, ready to run workloads one after the other; nothing of one run may speed up the next.

    A session that remembers (a prefix cache) has a method `reset()` besides, called before every run,
    untimed. One whose model is in another process has an attribute `in_process = False`: the memory of this
    process is then not taken for its own. One that knows better what its times depend on has a property
    `fingerprint`; one that checks its answers by itself a method `check(items, judge)`, which returns a
    Checked (of an exact backend none may differ), where `judge` is None without a model in this process; one
    of a server `served_model`, its name.
    """

    def run(self, items: Sequence[WorkItem]) -> Outcome:
        """Serve every request greedily to its max_new_tokens, EOS or not, none before it is due."""

    def close(self) -> None:
        """Give back memory, threads and processes."""


class Backend(Protocol):
    """A way to run a model. `name` is how results are labelled.

    An attribute `exact = False` says that its tokens may differ from the model's own (a quantised model, a
    program of others); they are then counted and recorded rather than failing the test. `remote = True` says
    that it needs no model in this process: none is loaded for it unless one is named. `conversations =
    True` says that its sessions serve items that follow others, as `engine.WorkItem` describes them;
    `rounds_weights = True`, that it takes the dtype int8.
    """

    name: str

    def missing(self, device: str) -> str | None:
        """Return None if it can run here on "cpu" or "cuda", else what it lacks and the way to get it."""

    def open(self, setup: Setup) -> Session:
        """Load the model and warm up, as a server does before it takes requests. Raises Unavailable if it
        cannot."""


def find(name: str) -> Backend:
    """Return the backend called `name`: a built-in, an installed entry point, or `module:attr`.

    Raises:
        InputError: if there is none, naming those there are, or its module cannot be imported.
    """
    installed = {point.name: point.value for point in entry_points(group=GROUP)}
    target = {**installed, **BUILT_IN}.get(name, name)
    module, _, attribute = target.partition(":")
    if not attribute:
        known = ", ".join([*BUILT_IN, *installed])
        raise InputError(f"backend {name!r} is none of {known}, nor of the form module:attr")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"backend {name!r} cannot be imported: {error}") from error
    backend: Backend = found() if isinstance(found, type) else found
    lacks = [part for part in ("name", "missing", "open") if not hasattr(backend, part)]
    if lacks:
        raise InputError(f"backend {name!r} has no {', '.join(lacks)}: see perf/backends/__init__.py")
    return backend


def check_takes(backend: Backend, items: Sequence[WorkItem]) -> None:
    """Raise Unavailable if there are conversations among the items and the backend holds none."""
    if any(item.follows is not None for item in items) and not getattr(backend, "conversations", False):
        raise Unavailable(f"{backend.name}: it holds no conversations, and the workload has some")


def timeline(
    items: Sequence[WorkItem],
    tokens: Sequence[Sequence[int]],
    seconds: Sequence[Sequence[float]],
    *,
    counters: Mapping[str, int] | None = None,
    keeps_times: bool = True,
    began: float | None = None,
) -> Outcome:
    """Return plain lists as an Outcome.

    Args:
        items: what was asked.
        tokens: the output of each request.
        seconds: when each of those tokens reached the host, in seconds after the run began.
        counters: whichever fields of `engine.Counters` the backend knows.
        keeps_times: False if only the last of each request's times is real.
        began: when the run began (`time.perf_counter` seconds); now, if None.

    Raises:
        InputError: if the lists do not fit together: a backend's fault, not its speed.
    """
    start = time.perf_counter() if began is None else began
    metrics = EngineMetrics()
    for name, count in (counters or {}).items():
        setattr(metrics.counters, name, count)
    metrics.counters.output_tokens = sum(map(len, tokens))
    if not len(items) == len(tokens) == len(seconds):
        raise InputError(f"{len(items)} requests got {len(tokens)} outputs and {len(seconds)} lists of times")
    prompts: list[int] = []  # tokens of each, with all that it follows
    for index, (item, output, times) in enumerate(zip(items, tokens, seconds, strict=True)):
        if not len(output) == len(times) == item.params.max_new_tokens:
            raise InputError(
                f"requests[{index}] asked for {item.params.max_new_tokens} tokens and got {len(output)}, "
                f"with {len(times)} times"
            )
        arrival, before = start + item.arrival_s, 0
        if item.follows is not None:
            arrival += seconds[item.follows][-1]
            before = prompts[item.follows] + len(tokens[item.follows])
        prompts.append(before + len(item.prompt))
        token_times_s = [start + at for at in times]
        metrics.add(
            RequestMetrics.from_times(
                f"request-{index}",
                prompt_tokens=prompts[index],
                arrival_s=arrival,
                scheduled_s=arrival,
                token_times_s=token_times_s,
                finished_s=token_times_s[-1],
            )
        )
    return Outcome([tuple(map(int, output)) for output in tokens], metrics, keeps_times)
