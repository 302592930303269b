"""A stored model's tokenizer: what AutoTokenizer makes of its files, None where there are none, or an error.

Where there is nothing to read, AutoTokenizer gives some classes an empty vocabulary and fails for others.
Then the names of files tell whether there is nothing, or something that can't be read.
"""

from __future__ import annotations

import fnmatch
import os
import re
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any

from engine.models.errors import ModelError, in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Files that only a tokenizer has: vocabularies, and what is written beside them. A chat template is none.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json",
    "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "*.model", "tokenizer.model.v*", "*.tiktoken",
)  # fmt: skip
WITHOUT = "or remove its files to use token ids alone"


def find_tokenizer(source: str, **where: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a folder or a hub id; None if it has none.

    Raises:
        ModelError: if it has one that does not load, or that loads empty.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
    except Exception as error:  # a broken file makes the libraries raise anything, down to a bare Exception
        AutoConfig.from_pretrained(source, trust_remote_code=False, **where)  # raises if that is the trouble
        if not (files := _files(source, **where)):
            return None
        said = "no class reads that" if "backend tokenizer" in str(error) else in_one_line(error)
        raise ModelError(_why(source, files, said, **where)) from error
    if _speaks(tokenizer):
        return tokenizer
    if files := _files(source, **where):
        said = f"{type(tokenizer).__name__} finds no vocabulary there"
        raise ModelError(_why(source, files, said, **where))
    return None


def _speaks(tokenizer: Any) -> bool:
    """Return whether it has tokens to write text with, and not only special ones."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    return any(token not in special for token in tokenizer.get_vocab())


def _files(source: str, **where: Any) -> list[str]:
    """Return which of FILES there are in a folder, or under a hub id that has been fetched."""
    from huggingface_hub import snapshot_download

    folder = source if os.path.isdir(source) else snapshot_download(source, **where)
    names = os.listdir(folder)
    return sorted(name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in FILES))


def _why(source: str, files: list[str], said: str, **where: Any) -> str:
    """Return one line: what is there, what went wrong, and the way out."""
    needs = _missing_package(source, files)
    named = f" of class {name}" if (name := _class_named(source, **where)) else ""
    what = f"{source} has a tokenizer{named} ({', '.join(files[:4])})"
    if needs:
        return f"{what} that needs {needs}: pip install {needs}, {WITHOUT}"
    return f"{what} that did not load: {said}; mend it, {WITHOUT}"


def _missing_package(source: str, files: list[str]) -> str:
    """Return the packages that such a vocabulary is read with and that are missing; empty if none is."""
    kinds = ("*.model", "tokenizer.model.v*", "*.tiktoken")
    found = [name for name in files if any(fnmatch.fnmatch(name, kind) for kind in kinds)]
    if not found or "tokenizer.json" in files or not os.path.isdir(source):
        return ""
    with open(os.path.join(source, found[0]), "rb") as file:
        # A line of tiktoken is a token in base64 and its rank; anything else is SentencePiece's.
        ranks = re.match(rb"[A-Za-z0-9+/]+=* \d+\s", file.read(1024)) or found[0].endswith(".tiktoken")
    wanted = ["tiktoken"] if ranks else ["sentencepiece", "protobuf"]
    here = {package.name for package in distributions()}
    return " ".join(package for package in wanted if package not in here)


def _class_named(source: str, **where: Any) -> str:
    """Return the class that tokenizer_config.json asks for; empty if it says none, or can't be read."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        return get_tokenizer_config(source, **where).get("tokenizer_class") or ""
    except (OSError, ValueError, AttributeError):
        return ""
