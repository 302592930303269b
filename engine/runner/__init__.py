"""From a step to next tokens. Runners differ only in how they hold keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from engine.sampler import Choice


@dataclass(frozen=True, slots=True)
class StepResult:
    """What running a step gave and what it cost.

    `choices` has one entry a request of the step, in its order. `tokens_computed` counts useful positions,
    `padded_tokens` the others. `model_s` is the time between handing the first tensor to the model and holding the
    sampled tokens on the host, less the building of inputs in between (seconds). `kv_bytes` is what is allocated.
    """

    choices: list[Choice]
    forward_passes: int
    tokens_computed: int
    padded_tokens: int
    model_s: float
    kv_bytes: int
