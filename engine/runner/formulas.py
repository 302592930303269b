"""What a lean layer computes, as functions of tensors: run by torch, or compiled once a machine.

T tokens, M width, N outputs of a product, H query heads, K KV heads, D head size, E half of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from engine.attention.rows import attend_rows, multiply_seen
from engine.runner.ways import FEW, multiply_packed, multiply_panels


@dataclass(frozen=True)
class Rotate:
    """From the product of rows that were not normed to the queries, keys and values of attention.

    A norm divides a row by one number, and so does it to the row's products: that can wait until they are read anyway.
    `head_eps` is the epsilon of the norms of queries and keys, None without.
    """

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    head_eps: float | None
    biased: bool

    @property
    def constants(self) -> int:
        """How many there are."""
        return self.biased + (self.head_eps is not None)

    def __call__(
        self, x_TM: torch.Tensor, product_TN: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor,
        *constants: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """[T, H, D] and twice [T, K, D]; the constants are the bias [N] and the weights of the heads' norms [H + K, D],
        as far as there are any."""
        heads_THD = product_TN * normer(x_TM, self.eps)
        if self.biased:
            heads_THD = heads_THD + constants[0]
        heads_THD = heads_THD.unflatten(1, (-1, self.head_dim))
        qk_THD, v_TKD = heads_THD.split((self.heads + self.kv_heads, self.kv_heads), 1)
        if self.head_eps is not None:
            qk_THD = qk_THD * normer(qk_THD, self.head_eps) * constants[-1]
        a_THE, b_THE = qk_THD.chunk(2, -1)  # dimension i and i + D/2 are a point of a plane, turned by an angle
        qk_THD = torch.cat([a_THE * cos_T1E - b_THE * sin_T1E, b_THE * cos_T1E + a_THE * sin_T1E], -1)
        return qk_THD[:, : self.heads].clone(), qk_THD[:, self.heads :].clone(), v_TKD.clone()


@dataclass(frozen=True)
class Gate:
    """From the product of rows that were not normed, gates beside values, to what goes into the last product.

    The product is overwritten: torch takes no longer for that than a compiled loop.
    """

    activation: nn.Module
    eps: float
    biased: bool

    def __call__(self, x_TM: torch.Tensor, product_TN: torch.Tensor, *bias_N: torch.Tensor) -> tuple[torch.Tensor]:
        """[T, N / 2]."""
        both_TN = product_TN.mul_(normer(x_TM, self.eps))
        if self.biased:
            both_TN = both_TN.add_(bias_N[0])
        gate_TF, up_TF = both_TN.chunk(2, -1)
        return (self.activation(gate_TF).mul_(up_TF),)


@dataclass(frozen=True)
class Turn:
    """Rotate for all tokens of a step, and attention for those of them that are rows."""

    rotate: Rotate

    def __call__(
        self, x_TM: torch.Tensor, product_TN: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor,
        tokens_R: torch.Tensor, *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """What Rotate gives, and [R, H, D].

        The other tensors are the eight of `attend_rows` after queries, keys and values, and Rotate's constants.
        """
        q_THD, k_TKD, v_TKD = self.rotate(x_TM, product_TN, cos_T1E, sin_T1E, *tensors[8:])
        q_RHD, k_RKD, v_RKD = (x_TD[tokens_R] for x_TD in (q_THD, k_TKD, v_TKD))
        out_RHD = attend_rows(q_RHD, k_RKD, v_RKD, *tensors[:8], multiply=multiply_seen)
        return q_THD, k_TKD, v_TKD, out_RHD


@dataclass(frozen=True)
class Layer:
    """A whole layer for rows of one token, its products by weights that oneDNN has packed, or by weights in panels."""

    rotate: Rotate
    gate: Gate
    panels: bool

    def __call__(
        self, x_BRM: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """[B, FEW, M] -> the same, T rows in all.

        The other tensors are the weights of the four products, the eight of `attend_rows` after keys and values of the
        rows, and the constants of Rotate and Gate.
        """
        weights, pages, constants = tensors[:4], tensors[4:12], tensors[12:]
        turning, gating = constants[: self.rotate.constants], constants[self.rotate.constants :]
        x_TM = x_BRM.flatten(0, 1)
        qkv = (self.rotate.heads + 2 * self.rotate.kv_heads) * self.rotate.head_dim
        sizes = qkv, x_TM.shape[1], 2 * weights[3].shape[1], x_TM.shape[1]

        def multiply(index: int, x_TM: torch.Tensor, add_TN: torch.Tensor | None = None) -> torch.Tensor:
            if self.panels:
                return multiply_panels(x_TM, weights[index], sizes[index], add_TN)
            return multiply_packed(x_TM, weights[index], add_TN)

        q_THD, k_TKD, v_TKD = self.rotate(x_TM, multiply(0, x_TM), cos_T1E, sin_T1E, *turning)
        mixed_THD = attend_rows(q_THD, k_TKD, v_TKD, *pages, multiply=multiply_seen)
        x_TM = multiply(1, mixed_THD.flatten(1), x_TM)
        (inner_TF,) = self.gate(x_TM, multiply(2, x_TM), *gating)
        return (multiply(3, inner_TF, x_TM).unflatten(0, (-1, FEW)),)


def normer(x: torch.Tensor, eps: float) -> torch.Tensor:
    """What an RMS norm multiplies the last dimension by, 1 / sqrt(mean(x^2) + eps)."""
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()
