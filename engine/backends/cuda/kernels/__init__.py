"""The Triton kernels that a decoder launches; each also runs on CPU tensors in Triton's interpreter."""

from engine.backends.cuda.kernels.attention import attend_chunks, attend_rows, chunk_tokens
from engine.backends.cuda.kernels.norm_activation import add_norm, best_tokens, gated, norm, step_inputs
from engine.backends.cuda.kernels.rope_kv_write import write_pages
from engine.backends.cuda.kernels.split_k import max_split_rows, split_k_gated, split_k_product

__all__ = [
    "add_norm", "attend_chunks", "attend_rows", "best_tokens", "chunk_tokens", "gated", "max_split_rows",
    "norm", "split_k_gated", "split_k_product", "step_inputs", "write_pages",
]  # fmt: skip
