"""The rules from a row of logits to a token, in the order they apply, and what both implementations share.

1. Broken logits: a NaN, or a largest logit that is infinite, makes the row NON_FINITE. Any other -inf is a
   token that the model rules out.
2. `repetition_penalty` (CTRL; Keskar et al., 2019) divides positive and multiplies negative logits of tokens
   seen, in prompt or output and however often, in float64.
3. `min_new_tokens`: before there are as many, stop tokens get -inf. A row with nothing else is ALL_BANNED.
4. Rank: by logit, and among equals the lower id first. At `temperature` 0 the first is the choice;
   filters keep the first few; `logprobs` lists the first few by the model's own logits.
5. `temperature`: above 0 a token weighs exp((logit - largest) / temperature), in float64.
6. `min_p` (Nguyen et al., 2024) drops tokens that weigh less than min_p times the largest weight.
7. `top_k` keeps k tokens, or all if it is 0.
8. `top_p` (nucleus sampling; Holtzman et al., 2019) keeps the fewest that reach this share of what is left.
9. Draw: inverse CDF in vocabulary order, by a random number keyed by (seed, output position). So a row's
   token depends on that row and its request alone: neither batch-mates nor preemption can change it.
10. `logprobs` are the log-softmax of the model's own logits, in float64, whatever 2 to 8 made of them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

ROUNDING = 1e-6  # the share of min_p and of top_p that may be missing: logits in float32 know no better


def known(tokens: Iterable[int], size: int) -> list[int]:
    """Return the tokens below `size`, the number of logits, each once: a config may name or embed others."""
    return [token for token in set(tokens) if 0 <= token < size]


def penalised(logits: Any, penalty: float, where: Callable[..., Any]) -> Any:
    """Return float64 logits after the penalty, which makes none impossible; `where` is numpy's or torch's."""
    changed = where(logits > 0, logits / penalty, logits * penalty)
    return where(logits == -math.inf, logits, changed.clip(-sys.float_info.max, sys.float_info.max))


def below_peak(min_p: float) -> float:
    """Return how far below the largest logit min_p lets a token lie, at a temperature of 1."""
    return -math.log(min_p * (1.0 - ROUNDING)) if min_p > 0 else math.inf


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that is a pure function of its arguments (Philox; Salmon et al., 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())
