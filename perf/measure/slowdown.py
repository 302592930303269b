"""What slowdown to inject, as it is written on the command line. A leaf: it imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine import InputError

CHUNKS = "chunks"
FORMS = "0.05 (every step 5 % longer), 0.2@chunks (only steps with a chunk of a prompt), 1.5@10 (each tenth)"


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Steps to stretch to 1 + `fraction` times their length.

    every: of the steps as they are launched, each that ends a run of so many. chunks: of those, only the ones
    in which a chunk of a prompt is computed.
    """

    fraction: float
    every: int = 1
    chunks: bool = False

    @classmethod
    def parse(cls, spec: float | str) -> Slowdown:
        """Return the slowdown that is meant.

        Args:
            spec: a fraction, as a number or as text, for every step; `FRACTION@chunks` for steps in which
                some request computes a chunk of its prompt: more than one token, or one after which its next
                token cannot be chosen yet; `FRACTION@N` for the N-th step, the 2N-th and so on, counted from
                where the slowdown begins.

        Raises:
            InputError: for anything else, naming the forms.
        """
        text, at, which = str(spec).partition("@")
        try:
            fraction = float(text)
        except ValueError:
            raise _wrong(spec) from None
        if not 0 <= fraction < math.inf:
            raise _wrong(spec)
        if not at:
            return cls(fraction)
        if which == CHUNKS:
            return cls(fraction, chunks=True)
        if not (which.isascii() and which.isdecimal() and int(which)):
            raise _wrong(spec)
        return cls(fraction, every=int(which))


def _wrong(spec: object) -> InputError:
    return InputError(f"inject_slowdown={spec} must be a fraction of 0 or more, in one of the forms {FORMS}")
