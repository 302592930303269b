"""The accuracy that int8 costs: one text through a model in float32 and in int8, next token by next token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from engine import Engine, EngineConfig, InputError, LoadedModel


@torch.inference_mode()
def accuracy(loaded: LoadedModel, tokens: list[int], kv_memory: int = 2**26) -> dict[str, Any]:
    """Return the perplexity of a text in each dtype, the share of next tokens whose likeliest is the same in
    both, and KL(float32 | int8) in nats.

    Raises:
        InputError: for less than two tokens, or a model that int8 refuses.
    """
    if len(tokens) < 2:
        raise InputError(
            f"the text has {len(tokens)} tokens, and 2 are the least that can be scored: give more"
        )
    scores_NTV, targets_T = [], torch.tensor(tokens[1:])
    for dtype in ("float32", "int8"):
        runner: Any = Engine(loaded, EngineConfig(runner="packed", dtype=dtype, kv_memory=kv_memory)).runner
        scores_NTV.append(runner.logits(tokens[:-1]).log_softmax(-1))
    exact_TV, found_TV = scores_NTV
    perplexity, rounded = (float(F.nll_loss(scores_TV, targets_T).exp()) for scores_TV in scores_NTV)
    return {
        "tokens": len(targets_T),
        "perplexity_float32": perplexity,
        "perplexity_int8": rounded,
        "same_top_1": float((exact_TV.argmax(-1) == found_TV.argmax(-1)).float().mean()),
        "kl_nats": float(F.kl_div(found_TV, exact_TV, log_target=True, reduction="batchmean")),
    }
