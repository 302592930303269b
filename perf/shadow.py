"""Explanation where this package cannot be imported whole, most often for another package named `engine`.

It imports nothing of ours: that is what may be at fault.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder

USAGE = 2  # of perf.errors.Exit, which cannot be imported then


def explain(error: BaseException, way_out: str) -> str:
    """One line for an import of ours that failed.

    Args:
        error: what the import raised.
        way_out: what to do where another package hides ours.
    """
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    spec = PathFinder.find_spec("engine", sys.path)
    found = spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), None))
    ours = os.path.join(here, "engine")
    if found and os.path.realpath(os.path.dirname(found)) != os.path.realpath(ours) and os.path.isdir(ours):
        return f"another package named engine, {found}, hides the one that perf needs: {way_out}"
    why = " ".join(str(error).split()) or type(error).__name__
    return f"perf cannot be imported ({why}): pip install 'dynamic-batch[perf]'"
