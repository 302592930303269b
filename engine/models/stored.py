"""Models as Transformers stores them, in a folder or under a hub id: read whole, or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from engine.models.errors import WAYS_OUT, ModelError
from engine.models.generation import check_stated, read_stated
from engine.models.vocabulary import drop_foreign_pad

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

UNPACKED = "mxfp4"  # quantized weights that Transformers unpacks where no kernel takes them as they are


def read(source: str, dtype: str, weights: dict[str, Any] | None = None, **where: Any) -> PreTrainedModel:
    """Return the model in a folder or under a hub id; ModelError unless it is a whole causal LM.

    Args:
        weights, where: of a hub id, the options of `from_pretrained` for its weights, and for all else.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **where)
    _refuse_quantized(source, config)
    stated = read_stated(source, **where)
    mended = {"config": config} if drop_foreign_pad(source, config) else {}
    try:
        return causal_lm(source, dtype, source, **mended, **(weights or {}))
    except (TypeError, ValueError):  # of a field that is no number, Transformers names neither file nor field
        check_stated(source, stated)
        raise


def stored_dtype(source: str, **where: Any) -> str | None:
    """Return the dtype that the config in a folder or under a hub id states for its weights, if any."""
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(source, trust_remote_code=False, **where).dtype
    return None if dtype is None else str(dtype).removeprefix("torch.")


def causal_lm(folder: str, dtype: str, source: str, **options: Any) -> PreTrainedModel:
    """Return a causal LM by Transformers' own reading of a folder or hub id; errors call it `source`.

    Raises:
        ModelError: if it is none, or if weights are missing, left over, or not of the sizes its config says.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    how = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    how["ignore_mismatched_sizes"] = True  # only so that what is found says which
    loaded = AutoModelForCausalLM.from_pretrained(folder, **how, **options)
    model, found = cast("tuple[PreTrainedModel, Any]", loaded)
    # Without a word, Transformers would give BERT a causal head, random numbers to a weight that is missing,
    # and no place to one that the config does not have, such as a bias.
    declared = model.config.architectures or []
    if declared and not any(name in CAUSAL.values() or name.endswith("ForCausalLM") for name in declared):
        raise ModelError(f"{source} is not a causal LM but {', '.join(declared)}; {WAYS_OUT}")
    if sizes := sorted(found["mismatched_keys"]):
        name, stored, wanted = sizes[0]
        raise ModelError(
            f"{source} has {len(sizes)} weights of other sizes than its config says, such as {name}: "
            f"{list(stored)} for {list(wanted)}; {WAYS_OUT}"
        )
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"{source} lacks {len(missing)} of its weights, such as {missing[0]}; {WAYS_OUT}")
    if left := sorted(key for key in found["unexpected_keys"] if not _is_mask(model, key)):
        raise ModelError(
            f"{source} has {len(left)} weights that {type(model).__name__} has no place for by its config, "
            f"such as {left[0]}: without them it is another model; mend its config.json, or remove them"
        )
    return model


def _is_mask(model: PreTrainedModel, key: str) -> bool:
    """Return whether a stored tensor is no weight but a buffer of older versions, such as a causal mask."""
    buffers, modules = dict(model.named_buffers()), dict(model.named_modules())
    for name in (key, f"{model.base_model_prefix}.{key}"):
        owner, _, leaf = name.rpartition(".")
        masks = leaf in ("bias", "masked_bias") and owner in modules and not hasattr(modules[owner], "weight")
        if name in buffers or masks:  # of an attention as such, not of one of its products
            return True
    return False


def refuse_adapter(source: str, **where: Any) -> None:
    """Raise ModelError for weights that are to be added to a model's, which depends on what is installed."""
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(source, **where) is not None:
        raise ModelError(
            f"{source} has an adapter_config.json: merge the adapter into its model (merge_and_unload) "
            "and give what that saves, or remove the file"
        )


def _refuse_quantized(source: str, config: PreTrainedConfig) -> None:
    """Raise ModelError for packed weights, which are no matrices to multiply by."""
    stated = getattr(config, "quantization_config", None)
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    if stated and method != UNPACKED:
        raise ModelError(
            f"{source} has weights quantized by {method or 'a method not named'} (quantization_config in its "
            "config.json), which this engine does not unpack: give the model that they were made from, or a "
            "GGUF file of it; dtype='int8' quantizes here"
        )
