"""The tokenizer of a GGUF file as Transformers reads it; what that leaves out is put in, or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.models.errors import ModelError, in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from engine.models.gguf_file import GgufFile

PREFIX = "tokenizer.ggml.add_space_prefix"
SPACE = "\u2581"  # SentencePiece's sign for one
ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")  # end an output as EOS does
READ = {  # by Transformers, or here
    "ggml.model", "ggml.pre", "ggml.tokens", "ggml.scores", "ggml.token_type", "ggml.merges",
    "ggml.bos_token_id", "ggml.eos_token_id", "ggml.eot_token_id", "ggml.eom_token_id",
    "ggml.unknown_token_id", "ggml.padding_token_id", "ggml.add_bos_token", "ggml.add_eos_token",
    "ggml.add_space_prefix", "chat_template",
}  # fmt: skip
NOTES = {  # change no token of a plain text, and none that is generated
    "ggml.seperator_token_id", "ggml.mask_token_id", "ggml.cls_token_id", "ggml.token_type_count",
    "ggml.prefix_token_id", "ggml.suffix_token_id", "ggml.middle_token_id", "ggml.fim_pre_token_id",
    "ggml.fim_suf_token_id", "ggml.fim_mid_token_id", "ggml.fim_pad_token_id", "ggml.fim_rep_token_id",
    "ggml.fim_sep_token_id", "chat_templates", "huggingface.json",
}  # fmt: skip
NEUTRAL = {"ggml.add_sep_token": False, "ggml.remove_extra_whitespaces": False}
# How a byte-level vocabulary's text is cut before merging: as GPT-2 does, or so after digits, each by itself.
AS_GPT2 = {"default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat",
           "mellum", "a.x-4.0", "exaone4"}  # fmt: skip
DIGITS_FIRST = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
# A piece that is in the vocabulary as it is needs no merges to get there.
WHOLE_PIECES = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
                "tekken"}  # fmt: skip


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a file; None if it has no vocabulary.

    Raises:
        ModelError: for a key that can't be honoured, or a tokenizer that does not load.
    """
    if "tokenizer.ggml.tokens" not in file.fields:
        return None
    _refuse_unread(file)
    from transformers import AutoTokenizer

    try:
        how = {"trust_remote_code": False, "gguf_file": file.path.name}
        tokenizer = AutoTokenizer.from_pretrained(str(file.path.parent), **how)
    except Exception as error:  # a broken vocabulary makes the libraries raise anything
        what = f"{file.path} has a tokenizer (tokenizer.ggml.tokens)"
        raise ModelError(f"{what} that did not load: {in_one_line(error)}") from error
    kind, wanted = file.fields.get("tokenizer.ggml.model"), file.fields.get(PREFIX)
    if kind == "gpt2":
        split_as(file.fields.get("tokenizer.ggml.pre"), tokenizer)
    elif kind == "llama" and wanted is not None:
        _prefix_space(file, wanted, tokenizer.backend_tokenizer)
    return tokenizer


def split_as(pre: str | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Make a byte-level tokenizer cut text as tokenizer.ggml.pre says, where Transformers does not."""
    from tokenizers import pre_tokenizers

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and pre in DIGITS_FIRST:
        digits = pre_tokenizers.Digits(individual_digits=True)
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, plain])
    if backend is not None and pre in WHOLE_PIECES:
        backend.model.ignore_merges = True


def _prefix_space(file: GgufFile, wanted: bool, backend: Any) -> None:
    """Have a SentencePiece vocabulary put a space before a text, or not; ModelError where that can't be."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    by_cutting = isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace)
    given = by_cutting or isinstance(backend.normalizer, normalizers.Sequence)  # as of Phi-3
    if given == wanted:
        return
    if wanted:
        raise file.refusal(PREFIX, "not known of its architecture")
    if by_cutting:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False)
    else:
        backend.normalizer = normalizers.Replace(" ", SPACE)
    spaces = decoders.Replace(SPACE, " ")
    backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])


def _refuse_unread(file: GgufFile) -> None:
    """Raise ModelError for a key that changes how text is cut and that nothing reads."""
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    for key, value in file.fields.items():
        space, _, name = key.partition(".")
        if space != "tokenizer" or name in READ | NOTES or name.startswith("chat_template."):
            continue
        if name not in NEUTRAL or value != NEUTRAL[name]:
            raise file.refusal(key, "which changes how text is cut and is not honoured here")
    pre = file.fields.get("tokenizer.ggml.pre")
    known = {*AS_GPT2, *DIGITS_FIRST, *getattr(mapping, "GGUF_PRE_TOKENIZER_SPLITS", ())}
    if file.fields.get("tokenizer.ggml.model") == "gpt2" and pre is not None and pre not in known:
        raise file.refusal("tokenizer.ggml.pre", "a split of text that is not known here")
