"""A model's tokenizer: what AutoTokenizer reads, None where there is none, an error where it is broken."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from engine import Engine, EngineConfig, InputError, SamplingParams
from engine.models import ModelError, load
from engine.models.tokenizers import find_tokenizer
from tests.gguf_writer import tiny, write_gguf

BYTES = list(bytes_to_unicode().values())
MERGES = ["h e", "Ġ Ġ", "Ġ 1"]
VOCAB = {token: i for i, token in enumerate([*BYTES, "he", "ĠĠ", "Ġ1", "<|endoftext|>"])}
GPT2_FILES = {"vocab.json": json.dumps(VOCAB), "merges.txt": "#version: 0.2\n" + "\n".join(MERGES) + "\n"}
CLASS = {"tokenizer_config.json": json.dumps({"tokenizer_class": "GPT2Tokenizer"})}


def folder(path: Path, files: dict[str, str], kind: str = "gpt2") -> str:
    """A folder with the config of a tiny model, without weights, and these files."""
    config = tiny(kind).config
    config.save_pretrained(path)
    for name, text in files.items():
        (path / name).write_text(text)
    return str(path)


# Folders


@pytest.mark.parametrize(("kind", "tokens"), [("gpt2", ["he", "Ġ1"]), ("qwen2", ["he", "Ġ", "1"])])
def test_a_vocabulary_and_merges_are_a_tokenizer(kind: str, tokens: list[str], tmp_path: Path) -> None:
    found = find_tokenizer(folder(tmp_path, GPT2_FILES, kind))
    assert found is not None
    assert found.convert_ids_to_tokens(found("he 1").input_ids) == tokens


def test_a_loaded_folder_has_it_with_the_template_beside_it(tmp_path: Path) -> None:
    model = tiny("gpt2", vocab_size=260)
    model.save_pretrained(tmp_path)
    for name, text in GPT2_FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    loaded = load(str(tmp_path))
    assert loaded.tokenizer is not None
    engine = Engine(loaded, EngineConfig(kv_memory=1 << 24))
    assert engine.chat("he") == [VOCAB["he"], VOCAB["!"]]
    output = engine.generate("he", SamplingParams(max_new_tokens=2), progress=False)[0]
    assert output.prompt_token_ids == (VOCAB["he"],)
    assert isinstance(output.text, str)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "llama", "mistral", "gemma3_text", "phi3"])
@pytest.mark.parametrize("files", [{}, {"chat_template.jinja": "x"}, {"my_token_notes.md": "x"}], ids=str)
def test_a_folder_that_has_none_gives_none(kind: str, files: dict, tmp_path: Path) -> None:
    assert find_tokenizer(folder(tmp_path, files, kind)) is None


@pytest.mark.parametrize(
    ("kind", "files", "said"),
    [
        ("gpt2", {**GPT2_FILES, "vocab.json": "{"}, r"\(merges\.txt, vocab\.json\) that did not load: .*EOF"),
        ("gpt2", {"vocab.json": GPT2_FILES["vocab.json"]}, r"\(vocab\.json\) that did not load"),
        ("llama", {"tokenizer.json": "{}"}, r"\(tokenizer\.json\) that did not load: KeyError 'added"),
        ("llama", GPT2_FILES, r"that did not load: no class reads that"),
        ("gpt2", CLASS, r"of class GPT2Tokenizer \(tokenizer_config\.json\) .* finds no vocabulary"),
        ("gpt2", {"tokenizer_config.json": json.dumps({"tokenizer_class": "NoSuchTokenizer"}), **GPT2_FILES},
         r"of class NoSuchTokenizer .* that did not load"),
        ("gpt2", {"vocab.txt": "a\nb\n"}, r"\(vocab\.txt\) that did not load: GPT2Tokenizer finds no"),
        ("gemma3_text", GPT2_FILES, r"GemmaTokenizer finds no vocabulary there"),
        ("llama", {"tekken.json": "{}"}, r"\(tekken\.json\) that did not load"),
        ("llama", {"special_tokens_map.json": "{}"}, r"\(special_tokens_map\.json\) that did not load"),
    ],
)  # fmt: skip
def test_a_broken_one_is_a_line_that_names_it(kind: str, files: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        find_tokenizer(folder(tmp_path, files, kind))
    assert str(tmp_path) in str(caught.value)
    assert "to use token ids alone" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "package"),
    [
        ("tokenizer.model", "\n\x0b\n\x05<unk>", "sentencepiece"),
        ("spiece.model", "\n\x0b\n\x05<unk>", "sentencepiece"),
        ("tokenizer.model", "aGU= 0\nbGw= 1\n", "tiktoken"),
        ("tiktoken.model", "aGU= 0\nbGw= 1\n", "tiktoken"),
        ("qwen.tiktoken", "aGU= 0\nbGw= 1\n", "tiktoken"),
    ],
)
def test_the_package_that_reads_it_is_named(name: str, text: str, package: str, tmp_path: Path) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is here")
    with pytest.raises(ModelError, match=rf"\({name}\) that needs {package}.*: pip install {package}"):
        find_tokenizer(folder(tmp_path, {name: text}, "llama"))


def test_load_says_so_before_it_reads_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json\) that did not load"):
        load(folder(tmp_path, {"tokenizer.json": "{"}, "llama"))


def test_a_config_that_is_missing_is_not_the_tokenizers_fault(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("x")
    with pytest.raises(ModelError, match=r"did not load: .*config\.json") as caught:
        load(str(tmp_path))
    assert "has a tokenizer" not in str(caught.value)


# Ids that the model does not have


def test_tokens_that_the_embedding_was_not_resized_for_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny("gpt2", vocab_size=256)
    model.save_pretrained(tmp_path)
    made = Tokenizer(models.BPE(vocab=VOCAB, merges=[tuple(merge.split()) for merge in MERGES]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path)
    engine = Engine.from_pretrained(str(tmp_path), EngineConfig(kv_memory=1 << 24), progress=False)
    assert engine.encode("x y") == [VOCAB["x"], VOCAB["Ġ"], VOCAB["y"]]
    for ask in (lambda: engine.encode("a<extra>b"), lambda: engine.add_request("a<extra>b")):
        with pytest.raises(InputError, match=r"prompt has '<extra>', token 260 of the token.* 0 to 255"):
            ask()
    with pytest.raises(InputError, match=r"message has 'he', token 256 of the tokenizer"):
        engine.chat("he")


def test_ids_beyond_the_tokenizer_are_text_of_nothing(tmp_path: Path) -> None:
    """A padded vocabulary, as Qwen's: the model can give ids that its tokenizer does not know."""
    model = tiny("gpt2", vocab_size=512)
    model.lm_head.weight.data[:300] -= 100.0  # only ids that are padding can be the likeliest
    model.save_pretrained(tmp_path)
    for name, text in GPT2_FILES.items():
        (tmp_path / name).write_text(text)
    engine = Engine.from_pretrained(str(tmp_path), EngineConfig(kv_memory=1 << 24), progress=False)
    assert engine.vocab_size == 512
    chunks = list(engine.stream("he", SamplingParams(max_new_tokens=4, ignore_eos=True)))
    assert chunks[-1].output is not None
    assert len(chunks[-1].output.token_ids) == 4


# In GGUF files


def byte_level(**changes: Any) -> dict[str, Any]:
    """The keys of a byte-level tokenizer."""
    keys = {"model": "gpt2", "tokens": list(VOCAB), "token_type": [1] * 259 + [3], "merges": MERGES,
            "eos_token_id": VOCAB["<|endoftext|>"], **changes}  # fmt: skip
    return {f".tokenizer.ggml.{name}": value for name, value in keys.items()}


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """The keys of a SentencePiece tokenizer."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    keys = {"model": "llama", "tokens": tokens, "scores": [0.0] * 259 + [-float(i) for i in range(6)],
            "token_type": [2, 3, 3] + [6] * 256 + [1] * 6, "bos_token_id": 1, "eos_token_id": 2,
            "unknown_token_id": 0, **changes}  # fmt: skip
    return {f".tokenizer.ggml.{name}": value for name, value in keys.items()}


def tokenizer_of(path: Path, keys: dict[str, Any]) -> Any:
    size = len(keys[".tokenizer.ggml.tokens"])
    write_gguf(path, tiny(vocab_size=size), keys)
    return load(str(path)).tokenizer


@pytest.mark.parametrize("pre", [None, "gpt-2", "default", "olmo"])
def test_a_byte_level_vocabulary_is_cut_as_gpt2_does(pre: str | None, tmp_path: Path) -> None:
    found = tokenizer_of(tmp_path / "m.gguf", byte_level(**({} if pre is None else {"pre": pre})))
    assert found.convert_ids_to_tokens(found("he  12").input_ids) == ["he", "Ġ", "Ġ1", "2"]


@pytest.mark.parametrize("pre", ["smollm", "starcoder", "command-r"])
def test_digits_are_cut_off_first_where_the_file_says_so(pre: str, tmp_path: Path) -> None:
    found = tokenizer_of(tmp_path / "m.gguf", byte_level(pre=pre))
    assert found.convert_ids_to_tokens(found("he  12").input_ids) == ["he", "ĠĠ", "1", "2"]


def test_smollm2s_digits_are_cut_off_first_whoever_converted_it(smollm2: Any) -> None:
    ids = smollm2.tokenizer("a  1").input_ids
    assert smollm2.tokenizer.convert_ids_to_tokens(ids) == ["a", "ĠĠ", "1"]


def test_a_piece_that_is_in_the_vocabulary_needs_no_merges_in_llama3s(tmp_path: Path) -> None:
    tokens = [*VOCAB, "xyz"]
    keys = byte_level(pre="llama-bpe", tokens=tokens, token_type=[1] * 259 + [3, 1])
    found = tokenizer_of(tmp_path / "m.gguf", keys)
    assert found.convert_ids_to_tokens(found("xyz").input_ids) == ["xyz"]


@pytest.mark.parametrize(("wanted", "tokens"), [(True, ["▁ab"]), (None, ["▁ab"]), (False, ["ab"])])
def test_the_space_before_a_text_is_the_files(wanted: bool | None, tokens: list[str], tmp_path: Path) -> None:
    changes = {} if wanted is None else {"add_space_prefix": wanted}
    found = tokenizer_of(tmp_path / "m.gguf", sentencepiece(add_bos_token=False, **changes))
    assert found.convert_ids_to_tokens(found("ab").input_ids) == tokens
    assert found.decode(found(" ab").input_ids) == (" ab" if wanted is False else "ab")


ENDS = [("add_bos_token", True, False), ("add_eos_token", False, True)]


@pytest.mark.parametrize(("key", "first", "last"), ENDS)
def test_ends_that_a_file_puts_to_a_text(key: str, first: bool, last: bool, tmp_path: Path) -> None:
    keys = sentencepiece(**{"add_bos_token": False, "add_eos_token": False, key: True})
    found = tokenizer_of(tmp_path / "m.gguf", keys)
    ids = found("ab").input_ids
    assert (ids[0] == 1, ids[-1] == 2) == (first, last)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pre": "no-such-split"}, r"tokenizer\.ggml\.pre='no-such-split'"),
        ({"add_sep_token": True}, r"tokenizer\.ggml\.add_sep_token=True"),
        ({"remove_extra_whitespaces": True}, r"tokenizer\.ggml\.remove_extra_whitespaces=True"),
        ({"precompiled_charsmap": [1, 2, 3]}, r"tokenizer\.ggml\.precompiled_charsmap="),
        ({"something_new": 1}, r"tokenizer\.ggml\.something_new=1"),
        ({"model": "no-such-model"}, r"tokenizer\.ggml\.tokens\) that did not load: .*no-such-model"),
        ({"eos_token_id": 9999}, r"tokenizer\.ggml\.tokens\) that did not load"),
    ],
)
def test_what_changes_a_texts_tokens_and_is_not_honoured(changes: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        tokenizer_of(tmp_path / "m.gguf", byte_level(**changes))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert tokenizer_of(tmp_path / "m.gguf", byte_level(add_sep_token=False, fim_pre_token_id=3)) is not None
