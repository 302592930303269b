"""Request sets, named and seeded or from a file, and arrival processes: the same work everywhere.

A workload says what is asked and when it is due; it runs nothing, and no torch may enter. Separate seeded
streams for lengths and texts, for random token ids and for arrivals: changing one leaves the others alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from random import Random
from typing import Any

import numpy as np

from engine.bench.workload_files import Messages, Recording, Row, is_file_name, read_recording
from engine.bench.workload_prompts import Prompts, TextPrompts, TokenPrompts, history_of
from engine.bench.workload_texts import chat_texts
from engine.errors import InputError, check, shown
from engine.request import ResolvedParams, WorkItem, check_follows

MOST_IDS = 1 << 24
MOST_POSITIONS = 1 << 30
NAMES = {  # put a number in place of N: chat-32
    "chat-N": "English prompts of a sentence to a few paragraphs, 8-64 tokens out, EOS honoured",
    "paper-N": "exactly 128 random tokens in and 256 out, EOS ignored",
    "mixed-N": "log-normal lengths, 12-260 random tokens in (median 70), 8-64 out (median 28), EOS ignored",
    "shared-prefix-N": "256 random tokens in common, then 16-64 of each one's own, 8-32 out, EOS ignored",
    "brief-N": "the prompts of chat-N, 8-24 tokens out, EOS honoured",
    "nano-N": "100-1024 random tokens in and out, uniform, nano-vllm's own lengths, EOS ignored",
}
ENGLISH = ("chat", "brief")


@dataclass(frozen=True)
class Workload:
    """Requests, and what they were made from: in order of arrival, or of the file.

    Raises InputError for an item that follows itself or a later one.
    """

    name: str
    seed: int
    arrivals: str
    items: tuple[WorkItem, ...]

    def __post_init__(self) -> None:
        check_follows(self.items)

    def whole_prompt(self, index: int, answers: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """Return the token ids of an item's prompt with all that it follows.

        Args:
            answers: the output of every item, without the stop token that ended it.
        """
        turns = [index]
        while (before := self.items[turns[-1]].follows) is not None:
            turns.append(before)
        parts = [part for at in reversed(turns) for part in (_ids(at, self.items[at]), answers[at])]
        return tuple(chain.from_iterable(parts[:-1]))

    def lengths(self) -> list[tuple[int, int]]:
        """Return tokens in and out of each item: of a follow-up all before it counts, answers at their
        longest."""
        found: list[tuple[int, int]] = []
        for index, item in enumerate(self.items):
            before = 0 if item.follows is None else sum(found[item.follows])
            found.append((before + len(_ids(index, item)), item.params.resolved().max_new_tokens))
        return found


def _ids(index: int, item: WorkItem) -> Sequence[int]:
    if isinstance(item.prompt, str):
        problem = "is text, of no known tokens: make the workload with a vocab_size"
        raise InputError(f"items[{index}].prompt {problem}")
    return item.prompt


def make_workload(
    name: str,
    *,
    vocab_size: int | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    arrivals: str = "auto",
    max_positions: int | None = None,
) -> Workload:
    """Return the workload called `name` (see NAMES) or in a file, a pure function of arguments and content.

    Every request is greedy, whatever a model says, and those of a file ignore EOS.

    Random ids lie in [min(10, vocab_size // 2), vocab_size), outside `tokenizer.all_special_ids`. Messages
    and chat texts go through the tokenizer and its chat template, if any; with no tokenizer, chat texts
    become random ids, one for 4 characters, at least 12.

    With no `vocab_size` prompts are text, for servers whose tokens are not known: what is random is common
    English words, and lengths are of words. `tokenizer` counts recorded answers then, and nothing else.

    Args:
        name: as in NAMES, or a file (.jsonl, .json, or a path): see engine/README.md for its formats.
        arrivals: "all" at once, and follow-ups as soon as they can be; "poisson:RATE" a second from 0;
            "burst:SIZE:GAP_S"; "trace", as a file says; "auto", which is "trace" for a file with times and
            "all" for all else. Of conversations it is when they begin.

    Raises:
        InputError: for bad names, numbers and files, and for requests beyond `max_positions`: none is cut to
            fit.
    """
    asked = _find(name)
    if vocab_size is not None:
        vocab_size = check("vocab_size", vocab_size, int, 2)
        if vocab_size > MOST_IDS:
            problem = f"must be at most {MOST_IDS}: no model has so many tokens"
            raise InputError(f"vocab_size={vocab_size} {problem}")
    seed = check("seed", seed, int)
    bound = MOST_POSITIONS if max_positions is None else check("max_positions", max_positions, int, 1)
    if vocab_size is None and max_positions is not None:
        problem = "is of tokens, and without vocab_size prompts are text: leave it out"
        raise InputError(f"max_positions={bound} {problem}")
    shape, draw, clock = (np.random.default_rng([seed, stream]) for stream in range(3))
    arrivals, due = _due(asked, arrivals, clock)
    prompts: Prompts = TextPrompts(tokenizer, seed)
    if vocab_size is not None:
        prompts = TokenPrompts(vocab_size, tokenizer, seed, bound)
    if isinstance(asked, Recording):
        items, name = _recorded(asked.rows, prompts, due), asked.name
    else:
        items = _family(*asked, prompts, due, seed, shape, draw)
    work = Workload(name, seed, arrivals, tuple(items))
    if vocab_size is not None:
        _check_positions(work, asked, bound)
    return work


def check_workload(name: str, *, seed: int = 0, arrivals: str = "auto") -> bool:
    """Check all of a workload that needs no model, such as every line of a file; return whether any of its
    requests follows another.

    Raises:
        InputError: as `make_workload` does.
    """
    asked = _find(name)
    _due(asked, arrivals, np.random.default_rng([check("seed", seed, int), 2]))
    return isinstance(asked, Recording) and asked.has_conversations


def _find(name: Any) -> Recording | tuple[str, int]:
    """Return a file's requests, or the family and number of a name."""
    if isinstance(name, str) and is_file_name(name):
        return read_recording(name)
    pattern = rf"({'|'.join(NAMES)})-([1-9][0-9]{{0,5}})".replace("-N", "")
    found = re.fullmatch(pattern, name) if isinstance(name, str) else None
    if not found:
        ways = f"one of {', '.join(NAMES)}, with N from 1 to 999999, or a .jsonl or .json file"
        raise InputError(f"workload={shown(name)} must be {ways}")
    return found[1], int(found[2])


def _due(
    asked: Recording | tuple[str, int], arrivals: str, clock: np.random.Generator
) -> tuple[str, list[float]]:
    """Return the arrivals that are meant, and when each request is due: seconds after the start, of a
    follow-up after the answer before."""
    rows = asked.rows if isinstance(asked, Recording) else ()
    has_times = isinstance(asked, Recording) and asked.has_times
    if arrivals == "auto":
        arrivals = "trace" if has_times else "all"
    if not isinstance(asked, Recording):
        return arrivals, _arrivals(arrivals, asked[1], clock)
    begins = [row.begins_s or 0.0 for row in rows if row.follows is None]
    if arrivals == "trace" and has_times:
        first = min(begins)
        times = iter([at - first for at in begins])
    else:
        times = iter(_arrivals(arrivals, len(begins), clock))
    waits = arrivals != "all"
    return arrivals, [next(times) if row.follows is None else row.after_s * waits for row in rows]


def _arrivals(arrivals: str, n: int, rng: np.random.Generator) -> list[float]:
    with suppress(ValueError):  # from float and int
        match arrivals.split(":") if isinstance(arrivals, str) else ():
            case ["all"]:
                return [0.0] * n
            case ["poisson", rate] if 1e-6 <= float(rate) <= 1e6:
                return [0.0, *np.cumsum(rng.exponential(1 / float(rate), n - 1)).tolist()]
            case ["burst", size, gap] if int(size) >= 1 and 1e-6 <= float(gap) <= 1e6:
                return [i // int(size) * float(gap) for i in range(n)]
    ways = (
        "all, poisson:RATE or burst:SIZE:GAP_S, SIZE at least 1, RATE (a second) and GAP_S from 1e-6 to 1e6"
    )
    raise InputError(f"arrivals={shown(arrivals)} must be {ways}, or trace for a file that has times")


def _family(
    family: str, n: int, prompts: Prompts, due: Sequence[float], seed: int,
    shape: np.random.Generator, draw: np.random.Generator,
) -> list[WorkItem]:  # fmt: skip
    """Return n requests of a family, their lengths from the stream `shape`, what is random from `draw`."""
    texts = chat_texts(n, shape) if family in ENGLISH else []
    log_normal = shape.lognormal(np.log([[70], [28]]), 0.8, (2, n)).round()
    text_sizes = [max(12, len(text) // 4) for text in texts]
    sizes: Any = {
        "chat": lambda: (text_sizes, shape.integers(8, 65, n)),
        "brief": lambda: (text_sizes, shape.integers(8, 25, n)),
        "paper": lambda: ([128] * n, [256] * n),
        "mixed": lambda: np.clip(log_normal, [[12], [8]], [[260], [64]]),
        "shared-prefix": lambda: (shape.integers(16, 65, n), shape.integers(8, 33, n)),
        "nano": lambda: _nano_lengths(n, seed),
    }
    lengths, limits = sizes[family]()
    if texts and prompts.speaks:
        messages: list[Messages] = [({"role": "user", "content": text},) for text in texts]
        rows = [Row(f"{family}-{n}", "messages", asked, 0) for asked in messages]
        pairs = [prompts.asked(row, ()) for row in rows]
    else:
        prefix = prompts.draw(draw, 256 if family == "shared-prefix" else 0)
        pairs = [prompts.joined([*prefix, *prompts.draw(draw, int(length))]) for length in lengths]
    params = [ResolvedParams(int(limit), ignore_eos=family not in ENGLISH) for limit in limits]
    zipped = zip(pairs, params, due, strict=True)
    return [WorkItem(prompt, one, at, source=source) for (prompt, source), one, at in zipped]


def _nano_lengths(n: int, seed: int) -> tuple[list[int], list[int]]:
    """Return input and output lengths as nano-vllm's bench.py draws them (133,966 tokens out for 256).

    It draws each prompt's length and then its ids, all from one stream, and the lengths of outputs last. The
    ids are drawn here too, and thrown away. mini-sglang's copy of it draws ids of its model's vocabulary
    instead, so that all but its first length are others, of the same distribution.
    """
    stream = Random(seed)
    lengths = []
    for _ in range(n):
        lengths.append(stream.randint(100, 1024))
        for _ in range(lengths[-1]):
            stream.randint(0, 10_000)
    return lengths, [stream.randint(100, 1024) for _ in range(n)]


def _recorded(rows: Sequence[Row], prompts: Prompts, due: Sequence[float]) -> list[WorkItem]:
    """Return the requests of a file."""
    items: list[WorkItem] = []
    histories: list[Messages] = []
    for row, at in zip(rows, due, strict=True):
        before = () if row.follows is None else histories[row.follows]
        prompt, source = prompts.asked(row, before)
        out = prompts.tokens_of(row.place, row.out) if isinstance(row.out, str) else row.out
        items.append(WorkItem(prompt, ResolvedParams(out, ignore_eos=True), at, row.follows, source))
        histories.append(history_of(row, before))
    return items


def _check_positions(work: Workload, asked: Recording | tuple[str, int], bound: int) -> None:
    needs = [tokens_in + tokens_out - 1 for tokens_in, tokens_out in work.lengths()]
    if (most := max(needs)) <= bound:
        return
    problem = f"max_positions={bound} is too small: the longest request of {work.name} needs {most}"
    if isinstance(asked, Recording):
        first = next(row.place for row, need in zip(asked.rows, needs, strict=True) if need > bound)
        count = sum(need > bound for need in needs)
        problem += f"; {count} of {len(needs)} need too many, the first at {first}: leave them out"
    raise InputError(problem)
