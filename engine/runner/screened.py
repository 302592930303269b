"""The largest of a row's logits, from a bfloat16 product that rules out most tokens and a float32 one that decides.

Greedy decoding wants the largest of V logits, and in a small model much of a step is the output layer. Half as many
bytes, multiplied at twice the speed where the CPU knows bfloat16, show for almost every token that it can't be the
largest: how far such a logit may lie from the exact one is known. The few that are left are computed as they are.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from engine.runner.linear import Part, Product
from engine.runner.ways import ROWS, Packed, choose

SCREENED = "screened"  # the way's name where it is kept
BLOCK = 64  # tokens that are looked at together first
DIGITS = 2.0**-8  # of a bfloat16: rounding is off by half of that
SLACK = 1.001  # for the rounding of the bounds themselves
RARE = 32  # one token of so many may be left; if there are more, the whole product is quicker


class Screened(Product):
    """The product of an output layer without a bias, where `largest` says whether only that of each row counts.

    With w' and x' for w and x rounded to bfloat16, |w x - w' x'| <= |w - w'| |x| + |w'| |x - x'| (Cauchy-Schwarz); to
    this come the rounding of the sum and of the result. C blocks of B tokens.

    Args:
        whole: gives all logits. It is prepared.
        weight_VM: its weight, float32; not copied.
    """

    def __init__(self, whole: Product, weight_VM: torch.Tensor) -> None:
        super().__init__([weight_VM], [])
        self.whole, self.largest = whole, False
        self.ways = [(ROWS[-1], self.screen)]
        rounded_VM = weight_VM.bfloat16()
        self._packed, self.nbytes = Packed(rounded_VM), rounded_VM.nbytes
        length_V = rounded_VM.float().norm(dim=1) * SLACK
        lost_V = (weight_VM - rounded_VM).norm(dim=1) * SLACK
        lost_V += length_V * weight_VM.shape[1] * torch.finfo(torch.float32).eps
        self._length_CB, self._lost_CB = length_V.view(-1, BLOCK), lost_V.view(-1, BLOCK)
        self._length_C, self._lost_C = self._length_CB.amax(1), self._lost_CB.amax(1)

    def __call__(self, x_RM: torch.Tensor, add_RV: torch.Tensor | None = None) -> torch.Tensor:
        """[R, M] -> logits [R, V]."""
        return super().__call__(x_RM) if self.largest else self.whole(x_RM, add_RV)

    def screen(self, x_RM: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
        """A way: [R, M] -> [R, V], the logits of all tokens that may be the largest of a row, and -inf for the others.

        A row with a NaN or an infinity gets -inf throughout.
        """
        (weight_VM,), rounded_RM = self.weights, x_RM.bfloat16()
        length_R1, lost_R1 = x_RM.norm(dim=1, keepdim=True), (x_RM - rounded_RM).norm(dim=1, keepdim=True)
        logits_RV = self._packed(rounded_RM, None, None).float()
        logits_RCB = logits_RV.unflatten(1, (-1, BLOCK))
        peak_RC = logits_RCB.amax(-1)
        off_RC = self._lost_C * length_R1 + self._length_C * lost_R1 + peak_RC.abs() * DIGITS
        floor_R1 = (peak_RC - off_RC).amax(1, keepdim=True)
        row_N, block_N = (peak_RC + off_RC >= floor_R1).nonzero(as_tuple=True)
        left_NB = logits_RCB[row_N, block_N]
        off_NB = self._lost_CB[block_N] * length_R1[row_N] + self._length_CB[block_N] * lost_R1[row_N]
        at, within = (left_NB + off_NB + left_NB.abs() * DIGITS >= floor_R1[row_N]).nonzero(as_tuple=True)
        if len(at) * RARE > len(weight_VM):
            return self.whole(x_RM)
        row, token = row_N[at], block_N[at] * BLOCK + within
        logits_RV.fill_(-torch.inf)[row, token] = (weight_VM[token] * x_RM[row]).sum(1)
        return logits_RV


def screen_largest(packed: PreTrainedModel, model: PreTrainedModel) -> Screened | None:
    """Put a Screened where the output layer of a packed twin of `model` was; None if there it can't be, or not pay."""
    part, head = packed.get_output_embeddings(), model.get_output_embeddings()
    if not isinstance(part, Part) or part.shared.product.sizes != [len(head.weight)] or head.bias is not None:
        return None
    if len(head.weight) % BLOCK or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    whole, weight_VM = part.shared.product, head.weight.data

    def all_of_it(x_RM: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
        return whole(x_RM)

    makers = {"whole": lambda _: all_of_it, SCREENED: lambda weight_VM: Screened(whole, weight_VM).screen}
    rule = choose([lambda: weight_VM], makers)
    if SCREENED not in {name for _, name in rule}:
        return None
    part.shared.product = screened = Screened(whole, weight_VM)
    screened.ways = [(most, screened.screen if name == SCREENED else all_of_it) for most, name in rule]
    return screened
