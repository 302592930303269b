"""Workloads: the same arguments give the same work, within the bounds that their names promise."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from engine.bench.workload import NAMES, Workload, check_workload, make_workload
from engine.bench.workload_texts import WORDS
from engine.errors import InputError

BOUNDS = {  # family -> shortest and longest prompt, fewest and most new tokens
    "chat": (12, 260, 8, 64),
    "paper": (128, 128, 256, 256),
    "mixed": (12, 260, 8, 64),
    "shared-prefix": (272, 320, 8, 32),
    "brief": (12, 260, 8, 24),
    "nano": (100, 1024, 100, 1024),
}
FAMILIES = st.sampled_from(sorted(BOUNDS))


class CharTokenizer:
    """One id a character, so that a test can read the texts back; `special` ids must not be drawn."""

    def __init__(self, chat_template: str | None = None, special: tuple[int, ...] = ()) -> None:
        self.chat_template, self.all_special_ids = chat_template, list(special)

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(char) for char in text])

    def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> list[int]:
        assert options["add_generation_prompt"] is True
        assert options["return_dict"] is False
        return [ord(char) for char in f"<user>{messages[0]['content']}<assistant>"]


def ids(work: Workload) -> list[tuple[int, ...]]:
    assert all(isinstance(item.prompt, tuple) for item in work.items)
    return [tuple(int(token) for token in item.prompt) for item in work.items]


def lengths(work: Workload) -> list[int]:
    return [len(item.prompt) for item in work.items]


def limits(work: Workload) -> list[int]:
    return [item.params.max_new_tokens for item in work.items]


def dues(work: Workload) -> list[float]:
    return [item.arrival_s for item in work.items]


def test_every_family_is_described() -> None:
    assert {name.removesuffix("-N") for name in NAMES} == set(BOUNDS)


@given(FAMILIES, st.integers(1, 40), st.integers(2, 3000), st.integers(0, 2**40))
def test_bounds_and_purity(family: str, n: int, vocab_size: int, seed: int) -> None:
    name = f"{family}-{n}"
    work = make_workload(name, vocab_size=vocab_size, seed=seed, arrivals="poisson:3")
    assert work == make_workload(name, vocab_size=vocab_size, seed=seed, arrivals="poisson:3")
    assert (work.name, work.seed, work.arrivals, len(work.items)) == (name, seed, "poisson:3", n)
    shortest, longest, fewest, most = BOUNDS[family]
    assert all(shortest <= length <= longest for length in lengths(work))
    assert all(fewest <= limit <= most for limit in limits(work))
    for prompt in ids(work):
        assert min(10, vocab_size // 2) <= min(prompt) <= max(prompt) < vocab_size
    for item in work.items:
        assert all(type(token) is int for token in item.prompt)
        assert type(item.arrival_s) is float
        assert item.params.ignore_eos == (family not in ("chat", "brief"))
        assert item.params.temperature == 0.0


@given(FAMILIES, st.integers(1, 20), st.integers(0, 1000), st.sampled_from(["poisson:2.5", "burst:3:0.5"]))
def test_one_change_moves_nothing_else(family: str, n: int, seed: int, arrivals: str) -> None:
    base = make_workload(f"{family}-{n}", vocab_size=256, seed=seed)
    later = make_workload(f"{family}-{n}", vocab_size=256, seed=seed, arrivals=arrivals)
    assert [dataclasses.replace(item, arrival_s=0.0) for item in later.items] == list(base.items)
    assert dues(later) == sorted(dues(later))
    assert dues(later)[0] == 0.0
    other_words = make_workload(f"{family}-{n}", vocab_size=50_000, seed=seed, arrivals=arrivals)
    assert (lengths(other_words), limits(other_words)) == (lengths(base), limits(base))
    assert dues(other_words) == dues(later)


@pytest.mark.parametrize("family", sorted(BOUNDS))
def test_another_seed_is_other_work_with_distinct_prompts(family: str) -> None:
    one, two = (
        make_workload(f"{family}-32", vocab_size=1000, seed=seed, arrivals="poisson:1") for seed in (0, 1)
    )
    assert len({*ids(one), *ids(two)}) == 64
    assert dues(one) != dues(two)


def test_the_same_in_another_process() -> None:
    work = "make_workload('chat-9', vocab_size=300, arrivals='poisson:1')"
    probe = f"from engine.bench.workload import make_workload; print({work})"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(make_workload("chat-9", vocab_size=300, arrivals="poisson:1"))


@pytest.mark.parametrize("n", [1, 32, 2000])
def test_chat_texts_are_distinct_whole_sentences(n: int) -> None:
    work = make_workload(f"chat-{n}", vocab_size=256, tokenizer=CharTokenizer())
    texts = ["".join(map(chr, prompt)) for prompt in ids(work)]
    assert len(set(texts)) == n
    for text in texts:
        assert text[0].isupper()
        assert text[-1] in ".?"
        assert text.isascii()
        assert not set("{}@|") & set(text)
        assert "  " not in text
    if n >= 32:
        assert min(map(len, texts)) < 60
        assert max(map(len, texts)) > 700
        assert limits(work) == limits(make_workload(f"chat-{n}", vocab_size=999)), (
            "a tokenizer moved the limits"
        )


def test_brief_asks_what_chat_asks() -> None:
    brief, chat = (make_workload(f"{family}-9", vocab_size=300) for family in ("brief", "chat"))
    assert lengths(brief) == lengths(chat)
    texts = [
        make_workload(f"{family}-9", vocab_size=300, tokenizer=CharTokenizer())
        for family in ("brief", "chat")
    ]
    assert ids(texts[0]) == ids(texts[1])


def test_chat_goes_through_the_template() -> None:
    plain = make_workload("chat-8", vocab_size=256, tokenizer=CharTokenizer())
    chat = make_workload("chat-8", vocab_size=256, tokenizer=CharTokenizer(chat_template="any"))
    before, after = tuple(map(ord, "<user>")), tuple(map(ord, "<assistant>"))
    assert ids(chat) == [before + prompt + after for prompt in ids(plain)]


def test_what_a_prompt_was_made_from_is_kept_with_it() -> None:
    for template, kind in ((None, str), ("any", tuple)):
        work = make_workload("chat-3", vocab_size=256, tokenizer=CharTokenizer(chat_template=template))
        assert all(isinstance(item.source, kind) for item in work.items)
    texts = ["".join(map(chr, prompt)) for prompt in ids(work)]
    assert [f"<user>{item.source[0]['content']}<assistant>" for item in work.items] == texts
    assert {item.source for item in make_workload("chat-3", vocab_size=256).items} == {None}
    assert {item.source for item in make_workload("mixed-3", vocab_size=256).items} == {None}


def test_nano_has_the_lengths_of_nano_vllm() -> None:
    """Its published run of 256 requests has 142,827 tokens in and 133,966 out."""
    work = make_workload("nano-256", vocab_size=300)
    assert (sum(lengths(work)), sum(limits(work))) == (142_827, 133_966)
    assert (lengths(work)[:3], limits(work)[:3]) == ([964, 724, 484], [845, 312, 607])


# Without a model


@pytest.mark.parametrize("family", sorted(BOUNDS))
def test_without_a_model_prompts_are_text_of_as_many_words(family: str) -> None:
    text, tokens = (make_workload(f"{family}-8", vocab_size=size, seed=2) for size in (None, 999))
    assert text == make_workload(f"{family}-8", seed=2)
    assert (text.name, limits(text), dues(text)) == (tokens.name, limits(tokens), dues(tokens))
    assert all(isinstance(item.prompt, str) for item in text.items)
    if family in ("chat", "brief"):
        spoken = make_workload(f"{family}-8", vocab_size=256, seed=2, tokenizer=CharTokenizer())
        assert [item.prompt for item in text.items] == ["".join(map(chr, prompt)) for prompt in ids(spoken)]
        assert [item.source for item in text.items] == [
            ({"role": "user", "content": item.prompt},) for item in text.items
        ]
        return
    words = [item.prompt.split(" ") for item in text.items]
    assert [len(prompt) for prompt in words] == lengths(tokens)
    assert {word for prompt in words for word in prompt} <= set(WORDS)
    assert [item.source for item in text.items] == [item.prompt for item in text.items]
    assert len({tuple(prompt[-16:]) for prompt in words}) == 8
    assert (len({tuple(prompt[:256]) for prompt in words}) == 1) == (family == "shared-prefix")


def test_words_are_common_and_short() -> None:
    assert len(WORDS) == len(set(WORDS)) > 150
    assert all(word.isalpha() and word.islower() and 2 <= len(word) <= 6 for word in WORDS)


def test_text_has_no_known_length_in_tokens() -> None:
    work = make_workload("mixed-3")
    for call in (work.lengths, lambda: work.whole_prompt(0, [])):
        with pytest.raises(InputError, match=r"items\[0\].prompt is text, of no known tokens: make the"):
            call()
    with pytest.raises(InputError, match="max_positions=9 is of tokens, and without vocab_size"):
        make_workload("mixed-3", max_positions=9)


def test_mixed_is_log_normal() -> None:
    work = make_workload("mixed-20000", vocab_size=256)
    prompts, outputs = np.array(lengths(work)), np.array(limits(work))
    assert abs(np.median(prompts) - 70) <= 2
    assert abs(np.median(outputs) - 28) <= 1
    quartiles = np.subtract(*np.percentile(np.log(prompts), [75, 25]))
    assert quartiles == pytest.approx(2 * 0.6745 * 0.8, rel=0.05)
    assert np.mean((prompts > 12) & (prompts < 260)) > 0.9
    assert abs(np.corrcoef(prompts, outputs)[0, 1]) < 0.05


def test_shared_prefix_is_shared_and_the_rest_is_not() -> None:
    prompts = ids(make_workload("shared-prefix-16", vocab_size=5000))
    assert len({prompt[:256] for prompt in prompts}) == 1
    assert len({prompt[256:] for prompt in prompts}) == 16


def test_special_ids_are_never_drawn() -> None:
    special = tuple(range(0, 256, 2))
    for name in ("paper-8", "mixed-8", "shared-prefix-8"):
        work = make_workload(name, vocab_size=256, tokenizer=CharTokenizer(special=special))
        assert not {token for prompt in ids(work) for token in prompt} & set(special)


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(dues(make_workload("mixed-2000", vocab_size=256, seed=3, arrivals="poisson:4")))
    assert gaps.mean() == pytest.approx(0.25, rel=0.1)
    assert gaps.std() == pytest.approx(0.25, rel=0.15)


def test_bursts() -> None:
    bursts = make_workload("mixed-7", vocab_size=256, arrivals="burst:3:0.5")
    assert dues(bursts) == [0, 0, 0, 0.5, 0.5, 0.5, 1.0]
    assert dues(make_workload("mixed-3", vocab_size=256)) == [0, 0, 0]


BAD_NAMES = ["", None, "chat", "chat-0", "chat-", "chat--1", "chat-08", "chat-1e3", "Chat-3", "chat-1000000",
             "paper-3.0", "prefix-3", "chat-3\n", "chat-N"]  # fmt: skip
BAD_ARRIVALS = ["", None, "none", "trace", "all:1", "poisson", "poisson:", "poisson:0", "poisson:-1",
                "poisson:nan", "poisson:inf", "poisson:1:2", "burst:3", "burst:0:1", "burst:1.5:1",
                "burst:2:0", "burst:2:nan"]  # fmt: skip
BAD_NUMBERS = [("vocab_size", 1), ("vocab_size", 2.5), ("vocab_size", True), ("seed", -1), ("seed", None),
               ("max_positions", 0), ("max_positions", "9")]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(name: str) -> None:
    for call in (check_workload, make_workload):
        with pytest.raises(InputError, match="must be one of chat-N, paper-N, mixed-N, shared-prefix-N"):
            call(name)


@pytest.mark.parametrize("arrivals", BAD_ARRIVALS)
def test_bad_arrivals(arrivals: str) -> None:
    for call in (check_workload, make_workload):
        with pytest.raises(InputError, match="poisson:RATE"):
            call("mixed-3", arrivals=arrivals)


@pytest.mark.parametrize(("field", "value"), BAD_NUMBERS)
def test_bad_numbers_name_the_field_and_the_bound(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{field}={value!r} must be a whole number of at least"):
        make_workload("mixed-3", **{"vocab_size": 256, field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", sorted(BOUNDS))
def test_max_positions_is_exact(family: str) -> None:
    work = make_workload(f"{family}-8", vocab_size=256)
    needs = max(map(sum, zip(lengths(work), limits(work), strict=True))) - 1
    assert make_workload(f"{family}-8", vocab_size=256, max_positions=needs) == work
    with pytest.raises(InputError, match=rf"max_positions={needs - 1} is too small.* needs {needs}"):
        make_workload(f"{family}-8", vocab_size=256, max_positions=needs - 1)


def test_no_torch_behind_the_module() -> None:
    probe = "import sys, engine.bench.workload; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", probe], check=True)
