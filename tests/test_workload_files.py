"""Workloads from files: three formats, each row as it is written, and the first fault told by its line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from engine import InputError, LoadedModel, SamplingParams, WorkItem
from engine.bench.workload import Workload, check_workload, make_workload
from engine.bench.workload_texts import WORDS
from tests.test_detokenizer import byte_level

DATA = Path(__file__).parent / "data"
SHAREGPT, MOONCAKE = str(DATA / "sharegpt.json"), str(DATA / "mooncake.jsonl")
TEMPLATE = (
    "<eos>{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: Any, name: str = "mine.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return write


def speaking(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(byte_level(257))
    tokenizer.chat_template = template
    return tokenizer


def text_of(tokenizer: PreTrainedTokenizerFast, item: WorkItem) -> str:
    return str(tokenizer.decode(item.prompt))


def facts(work: Workload) -> list[tuple[int, int | None, float]]:
    return [(item.params.max_new_tokens, item.follows, item.arrival_s) for item in work.items]


# Our own rows


def test_own_rows_are_asked_as_they_are_written(write: Write) -> None:
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    file = write(
        {"prompt": "Once upon", "output_tokens": 3},
        {"messages": said, "output_tokens": 5},
        "",
        {"token_ids": [7, 250, 7], "output_tokens": 1},
    )
    tokenizer = speaking()
    work = make_workload(file, vocab_size=257, tokenizer=tokenizer)
    assert (work.arrivals, facts(work)) == ("all", [(3, None, 0.0), (5, None, 0.0), (1, None, 0.0)])
    assert text_of(tokenizer, work.items[0]) == "Once upon"  # as it is: messages alone take the template
    assert text_of(tokenizer, work.items[1]) == "<eos>[system]Be kind.<eos>\n[user]Hi<eos>\n[assistant]"
    assert work.items[2].prompt == (7, 250, 7)
    assert [item.source for item in work.items] == ["Once upon", tuple(said), None]
    assert all(item.params == SamplingParams(n, ignore_eos=True).resolved({}) for item, n in
               zip(work.items, (3, 5, 1), strict=True))  # fmt: skip
    text = make_workload(file)
    assert [item.prompt for item in text.items] == ["Once upon", "Be kind.\n\nHi", (7, 250, 7)]
    assert [item.source for item in text.items] == [item.source for item in work.items]


def test_without_a_chat_template_messages_are_plain_text(write: Write) -> None:
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    tokenizer, row = speaking(None), {"messages": said, "output_tokens": 5, "conversation": 1}
    items = make_workload(write(row, row), vocab_size=257, tokenizer=tokenizer).items
    texts = ["Be kind.\n\nHi", "\n\nBe kind.\n\nHi"]
    assert [text_of(tokenizer, item) for item in items] == [item.source for item in items] == texts


def test_rows_of_a_conversation_follow_each_other_with_what_the_template_puts_between(write: Write) -> None:
    def row(text: str, out: int, talk: object, **more: object) -> dict[str, object]:
        message = {"role": "user", "content": text}
        return {"messages": [message], "output_tokens": out, "conversation": talk, **more}

    file = write(
        row("One?", 2, "a", timestamp=100.5), row("Other?", 3, 7, timestamp=101), row("Two?", 4, "a"),
        row("Three?", 5, "a", delay=1.5), row("More?", 6, 7, delay=0),
    )  # fmt: skip
    tokenizer = speaking()
    work = make_workload(file, vocab_size=257, tokenizer=tokenizer)
    assert work.arrivals == "trace"
    assert facts(work) == [(2, None, 0.0), (3, None, 0.5), (4, 0, 0.0), (5, 2, 1.5), (6, 1, 0.0)]
    assert [text_of(tokenizer, item) for item in work.items] == [
        "<eos>[user]One?<eos>\n[assistant]", "<eos>[user]Other?<eos>\n[assistant]",
        "<eos>\n[user]Two?<eos>\n[assistant]", "<eos>\n[user]Three?<eos>\n[assistant]",
        "<eos>\n[user]More?<eos>\n[assistant]",
    ]  # fmt: skip
    assert work.items[3].source == ({"role": "user", "content": "Three?"},)
    answers = [[9] * item.params.max_new_tokens for item in work.items]
    first, _, second, third, _ = [tuple(item.prompt) for item in work.items]
    assert work.whole_prompt(3, answers) == (*first, 9, 9, *second, 9, 9, 9, 9, *third)
    assert work.whole_prompt(0, answers) == first
    lengths = [(len(work.whole_prompt(i, answers)), len(answers[i])) for i in range(5)]
    assert work.lengths() == lengths

    at_once = make_workload(file, arrivals="all")
    assert (at_once.arrivals, [item.arrival_s for item in at_once.items]) == ("all", [0.0] * 5)
    bursts = make_workload(file, arrivals="burst:1:2")
    assert [item.arrival_s for item in bursts.items] == [0.0, 2.0, 0.0, 1.5, 0.0]
    assert [item.source for item in bursts.items] == [item.source for item in work.items]


def test_text_and_ids_go_on_as_they_are(write: Write) -> None:
    file = write(
        {"prompt": "One, two,", "output_tokens": 1, "conversation": 1},
        {"prompt": " four", "output_tokens": 1, "conversation": 1},
        {"token_ids": [5, 6], "output_tokens": 1, "conversation": 2},
        {"token_ids": [0], "output_tokens": 1, "conversation": 2},
    )

    class Beginning:
        """Begins every text with 1, as of Llama, unless told not to."""

        chat_template = None

        def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(char) for char in text])

    work = make_workload(file, vocab_size=256, tokenizer=Beginning())
    assert [item.prompt for item in work.items] == [
        (1, *map(ord, "One, two,")), tuple(map(ord, " four")), (5, 6), (0,)
    ]  # fmt: skip
    assert [item.follows for item in work.items] == [None, 0, None, 2]


def test_a_conversation_s_ids_are_those_of_the_whole_rendered_at_once(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    work = make_workload(SHAREGPT, vocab_size=49152, tokenizer=tokenizer)
    said = json.loads(Path(SHAREGPT).read_text())[0]["conversations"]
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": turn["value"]} for role, turn in zip(roles, said[:3], strict=True)]
    answers = [tokenizer(said[1]["value"]).input_ids, []]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(work.whole_prompt(1, answers)) == expected


def test_a_template_that_changes_answers_is_refused(write: Write) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}], "output_tokens": 1, "conversation": 1}] * 2
    twice = TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] * 2 }}")
    with pytest.raises(InputError, match=r"line 2: messages can't follow: the chat template does not show"):
        make_workload(write(*rows), vocab_size=257, tokenizer=speaking(twice))
    strict = "{{ raise_exception('no such role') }}"
    with pytest.raises(InputError, match=r"line 1: messages is text that .* can't encode: .*no such role"):
        make_workload(write(*rows), vocab_size=257, tokenizer=speaking(strict))


# ShareGPT


def test_sharegpt_conversations_go_as_far_as_questions_have_answers() -> None:
    tokenizer = speaking()
    work = make_workload(SHAREGPT, vocab_size=257, tokenizer=tokenizer)
    answers = ["The holly keeps its leaves all year.", "The oak loses its leaves in autumn.",
               "Three times as deep as it is high.", "Yellow.", "Yellow, too.", "Really."]  # fmt: skip
    follows = [None, 0, None, None, 3, 4]
    assert facts(work) == [
        (len(tokenizer(answer).input_ids), before, 0.0)
        for answer, before in zip(answers, follows, strict=True)
    ]
    texts = [text_of(tokenizer, item) for item in work.items]
    assert texts[2] == "<eos>[user]How deep should I plant a bulb?<eos>\n[assistant]"
    assert texts[3] == (
        "<eos>[system]You answer in one word.<eos>\n[user]What colour is a ripe lemon?<eos>\n[assistant]"
    )
    assert texts[4] == "<eos>\n[user]A lime?\n\nA ripe one, I mean.<eos>\n[assistant]"
    assert (work.arrivals, {item.params.ignore_eos for item in work.items}) == ("all", {True})
    text = make_workload(SHAREGPT, tokenizer=tokenizer)
    assert facts(text) == facts(work)
    assert text.items[4].prompt == "\n\nA lime?\n\nA ripe one, I mean."
    assert [item.source for item in text.items] == [item.source for item in work.items]


def test_sharegpt_needs_a_tokenizer() -> None:
    with pytest.raises(InputError, match=r"record 1: a recorded answer .* give a tokenizer$"):
        make_workload(SHAREGPT)
    with pytest.raises(InputError, match="record 1: messages is text, but the model has no tokenizer"):
        make_workload(SHAREGPT, vocab_size=256)
    assert check_workload(SHAREGPT) is True


def test_sharegpt_may_be_lines_too(write: Write) -> None:
    file = write(*json.loads(Path(SHAREGPT).read_text()))
    tokenizer = speaking()
    one, two = (make_workload(name, vocab_size=257, tokenizer=tokenizer) for name in (SHAREGPT, file))
    assert one.items == two.items
    assert one.name != two.name


# Mooncake


def test_mooncake_rows_share_the_tokens_of_equal_blocks() -> None:
    work = make_workload(MOONCAKE, vocab_size=1000)
    assert work.arrivals == "trace"
    assert [item.params.max_new_tokens for item in work.items] == [12, 3, 7, 1]
    assert [item.arrival_s for item in work.items] == pytest.approx([0.0, 0.0, 3.052, 3.5])
    prompts = [tuple(item.prompt) for item in work.items]
    assert [len(prompt) for prompt in prompts] == [700, 1030, 1024, 24]
    assert prompts[0][:512] == prompts[1][:512]
    assert prompts[1][:1024] == prompts[2]
    assert len({*prompts[0][512:536], *prompts[1][512:536], *prompts[3]}) > 60  # other ids, other tokens
    assert all(10 <= token < 1000 and type(token) is int for prompt in prompts for token in prompt)
    assert all(item.source is None for item in work.items)
    assert work == make_workload(MOONCAKE, vocab_size=1000)
    other = make_workload(MOONCAKE, vocab_size=1000, seed=1)
    assert other.items[0].prompt[:24] != work.items[0].prompt[:24]


def test_mooncake_rows_without_a_model_are_as_many_words() -> None:
    work = make_workload(MOONCAKE)
    words = [item.prompt.split(" ") for item in work.items]
    assert [len(prompt) for prompt in words] == [700, 1030, 1024, 24]
    assert words[1][:1024] == words[2]
    assert {word for prompt in words for word in prompt} <= set(WORDS)
    assert [item.source for item in work.items] == [item.prompt for item in work.items]


# Names, times and limits


def test_a_file_of_another_content_has_another_name(write: Write) -> None:
    row = {"token_ids": [3], "output_tokens": 1}
    names = [make_workload(write(row, name=name), vocab_size=9).name for name in ("a.jsonl", "b.jsonl")]
    assert names[0].replace("a.jsonl", "b.jsonl") == names[1]
    assert names[0].startswith("a.jsonl@")
    assert make_workload(write({**row, "output_tokens": 2}), vocab_size=9).name.split("@")[1] not in names[0]


def test_a_path_needs_no_ending_and_may_begin_with_a_mark(write: Write, tmp_path: Path) -> None:
    file = write("\ufeff" + '{"token_ids": [3], "output_tokens": 1}\r', name="rows")
    assert make_workload(file, vocab_size=9).items[0].prompt == (3,)


def test_poisson_is_when_conversations_begin(write: Write) -> None:
    rows = [{"token_ids": [3], "output_tokens": 1, "conversation": talk} for talk in "abacb"]
    work = make_workload(write(*rows), vocab_size=9, arrivals="poisson:2")
    due = [item.arrival_s for item in work.items]
    assert due[0] == due[2] == due[4] == 0.0
    assert 0 < due[1] < due[3]


def test_what_a_model_has_not_is_told_by_the_line(write: Write) -> None:
    row = {"token_ids": [3, 4, 5], "output_tokens": 4}
    talk = [{**row, "conversation": 1}] * 3
    file = write(row, *talk)
    assert make_workload(file, vocab_size=9, max_positions=20)  # 3 * (3 + 4), and the last is not fed back
    told = r"needs 20; 1 of 4 need too many, the first at .*mine.jsonl, line 4: leave them out"
    with pytest.raises(InputError, match=rf"max_positions=19 is too small: the longest .* {told}"):
        make_workload(file, vocab_size=9, max_positions=19)
    with pytest.raises(
        InputError, match=r"line 2: token_ids has token id 9; the ids of the model are 0 to 8"
    ):
        make_workload(write(row, {**row, "token_ids": [9]}), vocab_size=9)
    with pytest.raises(
        InputError, match=r"line 1: prompt is text, but the model has no tokenizer: give token"
    ):
        make_workload(write({"prompt": "a", "output_tokens": 1}), vocab_size=9)
    with pytest.raises(
        InputError, match="max_positions=9 is of tokens, and without vocab_size prompts are text"
    ):
        make_workload(file, max_positions=9)
