"""Peak host memory of one round: what is resident of this process, weights and everything else included."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import psutil

PROCESS = Path("/proc/self")


class HostMemory:
    """Measures between `begin` and `peak`, round after round.

    On Linux it is the kernel's high-water mark (VmHWM), reset at `begin` by writing "5" to clear_refs: that
    touches nothing else, takes some 20 us, and leaves out what loading the model took for a moment. Where
    there is no such file, or it may not be written (in a sandbox, or by another user's rules), it is what is
    resident when the round has ended, by psutil: a lower bound of the peak, of all rounds alike.

    Args:
        process: the process's folder in /proc.
    """

    def __init__(self, process: Path = PROCESS) -> None:
        self._status, self._reset = process / "status", process / "clear_refs"
        self.has_peak = self._can_reset()

    def begin(self) -> None:
        """Forget the peak of what was before."""
        if self.has_peak:
            self._reset.write_text("5")

    def peak(self) -> int:
        """Return the bytes, of the time since `begin`."""
        if not self.has_peak:
            return int(psutil.Process().memory_info().rss)
        found = _high_water_mark(self._status)
        assert found is not None  # it was there at first
        return found

    def _can_reset(self) -> bool:
        try:
            if _high_water_mark(self._status) is None:
                return False
            self._reset.write_text("5")
        except OSError:
            return False
        return True


def give_back() -> None:
    """Give what is free in the heap back to the system, where glibc's malloc_trim can.

    What was freed stays resident in some processes and not in others, by where the last small block of the
    heap happens to lie: of twelve processes of the same code four had 19 MiB more than the others.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _high_water_mark(status: Path) -> int | None:
    """Return VmHWM in bytes, or None where a kernel does not tell it."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
    return None if found is None else int(found[1]) * 1024
