"""A GGUF file with the weights of another, each as the plain numbers that it stands for, or as 8 bits of
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0"}


def with_plain_weights(source: Path, target: Path, dtype: str) -> None:
    """Write a file whose matrices are in `dtype`, all else in float32, with the keys and the tokenizer of
    `source`.

    Raises:
        ImportError: without the package gguf.
    """
    import gguf

    reader: Any = gguf.GGUFReader(source)
    kind = getattr(gguf.GGMLQuantizationType, KINDS[dtype])
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    own = "general.architecture", "general.file_type", "general.quantization_version"
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in own:
            items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], items)
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if weight.ndim > 1 and dtype != "float32":
            writer.add_tensor(tensor.name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
