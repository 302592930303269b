"""A GGUF file as a model: what it says is honoured, or refused by name; nothing is dropped in silence.

Transformers maps some keys and tensors of each architecture and passes over the rest. Here each key is held
against what the config that comes of the file means by it (`engine.models.gguf_keys`), and each tensor must
become a parameter, or belong to RoPE (`engine.models.gguf_rope`).
"""

from __future__ import annotations

import contextlib
import io
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.models.errors import ModelError
from engine.models.gguf_keys import apply_keys, check_values
from engine.models.gguf_rope import ROPE_TENSORS, set_rope
from engine.models.gguf_tokenizer import ENDS, gguf_tokenizer
from engine.models.stored import causal_lm
from engine.models.vocabulary import drop_foreign_pad, flat

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LONG = [f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges")]  # left packed
FOREIGN = ("adapter", "clip", "diffusion", "xielu")  # first parts of keys that no plain language model has
NOT_HONOURED = "which changes its results and is not honoured here"
WAY_OUT = "give the folder or the hub id that it was made from"


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A file's fields (the long ones of its tokenizer without their values) and its tensors, by name.

    Its `architecture` is as the file calls it: `llama` for Llama, Mistral and many more.
    """

    path: Path
    architecture: str
    fields: dict[str, Any]
    tensors: dict[str, Any]

    @property
    def own(self) -> dict[str, Any]:
        """The fields of its architecture, named without it: `block_count` for `llama.block_count`."""
        prefix, found = f"{self.architecture}.", self.fields.items()
        return {key.removeprefix(prefix): value for key, value in found if key.startswith(prefix)}

    def refusal(self, name: str, why: str = NOT_HONOURED) -> ModelError:
        """Return the error that names a key, as it is or without its architecture, or a tensor."""
        key = name if name in self.fields else f"{self.architecture}.{name}"
        what = f"{key}={textwrap.shorten(repr(self.fields[key]), 60)}" if key in self.fields else name
        return ModelError(f"{self.path} has {what}, {why}: {WAY_OUT}")


def from_gguf(path: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return the model of a GGUF file, unpacked to `dtype`, and its tokenizer if it has one.

    Raises:
        ModelError: for a file that is cut short, or that says what can't be honoured.
    """
    file = _opened(path)
    from transformers import AutoConfig, GgufConfig

    _refuse_other_kinds(file)
    check_values(file)
    where = {"gguf_file": path.name}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that heeds no switch
        tokenizer = gguf_tokenizer(file)
        try:
            config = AutoConfig.from_pretrained(str(path.parent), trust_remote_code=False, **where)
        except Exception as error:  # a config's own checks, which name a field of it at most
            for key in (key for key, value in file.own.items() if isinstance(value, list)):
                raise file.refusal(key, "one value a layer") from error
            raise
        apply_keys(file, config)
        set_rope(file, config)
        drop_foreign_pad(str(path), config)
        _refuse_left_over(file, config)
        unpacked = GgufConfig(dequantize=True)  # packed, it can't be saved
        options = {"config": config, "quantization_config": unpacked, **where}
        model = causal_lm(str(path.parent), dtype, str(path), **options)
    _add_ends(file, model)
    return model, tokenizer


def _opened(path: Path) -> GgufFile:
    """Return the file as the gguf package reads it; ModelError if that is not here, or it is cut short."""
    try:
        import accelerate  # noqa: F401  (Transformers needs it for this)
        from gguf import GGUFReader

        reader = GGUFReader(path)
        fields = {key: None if key in LONG else field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        return GgufFile(path, str(fields["general.architecture"]), fields, tensors)
    except ImportError as error:
        raise ModelError(f"{path.name} needs {error.name}: pip install 'dynamic-batch[gguf]'") from error
    except (ValueError, LookupError, OverflowError, TypeError) as error:  # depends on where the file ends
        raise ModelError(f"{path} is cut short or not a GGUF file; fetch it again") from error


def _refuse_other_kinds(file: GgufFile) -> None:
    """Raise ModelError for what is no language model by itself: an adapter, a projector, a part of one."""
    if file.fields.get("general.type", "model") != "model":
        raise file.refusal("general.type", "and is no model")
    if file.fields.get("split.count", 1) > 1:
        raise ModelError(
            f"{file.path} is one of {file.fields['split.count']} parts (split.count): join them into one "
            "(llama-gguf-split --merge)"
        )
    for key in file.fields:
        if key.partition(".")[0] in FOREIGN:
            raise file.refusal(key)


def _refuse_left_over(file: GgufFile, config: PreTrainedConfig) -> None:
    """Raise ModelError for a tensor that no parameter of a model of this config comes from."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations.gguf import GGUF_ARCHS
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map as places,
    )

    # The file says whether its output layer is the embedding; of some, Transformers thinks it knows better.
    config.tie_word_embeddings = "output.weight" not in file.tensors
    if file.architecture in GGUF_ARCHS:  # by way of names that `causal_lm` sees and checks
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    known = {*places(model, TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)()), *ROPE_TENSORS}
    for name in file.tensors:
        if name not in known and name.removesuffix(".weight") not in known:  # stacked experts have no suffix
            raise file.refusal(name, f"a tensor that {type(model).__name__} has no place for by its config")


def _add_ends(file: GgufFile, model: PreTrainedModel) -> None:
    """End an output also where the file has a chat's turn or message end (EOT, EOM)."""
    more = [file.fields[key] for key in ENDS if key in file.fields]
    settings = model.generation_config
    if more and settings is not None:
        settings.eos_token_id = list(dict.fromkeys([*flat(settings.eos_token_id), *more]))
