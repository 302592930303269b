"""Models that are stored: a folder or a hub id by Transformers' own reading, a GGUF file unpacked."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engine.models.errors import WAYS_OUT, ModelError
from engine.models.generation import check_stated, read_stated
from engine.models.vocabulary import drop_foreign_pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def from_gguf(path: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The weights of a GGUF file unpacked to `dtype`, and its tokenizer if it has one."""
    try:
        import accelerate  # noqa: F401  (Transformers needs it for this)
        from gguf import GGUFReader

        spoken = "tokenizer.ggml.tokens" in GGUFReader(path).fields
    except ImportError as error:
        raise ModelError(f"{path.name} needs {error.name}: pip install 'dynamic-batch[gguf]'") from error
    except (ValueError, LookupError, OverflowError, TypeError) as error:  # depends on where the file ends
        raise ModelError(f"{path} is cut short or not a GGUF file; fetch it again") from error
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that heeds no switch
        return read(str(path.parent), dtype, spoken, gguf_file=path.name)


def read(source: str, dtype: str, spoken: bool, **gguf: Any) -> tuple[PreTrainedModel, Any]:
    """The stored model and, if `spoken`, its tokenizer; ModelError unless it is a whole causal LM."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **gguf) if spoken else None
    plain = {"quantization_config": GgufConfig(dequantize=True)} if gguf else {}  # packed, it can't be saved
    how = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True, **gguf, **plain}
    stated = {} if gguf else read_stated(source)
    if not gguf:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        how |= {"config": config} if drop_foreign_pad(source, config) else {}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source, **how)
    except (TypeError, ValueError):  # of a field that is no number, Transformers names neither file nor field
        check_stated(source, stated)
        raise
    model, found = cast("tuple[PreTrainedModel, Any]", loaded)
    # Transformers would give BERT a causal head without a word, and a weight that is missing random numbers.
    declared, missing = model.config.architectures or [], sorted(found["missing_keys"])
    if declared and not any(name in CAUSAL.values() or name.endswith("ForCausalLM") for name in declared):
        raise ModelError(f"{source} is not a causal LM but {', '.join(declared)}; {WAYS_OUT}")
    if missing:
        raise ModelError(f"{source} lacks {len(missing)} of its weights, such as {missing[0]}; {WAYS_OUT}")
    return model, tokenizer
