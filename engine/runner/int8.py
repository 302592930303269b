"""int8 products on a CPU: weights quantized once, one scale an output; activations as they come, one scale a row.

A row's scale is its own, never the step's, and its sums are exact integers: nothing depends on what shares the step.
Symmetric, round to nearest. The few inputs that are far larger than the others would leave these no levels, so part of
their size goes into the weights: SmoothQuant (Xiao et al., 2023), on what ran through the model at load. The kernels
are oneDNN's; a CPU whose instructions would overflow on full-range weights is found out, and given less range.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from engine.errors import InputError
from engine.runner.linear import Product
from engine.runner.ways import ROWS, plain

LEVELS, ZERO = 127, 128  # an activation is -127 to 127 in steps of its row's scale, stored around 128 in a byte
ROUNDER = 1.5 * 2**23 + ZERO  # a float32 this large has a last digit of one: adding it rounds, half to even
LIMITS = (127, 64)  # of a weight: the whole range; without VNNI, what two products with a byte fit 16 bits with
EXACT = 1e-6  # of the largest: float32 sums of integers, one rounding of each
FAR = 2.0  # of the median input: whatever is larger gives the root of its excess to the weights


def rounded(x_TM: torch.Tensor, ease_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of float32, each input times its own factor, as bytes around ZERO [T, M], and the scale of each row [T, 1].

    A row that holds a NaN or an infinity gets a scale that makes its results no numbers; one of zeros gets scale 0.
    """
    x_TM = x_TM * ease_M
    scale_T1 = x_TM.abs().amax(-1, keepdim=True) / LEVELS
    # Adding puts the integer into the lowest bits, of which a byte is kept: fewer passes than rounding.
    return (x_TM / scale_T1).add_(ROUNDER).view(torch.int32).to(torch.uint8), scale_T1


class Int8:
    """A way to multiply by a weight, quantized to int8.

    Args:
        weight_NM: float32, on a CPU. It is not kept.
        peak_M: how large each input has been, beside the others of its row.

    Raises:
        InputError: where this machine's kernel does not give what the integers give.
    """

    def __init__(self, weight_NM: torch.Tensor, peak_M: torch.Tensor) -> None:
        limit = weight_limit()
        tiny = torch.finfo(torch.float32).tiny
        eased_M = (peak_M / (FAR * peak_M.median()).clamp(min=tiny)).clamp_(1.0, 2.0**16).sqrt_()
        self.ease_M = eased_M.reciprocal()
        weight_NM = weight_NM * eased_M
        self.scale_N = (weight_NM.abs().amax(1) / limit).clamp_(min=tiny)
        whole_NM = (weight_NM / self.scale_N[:, None]).round_()
        self._zero_N = torch.zeros(len(weight_NM), dtype=torch.int32)
        self._packed = torch.ops.onednn.qlinear_prepack(whole_NM.to(torch.int8), None)
        self.nbytes = whole_NM.numel() + self.scale_N.nbytes + self._zero_N.nbytes + self.ease_M.nbytes
        probe_2M = torch.arange(2 * whole_NM.shape[1]).mul_(97).remainder_(255).add_(1).view(2, -1)
        expected_2N = F.linear(probe_2M.float() - ZERO, whole_NM).mul_(self.scale_N)
        off = float((self._multiply(probe_2M.to(torch.uint8)) - expected_2N).abs().max())
        if not off <= EXACT * float(expected_2N.abs().max()):
            raise InputError(f"dtype='int8': this machine's int8 products are wrong (off by {off:.1e}): use float32")

    def __call__(self, x_TM: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        """[T, M] -> [T, N]."""
        q_TM, scale_T1 = rounded(x_TM, self.ease_M)
        out_TN = self._multiply(q_TM).mul_(scale_T1)
        return out_TN if bias_N is None else out_TN.add_(bias_N)

    def _multiply(self, q_TM: torch.Tensor) -> torch.Tensor:
        """Bytes around ZERO by the weight, [T, M] -> [T, N] float32."""
        return _linear(q_TM, self._packed, self.scale_N, self._zero_N)


def _linear(q_TM: torch.Tensor, packed: torch.Tensor, scale_N: torch.Tensor, zero_N: torch.Tensor) -> torch.Tensor:
    multiply = torch.ops.onednn.qlinear_pointwise
    return multiply(q_TM, 1.0, ZERO, packed, scale_N, zero_N, None, 1.0, 0, torch.float32, "none", [], "")


@functools.cache
def weight_limit() -> int:
    """The largest weight that this CPU multiplies exactly by any byte.

    Raises:
        InputError: if there is none.
    """
    size = 64
    ones, zeros = torch.ones(size), torch.zeros(size, dtype=torch.int32)
    try:
        for limit in LIMITS:
            packed = torch.ops.onednn.qlinear_prepack(torch.full((size, size), limit, dtype=torch.int8), None)
            found = _linear(torch.full((size, size), 255, dtype=torch.uint8), packed, ones, zeros)
            if bool((found == (255 - ZERO) * limit * size).all()):
                return limit
        problem = "gives wrong sums"
    except (RuntimeError, AttributeError) as error:
        problem = str(error).splitlines()[0]
    raise InputError(f"dtype='int8' needs oneDNN's int8 products, which fail here ({problem}): use dtype='float32'")


class Watched:
    """torch's own way to multiply, that remembers how large each input has been, in root mean squares of its row.

    For a row has a scale of its own: one that is large as a whole says nothing about which of its inputs are.
    """

    def __init__(self, weight_NM: torch.Tensor) -> None:
        self.weight_NM, self._multiply = weight_NM, plain(weight_NM)
        self.peak_M = torch.zeros(weight_NM.shape[1])

    def __call__(self, x_TM: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        """[T, M] -> [T, N]."""
        size_TM = x_TM.abs() / x_TM.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        self.peak_M = torch.maximum(self.peak_M, size_TM.amax(0))
        return self._multiply(x_TM, bias_N)


def watch(products: Sequence[Product]) -> dict[Product, Watched]:
    """Ready products in float32, copying no weight, to be proven before they are quantized."""
    watched = {product: Watched(product.joined()) for product in products}
    for product, way in watched.items():
        product.weights, product.ways = (), [(ROWS[-1], way)]
    return watched


def quantize(watched: dict[Product, Watched]) -> int:
    """Put int8 in place of the float32 weights of products that have run; gives the bytes that they take."""
    bytes_held = 0
    while watched:  # one after the other, so that no more than one is held twice
        product, old = watched.popitem()
        new = Int8(old.weight_NM, old.peak_M)
        product.ways = [(ROWS[-1], new)]
        bytes_held += new.nbytes
    return bytes_held
