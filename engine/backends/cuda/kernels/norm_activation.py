"""Triton kernels for what lies between a layer's matrix products: norms, activations, and the choice of a
token.

Each does in one pass over memory what the model's own modules do in several, and rounds where they round.
engine/backends/cuda/kernels/attention.py says how kernels are written here.

T tokens, H heads of a token, or 1, M width of a row, F intermediate size, B rows of logits, V vocabulary,
S parts of a row or of a sum.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.backends.cuda.kernels.launch import kernel, launch_dependents, wait_for_previous
from engine.models.decoder_parts import Norm

PART = 4096  # logits that one program looks at: 38 programs a row for a vocabulary of 152k


def step_inputs(
    inputs_3T: torch.Tensor, last_B: torch.Tensor, tables_RN: torch.Tensor, page: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a model and its attention want to know of each token, from the little that the host has to say.

    Args:
        inputs_3T: int32; token ids, or -1 - b for the one that lies at last_B[b]; positions, -1 for no token;
            and lines of the block tables.

    Returns:
        Token ids (0 where there is none, or for one that is not finite), positions, slots (`write_pages`),
            int64 [T],
        and the length of each token's context, itself included, int32 [T].
    """
    tokens = inputs_3T.shape[1]
    ids_T, positions_T, slots_T = torch.empty(3, tokens, dtype=torch.int64, device=inputs_3T.device)
    lengths_T = torch.empty(tokens, dtype=torch.int32, device=inputs_3T.device)
    _inputs[triton.cdiv(tokens, 128),](
        inputs_3T, last_B, tables_RN, ids_T, positions_T, slots_T, lengths_T, tokens, tables_RN.stride(0),
        PAGE=page, BLOCK=128,
    )  # fmt: skip
    return ids_T, positions_T, slots_T, lengths_T


@kernel(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["positions"])
def _inputs(
    inputs, last, tables, ids, positions, slots, lengths, tokens, table_row,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    t_T = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here_T = t_T < tokens
    given_T = tl.load(inputs + t_T, mask=here_T, other=0)
    at_T = tl.load(inputs + tokens + t_T, mask=here_T, other=-1)
    line_T = tl.load(inputs + 2 * tokens + t_T, mask=here_T, other=0).to(tl.int64)
    pending_T = tl.load(last + (-1 - given_T), mask=here_T & (given_T < 0), other=0)
    id_T = tl.where(given_T < 0, pending_T, given_T.to(tl.int64))
    place_T = tl.maximum(at_T, 0)
    page_T = tl.load(tables + line_T * table_row + place_T // PAGE, mask=here_T, other=0).to(tl.int64)
    tl.store(ids + t_T, tl.maximum(id_T, 0), mask=here_T)
    tl.store(positions + t_T, place_T.to(tl.int64), mask=here_T)
    tl.store(slots + t_T, tl.where(at_T < 0, -1, page_T * PAGE + place_T % PAGE), mask=here_T)
    tl.store(lengths + t_T, at_T + 1, mask=here_T)


def norm(x: torch.Tensor, by: Norm, parts_of: torch.dtype | None = None) -> torch.Tensor:
    """Return the norm of the last dimension of x, contiguous.

    Args:
        x: [..., M], such as heads that lie in a joined product; a norm of several heads has a weight for
            each.
        parts_of: x is [S, T, M], partial sums of a product in this dtype (`split_k_product`).
    """
    return _launch_norm(x, None, by, 1.0, parts_of)


def add_norm(residual_TM: torch.Tensor, x: torch.Tensor, by: Norm, scale: float = 1.0) -> torch.Tensor:
    """Add scale * x to the residual stream, in place, and return the norm of that, [T, M].

    Args:
        residual_TM: contiguous; the sum is rounded to its dtype before it is normed, as a model does.
        x: [T, M]; or [S, T, M], partial sums of a product (`split_k_product`).
    """
    return _launch_norm(x, residual_TM, by, scale, residual_TM.dtype if x.dim() == 3 else None)


def _launch_norm(
    x: torch.Tensor, residual: torch.Tensor | None, by: Norm, scale: float, parts_of: torch.dtype | None
) -> torch.Tensor:
    """RMSNorm (Zhang and Sennrich, 2019) or LayerNorm (Ba et al., 2016), computed in float32."""
    parts, part, one = (0, 0, x) if parts_of is None else (x.shape[0], x.stride(0), x[0])
    x_THM = one.reshape(-1, *one.shape[-2:])
    (outer, inner, size), block = x_THM.shape, triton.next_power_of_2(one.shape[-1])
    out = torch.empty(one.shape, dtype=parts_of or x.dtype, device=x.device)
    block_s = triton.next_power_of_2(max(1, parts))
    _norm[(outer * inner,)](
        x_THM, out if residual is None else residual, by.scale, by.scale if by.bias is None else by.bias, out,
        by.eps, scale, inner, *x_THM.stride()[:2], part, SIZE=size, ADD=residual is not None,
        CENTRED=by.centred, BIAS=by.bias is not None, EACH=by.scale.dim() > 1, PARTS=parts, BLOCK=block,
        BLOCK_S=block_s,
        num_warps=min(16, max(4, block * block_s // 1024 if parts else block // 512)),
    )  # fmt: skip
    return out


@kernel(do_not_specialize=["inner", "part"])
def _norm(
    x, residual, weight, bias, out, eps, scale, inner, x_outer, x_inner, part,
    SIZE: tl.constexpr, ADD: tl.constexpr, CENTRED: tl.constexpr, BIAS: tl.constexpr, EACH: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if ADD:  # the first norm of a model has nothing to add
        launch_dependents(PDL)
    row, m_M = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    weight_M = m_M
    if EACH:  # row `inner` of a token has a weight of its own
        weight_M += (row % inner).to(tl.int32) * SIZE
    scale_M = tl.load(weight + weight_M, mask=m_M < SIZE, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    at_M = row * SIZE + m_M
    x += row // inner * x_outer + row % inner * x_inner
    if PARTS:  # rounded as the product would be
        s_S1 = tl.arange(0, BLOCK_S)[:, None]
        x_SM = tl.load(x + s_S1 * part + m_M[None, :], mask=(s_S1 < PARTS) & (m_M < SIZE)[None, :], other=0.0)
        x_M = tl.sum(x_SM, 0).to(out.dtype.element_ty).to(tl.float32)
    else:
        x_M = tl.load(x + m_M, mask=m_M < SIZE, other=0.0).to(tl.float32)
    if ADD:
        x_M = scale * x_M + tl.load(residual + at_M, mask=m_M < SIZE, other=0.0).to(tl.float32)
        x_M = x_M.to(residual.dtype.element_ty)
        tl.store(residual + at_M, x_M, mask=m_M < SIZE)
        x_M = x_M.to(tl.float32)
    if CENTRED:
        x_M = tl.where(m_M < SIZE, x_M - tl.sum(x_M, 0) / SIZE, 0.0)
    out_M = x_M * (1.0 / tl.sqrt(tl.sum(x_M * x_M, 0) / SIZE + eps)) * scale_M
    if BIAS:
        out_M += tl.load(bias + weight_M, mask=m_M < SIZE, other=0.0).to(tl.float32)
    tl.store(out + at_M, out_M.to(out.dtype.element_ty), mask=m_M < SIZE)


def gated(gate_TF: torch.Tensor, up_TF: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, contiguous [T, F]; gate and up may be halves of one joined product.

    `activation` is silu, x * sigmoid(x), or gelu_tanh, GELU by its tanh approximation (Hendrycks and
    Gimpel, 2016).
    """
    tokens, size = gate_TF.shape
    out_TF = torch.empty(tokens, size, dtype=gate_TF.dtype, device=gate_TF.device)
    _gated[tokens, triton.cdiv(size, 1024)](
        gate_TF, up_TF, out_TF, gate_TF.stride(0), up_TF.stride(0),
        SIZE=size, GELU=activation == "gelu_tanh", BLOCK=1024,
    )  # fmt: skip
    return out_TF


@kernel()
def _gated(
    gate,
    up,
    out,
    gate_row,
    up_row,
    SIZE: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    f_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_F = tl.load(gate + row * gate_row + f_F, mask=f_F < SIZE, other=0.0).to(tl.float32)
    up_F = tl.load(up + row * up_row + f_F, mask=f_F < SIZE, other=0.0).to(tl.float32)
    out_F = activated(x_F, up_F, out.dtype.element_ty, GELU)
    tl.store(out + row * SIZE + f_F, out_F.to(out.dtype.element_ty), mask=f_F < SIZE)


@triton.jit
def activated(gate, up, KIND: tl.constexpr, GELU: tl.constexpr):
    """activation(gate) * up in float32, both factors rounded to KIND as a model's modules round them."""
    x = gate.to(KIND).to(tl.float32)
    twice = x
    if GELU:  # (1 + tanh(y)) / 2 is the sigmoid of 2 y
        twice = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return (x / (1.0 + tl.exp(-twice))).to(KIND).to(tl.float32) * up.to(KIND).to(tl.float32)


def best_tokens(logits_BV: torch.Tensor) -> torch.Tensor:
    """The largest logit's token of each row, int64 [B], without a softmax; the first among equals.

    -1 for a row with a NaN, or whose largest logit is infinite: the sampler's own measure of a sound row.
    """
    rows, vocabulary = logits_BV.shape
    parts = triton.cdiv(vocabulary, PART)
    peaks_BS = torch.empty(rows, parts, dtype=torch.float32, device=logits_BV.device)
    tokens_BS = torch.empty(rows, parts, dtype=torch.int32, device=logits_BV.device)
    tokens_B = torch.empty(rows, dtype=torch.int64, device=logits_BV.device)
    _best_of_part[rows, parts](
        logits_BV, peaks_BS, tokens_BS, logits_BV.stride(0), VOCABULARY=vocabulary, PART=PART
    )
    _best_of_row[(rows,)](
        peaks_BS, tokens_BS, tokens_B, PARTS=parts, BLOCK=triton.next_power_of_2(parts), num_warps=1
    )
    return tokens_B


@kernel()
def _best_of_part(
    logits, peaks, tokens, logits_row, VOCABULARY: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr
):
    wait_for_previous(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v_V = part * PART + tl.arange(0, PART)
    x_V = tl.load(logits + row * logits_row + v_V, mask=v_V < VOCABULARY, other=float("-inf")).to(tl.float32)
    x_V = tl.where(x_V != x_V, float("inf"), x_V)  # NaN must not vanish in a maximum
    peak, at = tl.max(x_V, 0, return_indices=True)
    tl.store(peaks + row * tl.num_programs(1) + part, peak)
    tl.store(tokens + row * tl.num_programs(1) + part, part * PART + at)


@kernel()
def _best_of_row(peaks, tokens, out, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    s_S = tl.arange(0, BLOCK)
    peak_S = tl.load(peaks + row * PARTS + s_S, mask=s_S < PARTS, other=float("-inf"))
    peak, at = tl.max(peak_S, 0, return_indices=True)
    token = tl.load(tokens + row * PARTS + at)
    finite = (peak < float("inf")) & (peak > float("-inf"))
    tl.store(out + row, tl.where(finite, token, -1).to(tl.int64))
