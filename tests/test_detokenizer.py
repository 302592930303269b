"""The text stream: its pieces are the text of all tokens, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.detokenizer import TextStream

BROKEN = "\N{REPLACEMENT CHARACTER}"
CORPUS = [
    "the quick brown fox jumps over the lazy dog, then the end. END of text\n",
    "aab aab aab abab abab bab bab ba ba cab cab abc abc aabc",
    "naïve café e\u0301 日本語のテキスト 日本語 🙂🙂 👩\u200d👩\u200d👧",
]
CHARACTERS = "the endn ,.\né日本🙂👩🇩🇪e\u0301\u200d\ufe0f" + BROKEN  # flags, joiners and marks come in parts
TEXTS = st.one_of(st.text(max_size=30), st.text(st.sampled_from(CHARACTERS), max_size=40))
modest = settings(max_examples=2 * settings().max_examples)
many = settings(max_examples=5 * settings().max_examples)


@cache
def byte_level(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2 and Qwen2: a token is any run of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece's way: words begin with a visible space, and decoding strips the first one."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<eos>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """As of Llama 2: letters and spaces have tokens, everything else is spelt in bytes."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz,.\n"]
    words = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocab = {word: token for token, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def pieces_of(stream: TextStream, ids: Sequence[int]) -> list[str]:
    """One piece a token, and the one of the flush last."""
    return [*(stream.push(token) for token in ids), stream.flush()]


def settled_texts(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """The text known after each token, less a last character that may be unfinished, and after the flush."""
    texts = [""]
    for count in range(1, len(ids) + 1):
        text = decoded(tokenizer, ids[:count])
        texts.append(texts[-1] if text.endswith(BROKEN) else text)
    return [*texts[1:], decoded(tokenizer, ids)]


def stopped_by(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], stop: Sequence[str]
) -> tuple[str, str | None]:
    """The reference: text up to the first match in the first settled text that has one, and its string."""
    for text in settled_texts(tokenizer, ids):
        hits = [(text.index(string), string) for string in stop if string in text]
        if hits:
            at, string = min(hits)
            return text[:at], string
    return decoded(tokenizer, ids), None


def check_plain(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> None:
    stream = TextStream(tokenizer)
    pieces = pieces_of(stream, ids)
    assert "".join(pieces) == decoded(tokenizer, ids)
    assert stream.text == "".join(pieces)
    assert stream.stopped is None
    assert not any(piece.endswith(BROKEN) for piece in pieces[:-1])


@pytest.mark.parametrize("tokenizer", [byte_level(257), byte_level(400)], ids=["bytes", "merges"])
@modest
@given(text=TEXTS)
def test_pieces_of_byte_level_bpe_add_up_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert decoded(tokenizer, ids) == text
    check_plain(tokenizer, ids)


@modest
@given(data=st.data())
@pytest.mark.parametrize("tokenizer", [byte_level(257), byte_level(400)], ids=["bytes", "merges"])
def test_pieces_of_arbitrary_ids_add_up_to_the_text(tokenizer, data):
    """Most such ids are no valid UTF-8; some are special tokens."""
    multibyte = [token for token in range(len(tokenizer)) if decoded(tokenizer, [token]).count(BROKEN)]
    token = st.one_of(st.integers(0, len(tokenizer) - 1), st.sampled_from([*multibyte, 0]))
    check_plain(tokenizer, data.draw(st.lists(token, max_size=40)))


@modest
@given(st.lists(st.integers(0, 1000), max_size=40), TEXTS)
def test_pieces_of_metaspace_add_up_to_the_text(ids, text):
    tokenizer = metaspace()
    check_plain(tokenizer, [token % len(tokenizer) for token in ids])
    check_plain(tokenizer, tokenizer.encode(text))


@modest
@given(TEXTS)
def test_pieces_of_byte_fallback_add_up_to_the_text(text):
    ids = byte_fallback().encode(text)
    assert decoded(byte_fallback(), ids) == text
    check_plain(byte_fallback(), ids)


@pytest.mark.parametrize("tokenizer", [byte_level(400), metaspace()], ids=["byte_level", "metaspace"])
@pytest.mark.parametrize("count", [1, 5, 6, 7, 20])
def test_special_tokens_in_between_add_nothing(tokenizer, count):
    """More of them than the context holds, too."""
    eos, fox = tokenizer.eos_token_id, tokenizer.encode("the fox")
    check_plain(tokenizer, [eos] * count + fox + [eos] * count + fox + [eos] * count)


def test_a_character_comes_whole_with_its_last_token():
    tokenizer = byte_level(257)
    smile = tokenizer.encode("🙂")
    assert len(smile) == 4
    assert pieces_of(TextStream(tokenizer), smile * 2) == ["", "", "", "🙂"] * 2 + [""]


def test_an_unfinished_character_comes_with_the_flush():
    tokenizer = byte_level(257)
    ids = tokenizer.encode("a🙂")[:-1]
    assert pieces_of(TextStream(tokenizer), ids) == ["a", "", "", "", BROKEN]


def test_text_is_not_held_without_reason():
    """Without stop strings each token of whole characters is given out at once."""
    tokenizer = byte_level(400)
    ids = tokenizer.encode("the quick brown fox, the end. END")
    assert pieces_of(TextStream(tokenizer), ids) == [*(decoded(tokenizer, [token]) for token in ids), ""]


def test_the_first_space_is_stripped_and_no_other():
    tokenizer = metaspace()
    ids = tokenizer.encode("the fox") + tokenizer.encode("the dog")
    assert "".join(pieces_of(TextStream(tokenizer), ids)) == "the fox the dog"


@cache
def letter_ids() -> list[int]:
    """The ids whose text is made of a few letters only, alone and merged: their sequences often match."""
    tokenizer = byte_level(400)
    return [token for token in range(1, len(tokenizer)) if set(decoded(tokenizer, [token])) <= set("abc ")]


def test_there_are_tokens_of_one_letter_and_of_several():
    assert {1, 2, 3} <= {len(decoded(byte_level(400), [token])) for token in letter_ids()}


letters = st.lists(st.sampled_from(letter_ids()), max_size=25)
stops = st.lists(st.text("abc ", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)


@many
@given(letters, stops)
def test_text_is_cut_at_the_earliest_match(ids, stop):
    tokenizer, stream = byte_level(400), TextStream(byte_level(400), stop)
    text, stopped = stopped_by(tokenizer, ids, stop)
    assert "".join(pieces_of(stream, ids)) == text
    assert stream.text == text
    assert stream.stopped == stopped


@many
@given(letters, stops)
def test_what_could_become_a_stop_string_is_held_and_nothing_else(ids, stop):
    tokenizer, stream = byte_level(400), TextStream(byte_level(400), stop)
    for count, token in enumerate(ids, start=1):
        stream.push(token)
        text = decoded(tokenizer, ids[:count])
        if stream.stopped is not None:
            break
        beginnings = {string[:size] for string in stop for size in range(1, len(string))}
        held = max((len(end) for end in beginnings if text.endswith(end)), default=0)
        assert stream.text == text[: len(text) - held]
    assert not any(string in stream.text for string in stop)


@modest
@given(
    text=TEXTS,
    stop=st.lists(TEXTS.map(lambda text: text[:3]).filter(bool), min_size=1, max_size=3).map(tuple),
)
@pytest.mark.parametrize(
    "tokenizer", [byte_level(257), metaspace(), byte_fallback()], ids=["bytes", "meta", "fallback"]
)
def test_stop_strings_of_any_characters(tokenizer, text, stop):
    ids, stream = tokenizer.encode(text), TextStream(tokenizer, (*stop, text[5:7] or "x"))
    text, stopped = stopped_by(tokenizer, ids, (*stop, text[5:7] or "x"))
    assert "".join(pieces_of(stream, ids)) == text
    assert stream.stopped == stopped


def spell(text: str) -> list[int]:
    """One token a character."""
    tokenizer = byte_level(400)
    ids = [token for char in text for token in tokenizer.encode(char)]
    assert len(ids) == len(text)
    return ids


@pytest.mark.parametrize(
    ("text", "stop", "pieces", "stopped"),
    [
        ("aaab", ("aab",), ["", "", "a", ""], "aab"),
        ("aacaab", ("aab",), ["", "", "aac", "", "", ""], "aab"),
        ("ababac", ("abac",), ["", "", "", "ab", "", ""], "abac"),
        ("cab", ("ab",), ["c", "", ""], "ab"),
        ("abc", ("abc", "b"), ["", "a"], "b"),
        ("abx", ("abc", "bx"), ["", "", "a"], "bx"),
        ("aa", ("a",), [""], "a"),
        ("abcd", ("cd", "abcd"), ["", "", "", ""], "abcd"),
        ("xxab", ("ab", "b"), ["x", "x", "", ""], "ab"),
    ],
)
def test_stop_string_spelt_in_single_letters(text, stop, pieces, stopped):
    stream = TextStream(byte_level(400), stop)
    given_out = []
    for token in spell(text):
        given_out.append(stream.push(token))
        if stream.stopped is not None:
            break
    assert given_out == pieces
    assert stream.stopped == stopped


def token_of(text: str) -> int:
    ids = byte_level(400).encode(text)
    assert len(ids) == 1
    return ids[0]


@pytest.mark.parametrize(
    ("stop", "given_out", "stopped"),
    [
        (("the",), "", "the"),
        (("h",), "t", "h"),
        (("e",), "th", "e"),
        (("e", "h"), "t", "h"),
        (("he", "e"), "t", "he"),
        (("h", "he"), "t", "h"),
    ],
)
def test_stop_string_inside_one_token(stop, given_out, stopped):
    stream = TextStream(byte_level(400), stop)
    assert stream.push(token_of("the")) == given_out
    assert stream.stopped == stopped


def test_stop_string_across_tokens():
    stream = TextStream(byte_level(400), ("he f",))
    assert [stream.push(token) for token in [token_of("the"), *spell(" fox")]] == ["t", "", "", "", ""]
    assert stream.stopped == "he f"


def test_stop_string_across_bytes_of_a_character():
    tokenizer = byte_level(257)
    stream = TextStream(tokenizer, ("日本",))
    assert "".join(pieces_of(stream, tokenizer.encode("a日日本語"))) == "a日"
    assert stream.stopped == "日本"


def test_nothing_comes_after_a_stop_string():
    stream = TextStream(byte_level(400), ("b",))
    assert pieces_of(stream, spell("abcab")) == ["a", "", "", "", "", ""]
    assert stream.text == "a"
    assert stream.stopped == "b"


def test_flush_gives_the_beginning_of_a_stop_string_that_never_ended():
    stream = TextStream(byte_level(400), ("abc",))
    assert pieces_of(stream, spell("cab")) == ["c", "", "", "ab"]
    assert stream.stopped is None


def test_flush_finds_a_stop_string_in_what_it_settles():
    tokenizer = byte_level(257)
    stream = TextStream(tokenizer, (BROKEN,))
    assert pieces_of(stream, tokenizer.encode("a日")[:-1]) == ["a", "", "", ""]
    assert stream.stopped == BROKEN


def test_flushing_twice_adds_nothing():
    stream = TextStream(byte_level(400), ("abc",))
    assert "".join(pieces_of(stream, spell("xab"))) == "xab"
    assert stream.flush() == ""
    assert stream.text == "xab"


def test_flush_of_nothing_is_nothing():
    assert TextStream(byte_level(400), ("a",)).flush() == ""


def test_a_character_begun_unlooked_is_looked_at_when_it_ends():
    tokenizer = byte_level(257)
    first, *others = tokenizer.encode("日")
    stream = TextStream(tokenizer, ("日",))
    assert stream.push(first, look=False) == ""
    assert [stream.push(token) for token in others] == ["", ""]
    assert stream.stopped == "日"


def test_text_grows_by_each_piece():
    stream, texts = TextStream(byte_level(400), ("end",)), [""]
    for token in spell("the other end"):
        piece = stream.push(token)
        texts.append(stream.text)
        assert texts[-1] == texts[-2] + piece
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
