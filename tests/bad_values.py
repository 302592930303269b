"""Values that no caller should give, and some callers do."""

from __future__ import annotations

HALF = "x \ud83d"  # what JSON's "x \ud83d" gives: half of a surrogate pair
LONG = 10**5000  # too many digits even for its repr


class Raises:
    """What raises whenever it is looked at."""

    def __len__(self):
        raise KeyError("mine")

    __iter__ = __getitem__ = __repr__ = __bool__ = __len__


class RaisingList(list):
    """A Sequence that raises as soon as it is read."""

    def __len__(self):
        raise KeyError("mine")

    __iter__ = __len__


class Unreadable:
    def __getattr__(self, name):
        raise RuntimeError(name)


class NoNumber(int):
    def __int__(self):
        raise RuntimeError("no number")


class Pretender:
    __class__ = int
