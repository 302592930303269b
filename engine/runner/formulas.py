"""What a lean layer computes, as functions of tensors: run by torch, or compiled once a machine.

T tokens, M width, N outputs of a product, H query heads, K KV heads, D head size, E half of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from engine.attention.rows import attend_rows, multiply_seen
from engine.runner.ways import filled, multiply_packed


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
    """A whole layer for rows of one token, its products by weights that oneDNN has packed."""

    rotate: Rotate
    gate: Gate

    def __call__(
        self, x_TM: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """[T, M] -> [T, M].

        The other tensors are the packed weights of the four products, the eight of `attend_rows` after keys and values
        of the rows, and the constants of Rotate and Gate.
        """
        (qkv, out, gate_up, down), pages = tensors[:4], tensors[4:12]
        constants = tensors[12:]
        turning, gating = constants[: self.rotate.constants], constants[self.rotate.constants :]
        q_THD, k_TKD, v_TKD = self.rotate(x_TM, multiply_packed(x_TM, qkv), cos_T1E, sin_T1E, *turning)
        mixed_THD = attend_rows(q_THD, k_TKD, v_TKD, *pages, multiply=multiply_seen)
        x_SM = multiply_packed(filled(mixed_THD.flatten(1)), out, filled(x_TM))  # S: T, or a few
        (inner_SF,) = self.gate(x_SM, multiply_packed(x_SM, gate_up), *gating)
        return (multiply_packed(inner_SF, down, x_SM)[: x_TM.shape[0]],)


def normer(x: torch.Tensor, eps: float) -> torch.Tensor:
    """What an RMS norm multiplies the last dimension by, 1 / sqrt(mean(x^2) + eps)."""
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()
