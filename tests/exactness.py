"""How far a kernel may lie from its definition in float64, on the device that kernels are tested on: the GPU
where there is one, else Triton's interpreter."""

from __future__ import annotations

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# ‖found - expected‖ / ‖expected‖: rounding of the result, and of the weights before the second product.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    found, expected = found.double().cpu(), expected.double().cpu()
    assert found.shape == expected.shape
    scale = expected.norm().clamp(min=1e-6)
    assert float((found - expected).norm() / scale) <= (tolerance or TOLERANCE[torch.float32])
