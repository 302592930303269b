"""Named, seeded request sets and arrival processes: the same name and seed give the same work everywhere.

A workload says what is asked and when it is due; it runs nothing, and no torch may enter. Separate seeded
streams for lengths and texts, for random token ids and for arrivals: changing one leaves the others alone.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import InputError, check, shown
from engine.request import ResolvedParams, WorkItem

MOST_IDS = 1 << 24
NAMES = {  # put a number in place of N: chat-32
    "chat-N": "English prompts of a sentence to a few paragraphs, 8-64 tokens out, EOS honoured",
    "paper-N": "exactly 128 random tokens in and 256 out, EOS ignored",
    "mixed-N": "log-normal lengths, 12-260 random tokens in (median 70), 8-64 out (median 28), EOS ignored",
    "shared-prefix-N": "256 random tokens in common, then 16-64 of each one's own, 8-32 out, EOS ignored",
    "brief-N": "the prompts of chat-N, 8-24 tokens out, EOS honoured",
}
ENGLISH = ("chat", "brief")


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival, and what they were made from."""

    name: str
    seed: int
    arrivals: str
    items: tuple[WorkItem, ...]


def make_workload(
    name: str,
    *,
    vocab_size: int,
    tokenizer: Any = None,
    seed: int = 0,
    arrivals: str = "all",
    max_positions: int | None = None,
) -> Workload:
    """Return the workload called `name` (see NAMES), a pure function of the arguments.

    Every request is greedy, whatever a model says.

    Random ids lie in [min(10, vocab_size // 2), vocab_size), outside `tokenizer.all_special_ids`. Chat texts
    go through the tokenizer and its chat template, if any; with no tokenizer they become random ids, one for
    4 characters, at least 12. `arrivals`: "all" at 0; "poisson:RATE" a second from 0; "burst:SIZE:GAP_S".
    Raises InputError for bad names and numbers, and for requests beyond `max_positions`: none is cut to fit.
    """
    pattern = rf"({'|'.join(NAMES)})-([1-9][0-9]{{0,5}})".replace("-N", "")
    found = re.fullmatch(pattern, name) if isinstance(name, str) else None
    if not found:
        raise InputError(f"workload={shown(name)} must be one of {', '.join(NAMES)}, with N from 1 to 999999")
    vocab_size, seed = check("vocab_size", vocab_size, int, 2), check("seed", seed, int)
    if vocab_size > MOST_IDS:
        raise InputError(f"vocab_size={vocab_size} must be at most {MOST_IDS}: no model has so many tokens")
    bound = 1 << 30 if max_positions is None else check("max_positions", max_positions, int, 1)
    family, n = found[1], int(found[2])
    shape, draw, clock = (np.random.default_rng([seed, stream]) for stream in range(3))
    due = _arrivals(arrivals, n, clock)
    special = getattr(tokenizer, "all_special_ids", [])
    ids = np.setdiff1d(np.arange(min(10, vocab_size // 2), vocab_size), special)
    if not len(ids):
        raise InputError(f"vocab_size={vocab_size} leaves nothing but the tokenizer's special tokens")

    texts = _chat_texts(n, shape) if family in ENGLISH else []
    log_normal = shape.lognormal(np.log([[70], [28]]), 0.8, (2, n)).round()
    text_sizes = [max(12, len(text) // 4) for text in texts]
    sizes: Any = {
        "chat": lambda: (text_sizes, shape.integers(8, 65, n)),
        "brief": lambda: (text_sizes, shape.integers(8, 25, n)),
        "paper": lambda: ([128] * n, [256] * n),
        "mixed": lambda: np.clip(log_normal, [[12], [8]], [[260], [64]]),
        "shared-prefix": lambda: (shape.integers(16, 65, n), shape.integers(8, 33, n)),
    }
    lengths, limits = sizes[family]()
    if texts and tokenizer is not None:
        prompts = [_encode(text, tokenizer) for text in texts]
    else:
        prefix = draw.choice(ids, 256 if family == "shared-prefix" else 0).tolist()
        prompts = [(*prefix, *draw.choice(ids, int(length)).tolist()) for length in lengths]
    params = [ResolvedParams(int(limit), ignore_eos=family not in ENGLISH) for limit in limits]
    needs = max(len(prompt) + int(limit) - 1 for prompt, limit in zip(prompts, limits, strict=True))
    if needs > bound:
        raise InputError(f"max_positions={bound} is too small: the longest request of {name} needs {needs}")
    return Workload(name, seed, arrivals, tuple(map(WorkItem, prompts, params, due)))


def _arrivals(arrivals: str, n: int, rng: np.random.Generator) -> list[float]:
    with suppress(ValueError):  # from float and int
        match arrivals.split(":") if isinstance(arrivals, str) else ():
            case ["all"]:
                return [0.0] * n
            case ["poisson", rate] if 1e-6 <= float(rate) <= 1e6:
                return [0.0, *np.cumsum(rng.exponential(1 / float(rate), n - 1)).tolist()]
            case ["burst", size, gap] if int(size) >= 1 and 1e-6 <= float(gap) <= 1e6:
                return [i // int(size) * float(gap) for i in range(n)]
    bounds = "SIZE at least 1, RATE (a second) and GAP_S from 1e-6 to 1e6"
    raise InputError(f"arrivals={shown(arrivals)} must be all, poisson:RATE or burst:SIZE:GAP_S, {bounds}")


def _encode(text: str, tokenizer: Any) -> tuple[int, ...]:
    if not getattr(tokenizer, "chat_template", None):
        return tuple(tokenizer(text).input_ids)
    options = {"add_generation_prompt": True, "return_dict": False, "date_string": "1 Jan 2025"}  # not today
    return tuple(tokenizer.apply_chat_template([{"role": "user", "content": text}], **options))


def _chat_texts(n: int, rng: np.random.Generator) -> list[str]:
    """Return n distinct texts, of each kind one after the other, in drawn orders.

    A slot is drawn once a text, so {name} is one person throughout; of a story or survey the first sentence
    is kept and any of the others, in order.
    """
    texts: dict[str, None] = {}
    while len(texts) < n:
        for kind in rng.permutation(["ask", "code", "task", "story", "survey"]):
            fill = {slot: str(rng.choice(choices)) for slot, choices in _GRAMMAR.items()}
            if kind in ("story", "survey"):
                lead, *rest = _GRAMMAR[kind]
                kept = sorted(rng.permutation(len(rest))[: rng.integers(1, len(rest) + 1)])
                fill[kind] = " ".join([fill["read"] + "\n\n" + lead, *(rest[i] for i in kept)])
            texts[fill[kind].format_map(fill)] = None
    return list(texts)[:n]


_TEXT = """
@name Mara|Ines|Odile|Ruth|Nadia|Greta|Selma|Tess @town Linden|Brightwater|Saltmarsh|Eastfield|Old Mill
@season spring|summer|autumn|winter @few three|four|five|six|seven|nine @place the harbour|the station|the
library|the school @animal herons|otters|bats|owls|foxes|hares|toads @craft wooden toys|clay pots|paper
lamps|candles|leather bags @topic tides|vaccines|inflation|rainbows|earthquakes|solar panels|black holes
@reader a ten-year-old|a new colleague|my grandmother|a busy manager @lang Python|JavaScript|Rust|Go|Java
@job reverses a string|counts the words in a file|merges two sorted lists|checks whether brackets are balanced
@ask Explain {topic} to {reader}.|What should {reader} know about {topic}?|Why do {animal} hide in {season}?
@code Write a {lang} function that {job}.|Show me {few} unit tests for a {lang} function that {job}. One of
them must pass an empty input.|My {lang} function {job}, but it is slow. What should I measure?
@task Write a short, friendly email to {reader} to move our talk about {topic} from Monday to Friday.|Give me
a plan in {few} steps to sell {craft} at {place}. For each step, say what it costs and what could go
wrong.|Make a packing list for {few} days in {town} in {season}. Group it by clothes, papers and food.
@read Summarise this in one sentence.|Rewrite this for {reader}.|Continue this in the same voice.
@story On the first day of {season}, {name} found a small brass key under the steps of {place}.|She asked
everyone in {town}, but nobody had lost a key.|That night it rained, and the lamps went out one after
another.|In the morning there was a note on her door, with nothing on it but a drawing of {few} {animal}.
@survey {name} has counted the {animal} around {town} every {season} since she left school.|She starts before
sunrise at {place}, because the noise of the traffic makes the work harder later in the day.|In the first year
she saw only {few}, and a local paper wrote that they would soon be gone.|Since then a group of volunteers has
cleared two ponds, planted a hedge and asked farmers to mow a month later.|A shop that sells {craft} pays for
the tools with a small part of what it earns.|Not everybody is pleased: some residents say that the new fences
block the shortest way to {place}.|A public meeting ended without a decision, but both sides agreed to share
their figures.|Last year the count was the highest so far, although mild weather may explain part of the
rise.|{name} warns that one good year proves little, and wants to see at least {few} more before she draws any
conclusion.|The next report will appear at the end of the year, and anyone may read it free of charge.
"""
_GRAMMAR = {key: body.split("|") for key, body in re.findall(r"@(\w+) ([^@]*[^@ ])", " ".join(_TEXT.split()))}
