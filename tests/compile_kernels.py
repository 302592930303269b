"""Compile every kernel for an H100 or H200 on a machine that need not have one, as a program of its own.

The interpreter runs what the compiler would refuse, so each launch is caught, compiled for its very
arguments, and its registers and shared memory looked at. Prints a line a kernel; exits with 1 where one
spills, does not fit, or would be compiled again for what differs from step to step.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from engine.backends.cuda.kernels import (
    attention as kernels,
    decode_attention as decode,
    launch as launching,
    norm_activation as fused,
    one_row,
    rope_kv_write as write,
    split_k,
)
from engine.models.decoder_parts import Norm

SHARED = 227 * 1024
STACK = 64  # bytes: a compiler's own, not spilled registers
WIDE_STACK = 256  # of float32 with heads beyond 128, whose exact products lie in registers
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
problems: list[str] = []
known: dict[str, dict] = {}  # what each kernel was specialised on, by its types and constants


def compile_instead(function: JITFunction, *args, grid, warmup=False, **named) -> None:
    """Stands for JITFunction.run."""
    options = {name: named.pop(name) for name in ("num_warps", "num_stages", "launch_pdl") if name in named}
    values = dict(zip([parameter.name for parameter in function.params], args, strict=False)) | named
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[i,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                attributes[i,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[i,] = [["tt.divisibility", 16]]
    key = f"{function.fn.__name__} {signature} {constants} {options}"
    if key in known:
        if known[key] != attributes:
            problems.append(f"{key}: compiled for {known[key]} and again for {attributes}")
        return
    known[key] = attributes
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", report).groups())
    shape = {name: values[name] for name in ("DIM", "GROUPS", "SIZE") if name in values}
    line = f"{function.fn.__name__} {shape} {options}: {registers} registers"
    line += f", {compiled.metadata.shared} bytes shared"
    print(line, flush=True)
    wide = shape.get("DIM", 0) > 128 and "*fp32" in signature.get("keys", "")
    if stack > (WIDE_STACK if wide else STACK) or compiled.metadata.shared > SHARED:
        problems.append(f"{line}, {stack} bytes of stack")
    halves = "*fp32" not in (signature.get("q"), signature.get("keys"))
    if function.fn.__name__ == "_chunks" and halves and "wgmma" not in compiled.asm["ptx"]:
        problems.append(f"{line}: not by the warpgroup's matrix instructions")


def launch(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, page=16, window=None, softcap=None):
    """Every launch over one attention shape."""
    ints, tables = torch.zeros(64, dtype=torch.int32), torch.zeros(8, 64, dtype=torch.int32)
    store = torch.empty(9, kv_heads, page, dim, dtype=dtype)
    for tokens in (32, 600):
        joined = torch.empty(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
        q, k, v = joined.split([heads, kv_heads, kv_heads], 1)
        cos, sin = torch.empty(tokens, dim, dtype=dtype).chunk(2, -1)
        write.write_pages(q, k, v, cos, sin, torch.zeros(tokens, dtype=torch.int64), store, store)
    options = (window, softcap)
    tiles = torch.zeros(8, 2, dtype=torch.int32)
    for some, split in ((ints, 64), (ints[1:], 256)):
        kernels.attend_chunks(q, store, store, tables, some, some, some, tiles, 0.1, *options)
        rows = [x[: len(some)] for x in (q, k, v)]
        for new in (None, decode.NewTokens(*rows[1:], some, torch.empty(99, dim, dtype=dtype))):
            decode.attend_rows(
                rows[0], store, store, tables, some, 4096, ints, 0.1, *options, some, split, new, ahead=joined
            )


def layer(tokens: int, dtype: torch.dtype) -> None:
    """What the products of a layer like Qwen2.5-0.5B's launch, and attention to what they give."""
    x, inner = torch.empty(tokens, 896, dtype=dtype), torch.empty(tokens, 4864, dtype=dtype)
    qkv, out, gate_up, down, bias = (
        torch.empty(*shape, dtype=dtype)
        for shape in ((1152, 896), (896, 896), (9728, 896), (896, 4864), (1152,))
    )
    by, store = Norm(x[0], None, 1e-5, False), torch.empty(9, 2, 16, 64, dtype=dtype)
    heads = split_k.split_k_product(x, qkv, gate_up).unflatten(-1, (-1, 64))
    q, k, v = heads.split([14, 2, 2], 2)
    ints, angles = torch.zeros(64, dtype=torch.int32), torch.empty(99, 64, dtype=dtype)
    new = decode.NewTokens(k, v, ints[:tokens].long(), angles, bias)
    lengths, tables = ints[:tokens], torch.zeros(64, 8, dtype=torch.int32)
    decode.attend_rows(q, store, store, tables, lengths, 1024, ints, 0.1, new=new, ahead=down)
    for given, weight in ((x, out), (inner, down)):
        fused.add_norm(x, split_k.split_k_product(given, weight), by)
    split_k.split_k_gated(x, gate_up, "silu")
    if tokens == 1:
        squares = one_row.add_row_product(x, x, out)
        for unnormed in (None, one_row.Unnormed(by, squares)):
            one_row.row_product(x, qkv, bias, unnormed, gate_up)
        one_row.gated_row_product(x, gate_up, "silu", unnormed)
        one_row.add_row_product(x, inner, down)


def main() -> None:
    JITFunction.run = compile_instead
    launching.DEPENDENT.update(PDL=True, launch_pdl=True)
    for tokens in (1, 31, 64):
        layer(tokens, torch.float16)
    layer(7, torch.bfloat16)
    launch(14, 2, 64, torch.float16)
    launch(32, 8, 128, torch.bfloat16, window=4096)
    launch(4, 1, 256, torch.bfloat16, window=512, softcap=50.0)
    launch(12, 4, 80, torch.float16)
    launch(14, 2, 64, torch.float32)
    launch(4, 1, 256, torch.float32)
    for tokens in (8, 9):
        inputs, last = torch.zeros(3, tokens, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)
        fused.step_inputs(inputs, last, torch.zeros(3, 8, dtype=torch.int32), 16)
    for dtype, size in ((torch.float16, 896), (torch.bfloat16, 4096), (torch.float32, 1152)):
        x = torch.empty(4, 2 * size, dtype=dtype)
        for centred in (False, True):
            by = Norm(torch.empty(size), x[0] if centred else None, 1e-5, centred)
            fused.add_norm(torch.empty(4, size, dtype=dtype), x[:, :size], by, 0.5)
            fused.norm(x.view(4, 2, size), replace(by, scale=torch.empty(2, size)))
        fused.gated(x[:, :size], x[:, size:], ["silu", "gelu_tanh"][size == 1152])
        fused.best_tokens(torch.empty(4, 151936, dtype=dtype))
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
