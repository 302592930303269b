"""Values that no caller should give, and some callers do."""

from __future__ import annotations

HALF = "x \ud83d"  # what JSON's "x \ud83d" gives: half of a surrogate pair
LONG = 10**5000  # too many digits even for its repr


class Raises:
    """What raises whenever it is looked at."""

    def __len__(self):
        raise KeyError("mine")

    __iter__ = __getitem__ = __repr__ = __bool__ = __len__
