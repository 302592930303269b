"""The Triton kernels that a decoder launches; each also runs on CPU tensors in Triton's interpreter."""

from engine.backends.cuda.kernels.attention import attend_chunks, chunk_tokens
from engine.backends.cuda.kernels.decode_attention import NewTokens, attend_rows, split_size
from engine.backends.cuda.kernels.norm_activation import add_norm, best_tokens, gated, norm, step_inputs
from engine.backends.cuda.kernels.one_row import Unnormed, add_row_product, gated_row_product, row_product
from engine.backends.cuda.kernels.rope_kv_write import write_pages
from engine.backends.cuda.kernels.split_k import max_split_rows, split_k_gated, split_k_product

__all__ = [
    "NewTokens", "Unnormed", "add_norm", "add_row_product", "attend_chunks", "attend_rows", "best_tokens",
    "chunk_tokens", "gated", "gated_row_product", "max_split_rows", "norm", "row_product", "split_k_gated",
    "split_k_product", "split_size", "step_inputs", "write_pages",
]  # fmt: skip
