"""The textbook's attention, and what the kernels for a GPU compute, in plain torch with the same
arguments: its tests run on any machine.

Written to be read: each token by itself over its own past.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from engine.models.decoder_parts import Norm


def write_pages(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_TE: torch.Tensor,
    sin_TE: torch.Tensor,
    slots_T: torch.Tensor,
    keys_XKPD: torch.Tensor,
    values_XKPD: torch.Tensor,
    out_THD: torch.Tensor | None = None,
) -> torch.Tensor:
    """As rope_kv_write.write_pages."""
    q_THD, k_TKD = (_rotated(x, cos_TE[:, None], sin_TE[:, None]) for x in (q, k))
    kept_T = (slots_T >= 0).nonzero()[:, 0]
    page_T, place_T = slots_T[kept_T] // keys_XKPD.shape[2], slots_T[kept_T] % keys_XKPD.shape[2]
    keys_XKPD[page_T, :, place_T] = k_TKD[kept_T]
    values_XKPD[page_T, :, place_T] = v[kept_T]
    return q_THD if out_THD is None else out_THD.copy_(q_THD)


def _rotated(x_THD: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor) -> torch.Tensor:
    """Rotate pairs that lie D / 2 apart."""
    first, second = x_THD.chunk(2, -1)
    return torch.cat([first * cos_T1E - second * sin_T1E, second * cos_T1E + first * sin_T1E], -1)


def chunk_tokens(groups: int, dim: int, element_bytes: int) -> int:
    """As kernels.chunk_tokens; a small number, so that a test sees several tiles."""
    return 8


def attend_chunks(
    q_THD: torch.Tensor,
    keys_XKPD: torch.Tensor,
    values_XKPD: torch.Tensor,
    tables_RN: torch.Tensor,
    begins_R: torch.Tensor,
    ends_R: torch.Tensor,
    computed_R: torch.Tensor,
    tiles_W2: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out_THD: torch.Tensor | None = None,
) -> torch.Tensor:
    """As kernels.attend_chunks."""
    out_THD = q_THD.new_empty(q_THD.shape) if out_THD is None else out_THD
    step = chunk_tokens(1, 1, 1)
    begins, ends, past = begins_R.tolist(), ends_R.tolist(), computed_R.tolist()
    for request, first in tiles_W2.tolist():
        for t in range(first, min(first + step, ends[request])) if request >= 0 else ():
            length = past[request] + t - begins[request] + 1
            out_THD[t] = _attend(
                q_THD[t], keys_XKPD, values_XKPD, tables_RN[request], length, scale, window, softcap
            )
    return out_THD


def attend_rows(
    q: torch.Tensor,
    keys_XKPD: torch.Tensor,
    values_XKPD: torch.Tensor,
    tables_RN: torch.Tensor,
    lengths_B: torch.Tensor,
    max_length: int,
    arrived_A: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    owners_B: torch.Tensor | None = None,
    split: int = 64,
    new: Any = None,
    out_BHD: torch.Tensor | None = None,
    ahead: torch.Tensor | None = None,
) -> torch.Tensor:
    """As kernels.attend_rows."""
    rows, (page, dim) = len(lengths_B), keys_XKPD.shape[2:]
    owners = range(rows) if owners_B is None else owners_B.tolist()
    if new is not None:
        k, v = new.k, new.v
        if q.dim() == 4:  # partial sums
            sizes = [x.shape[-2] for x in (q, k, v)]
            biases = [0, 0, 0] if new.bias_N is None else new.bias_N.view(-1, dim).split(sizes)
            sums = [x.sum(0) + bias for x, bias in zip((q, k, v), biases, strict=True)]
            q, k, v = (x.to(keys_XKPD.dtype) for x in sums)
        last_B = lengths_B.long() - 1
        page_B = tables_RN[list(owners), last_B.clamp(min=0) // page].long()
        slots_B = torch.where(last_B < 0, -1, page_B * page + last_B % page)
        angles = new.angles_LD[new.positions_B].chunk(2, -1)
        q = write_pages(q, k, v, *angles, slots_B, keys_XKPD, values_XKPD)
    out_BHD = torch.empty_like(q) if out_BHD is None else out_BHD
    for row, (owner, length) in enumerate(zip(owners, lengths_B.tolist(), strict=True)):
        assert length <= max_length, "the bound of the grid is too low"
        out_BHD[row] = _attend(
            q[row], keys_XKPD, values_XKPD, tables_RN[owner], length, scale, window, softcap
        )
    return out_BHD


def _attend(
    q_HD: torch.Tensor,
    keys_XKPD: torch.Tensor,
    values_XKPD: torch.Tensor,
    table_N: torch.Tensor,
    length: int,
    scale: float,
    *options: Any,
) -> torch.Tensor:
    """Attention of the last of `length` positions, [H, D]; zeros where there are none."""
    if length == 0:
        return torch.zeros_like(q_HD)
    pages_N = table_N[: -(-length // keys_XKPD.shape[2])].long()
    k_KCD, v_KCD = (x[pages_N].transpose(0, 1).flatten(1, 2)[:, :length] for x in (keys_XKPD, values_XKPD))
    return attention(q_HD, k_KCD, v_KCD, scale, *options).to(q_HD.dtype)


def attention(
    q_HD: torch.Tensor,
    k_KCD: torch.Tensor,
    v_KCD: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """The textbook's attention of the last of C positions, [H, D] in float64.

    Query heads share KV heads in their order: of H = 4 and K = 2, heads 0 and 1 read the first.

    Args:
        window: how many positions are seen, the last included; all without one.
        sink_H: logits that take weight and have no value.
    """
    first = max(0, k_KCD.shape[1] - window) if window else 0
    q_KGD = q_HD.double().unflatten(0, (len(k_KCD), -1))
    scores_KGC = q_KGD @ k_KCD[:, first:].double().transpose(1, 2) * scale
    if softcap is not None:
        scores_KGC = softcap * torch.tanh(scores_KGC / softcap)
    weights_KGC = (scores_KGC - scores_KGC.amax()).exp()
    total_KG1 = weights_KGC.sum(-1, keepdim=True)
    if sink_H is not None:
        total_KG1 = total_KG1 + (sink_H.double().view_as(total_KG1) - scores_KGC.amax()).exp()
    return (weights_KGC / total_KG1 @ v_KCD[:, first:].double()).flatten(0, 1)


def best_tokens(logits_BV: torch.Tensor) -> torch.Tensor:
    """As norm_activation.best_tokens."""
    peak_B, token_B = logits_BV.max(-1)
    return torch.where(torch.isfinite(peak_B), token_B, -1)


def step_inputs(
    inputs_3T: torch.Tensor, last_B: torch.Tensor, tables_RN: torch.Tensor, page: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As norm_activation.step_inputs."""
    given_T, at_T, line_T = inputs_3T.long()
    ids_T = torch.where(given_T < 0, last_B[(-1 - given_T).clamp(min=0)], given_T).clamp(min=0)
    place_T = at_T.clamp(min=0)
    slots_T = tables_RN[line_T, place_T // page].long() * page + place_T % page
    return ids_T, place_T, torch.where(at_T < 0, -1, slots_T), (at_T + 1).int()


def norm(x: torch.Tensor, by: Norm, parts_of: torch.dtype | None = None) -> torch.Tensor:
    """As norm_activation.norm."""
    x = x if parts_of is None else x.sum(0).to(parts_of)
    wide = x.float() - x.float().mean(-1, keepdim=True) if by.centred else x.float()
    normed = wide * (wide.square().mean(-1, keepdim=True) + by.eps).rsqrt()  # in float32, as models do
    found = normed.to(by.scale.dtype) * by.scale
    return (found if by.bias is None else found + by.bias).to(x.dtype)


def add_norm(residual_TM: torch.Tensor, x: torch.Tensor, by: Norm, scale: float = 1.0) -> torch.Tensor:
    """As norm_activation.add_norm."""
    x_TM = x.sum(0).to(residual_TM.dtype) if x.dim() == 3 else x
    return norm(residual_TM.add_(x_TM, alpha=scale), by)


def gated(gate_TF: torch.Tensor, up_TF: torch.Tensor, activation: str) -> torch.Tensor:
    """As norm_activation.gated."""
    return (F.silu(gate_TF) if activation == "silu" else F.gelu(gate_TF, approximate="tanh")) * up_TF


class NewTokens(NamedTuple):
    """As decode_attention.NewTokens."""

    k: torch.Tensor
    v: torch.Tensor
    positions_B: torch.Tensor
    angles_LD: torch.Tensor
    bias_N: torch.Tensor | None = None


def split_size(rows: int, kv_heads: int) -> int:
    """As decode_attention.split_size."""
    return 64


class Unnormed(NamedTuple):
    """As one_row.Unnormed."""

    by: Norm
    squares_P: torch.Tensor


def row_product(
    x_1M: torch.Tensor,
    weight_NM: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    unnormed: Unnormed | None = None,
    ahead: torch.Tensor | None = None,
) -> torch.Tensor:
    """As one_row.row_product."""
    return F.linear(_normed(x_1M, unnormed), weight_NM, bias_N)


def _normed(x_1M: torch.Tensor, unnormed: Unnormed | None) -> torch.Tensor:
    """The norm of what its sums of squares are of."""
    if unnormed is None:
        return x_1M
    found, square = unnormed.squares_P.sum().float(), x_1M.float().square().sum()
    torch.testing.assert_close(found, square, rtol=1e-4, atol=1e-5, equal_nan=True)
    return norm(x_1M, unnormed.by)


def add_row_product(
    residual_1N: torch.Tensor, x_1M: torch.Tensor, weight_NM: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """As one_row.add_row_product."""
    residual_1N.add_(F.linear(x_1M, weight_NM), alpha=scale)
    wide_1N = residual_1N.to(torch.promote_types(residual_1N.dtype, torch.float32))
    return torch.stack([part.square().sum() for part in wide_1N.tensor_split(3, 1)])


def gated_row_product(
    x_1M: torch.Tensor, weight_NM: torch.Tensor, activation: str, unnormed: Unnormed | None = None
) -> torch.Tensor:
    """As one_row.gated_row_product."""
    return gated(*F.linear(_normed(x_1M, unnormed), weight_NM).chunk(2, -1), activation)


def max_split_rows(dtype: torch.dtype, layer_bytes: int) -> int:
    """As split_k.max_split_rows; a small number, so that tests see steps of more."""
    return 5


def split_k_product(
    x_TM: torch.Tensor, weight_NM: torch.Tensor, ahead: torch.Tensor | None = None
) -> torch.Tensor:
    """As split_k.split_k_product, in three parts."""
    wide = torch.promote_types(x_TM.dtype, torch.float32)
    parts = zip(x_TM.to(wide).tensor_split(3, 1), weight_NM.to(wide).tensor_split(3, 1), strict=True)
    return torch.stack([x @ weight.T for x, weight in parts])


def split_k_gated(x_TM: torch.Tensor, weight_NM: torch.Tensor, activation: str) -> torch.Tensor:
    """As split_k.split_k_gated."""
    return gated(*F.linear(x_TM, weight_NM).chunk(2, -1), activation)
