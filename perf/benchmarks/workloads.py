"""Workloads that isolate one thing: so many requests of exactly these lengths, at once."""

from __future__ import annotations

import numpy as np

from engine import SamplingParams, WorkItem, Workload


def fixed(requests: int, prompt: int, output: int, vocab_size: int, seed: int = 0) -> Workload:
    """Return `requests` prompts of `prompt` random tokens from [vocab_size // 8, vocab_size), `output` tokens
    out each."""
    draw = np.random.default_rng([seed, requests, prompt, output])
    params = SamplingParams(max_new_tokens=output, temperature=0.0, repetition_penalty=1.0, ignore_eos=True)
    prompts = draw.integers(vocab_size // 8, vocab_size, (requests, prompt)).tolist()
    return Workload(
        f"fixed-{requests}x{prompt}+{output}", seed, "all", tuple(WorkItem(ids, params) for ids in prompts)
    )
