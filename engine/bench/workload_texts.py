"""The English of workloads: a small grammar of questions and tasks, and common words for what is random."""

from __future__ import annotations

import re

import numpy as np


def chat_texts(n: int, rng: np.random.Generator) -> list[str]:
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
# Short ones, of which nearly each is a token with the blank before it (1.03 in SmolLM2's vocabulary).
WORDS = tuple(dict.fromkeys(re.findall(r"(?<![{@\w])[a-z]{2,6}(?![}\w])", _TEXT)))
