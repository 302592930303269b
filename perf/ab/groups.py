"""What was measured in turn: turns, groups of turns, and which groups the machine spoiled.

A turn is some rounds of one side while the other sleeps. A group is four turns, base and head in ABBA or BAAB
order, so close together that they saw the same machine. It is left out where the machine was taken away
meanwhile, by rules that are fixed beforehand and look at neither side's times (`spoiled`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import scipy.stats

SIDES = (0, 1)
ORDERS = ((0, 1, 1, 0), (1, 0, 0, 1))  # 0 is base, 1 is head
PACE = 1.8  # the machine changed its pace within the group by this much
STOLEN = 0.05  # of the group's time
SWITCHES, SWITCHES_PER_S = 4, 50  # times that the processor was taken from the process
BIASED = 0.01  # a p at which what was taken away belongs to one side, and so perhaps to its code
MOST_SPOILED = 0.5

Sample = Mapping[str, Any]  # of one round: metric -> number, or its raw values where it is pooled


@dataclass(frozen=True, slots=True)
class Turn:
    """Some rounds of one side, as its process told them.

    seconds: wall time of the whole turn. cpu_s: processor time of all threads. samples: one a round.
    canary_s: a fixed piece of work, before and after. stolen_s: what the hypervisor gave to others, of a
    processor. switches: involuntary. faults: pages read from a disk. children: whether
    the process had some. served: whether a server did the work, which may be on the same processors: then
    neither the canary's pace nor switches tell what the machine did.
    """

    seconds: float
    cpu_s: float
    samples: tuple[Sample, ...]
    canary_s: tuple[float, float]
    stolen_s: float
    switches: int
    faults: int
    children: bool = False
    served: bool = False

    @classmethod
    def of(cls, told: Mapping[str, Any], served: bool) -> Turn:
        """Read it from a process's message."""
        samples, canary = tuple(told["samples"]), (told["canary_s"][0], told["canary_s"][1])
        marks = told["stolen_s"], told["switches"], told["faults"], told["children"]
        return cls(told["seconds"], told["cpu_s"], samples, canary, *marks, served)

    @property
    def voided(self) -> bool:
        """Whether the hardware itself says that it was slow."""
        return any(sample.get("voided") for sample in self.samples)

    def disturbed(self) -> str | None:
        """What says that this turn's processor was taken away, if anything does."""
        if self.voided:
            return "hardware slowdown"
        if self.stolen_s > STOLEN * self.seconds and self.stolen_s > 0.02:
            return "steal"
        if self.faults:
            return "page faults"
        if not self.served and self.switches > SWITCHES + SWITCHES_PER_S * self.seconds:
            return "context switches"
        return None


@dataclass(frozen=True, slots=True)
class Group:
    """Four turns. order: whose each one was."""

    order: tuple[int, ...]
    turns: tuple[Turn, ...]

    def of(self, side: int) -> list[Sample]:
        """The rounds of one side."""
        both = zip(self.order, self.turns, strict=True)
        return [sample for whose, turn in both if whose == side for sample in turn.samples]

    @property
    def seconds(self) -> float:
        return sum(turn.seconds for turn in self.turns)

    def spoiled(self) -> str | None:
        """What says that the machine was not the same throughout, if anything does."""
        reasons = [reason for turn in self.turns if (reason := turn.disturbed())]
        if reasons:
            return reasons[0]
        return "pace" if any(self._is_slow(turn) for turn in self.turns) else None

    def disturbed_sides(self) -> list[int]:
        """The side of each turn that was disturbed by itself, or slower than the others by its canary."""
        both = zip(self.order, self.turns, strict=True)
        return [side for side, turn in both if turn.disturbed() or self._is_slow(turn)]

    def _is_slow(self, turn: Turn) -> bool:
        fastest = min(min(one.canary_s) for one in self.turns)
        return not turn.served and max(turn.canary_s) > PACE * fastest


@dataclass(frozen=True, slots=True)
class Disturbances:
    """What the machine took of some groups. why_kept: why spoiled groups were judged nevertheless."""

    groups: int
    spoiled: Mapping[str, int]
    share: float  # of the measuring time
    why_kept: str | None = None

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Disturbances:
        """Look at all groups of a benchmark together."""
        reasons = [group.spoiled() for group in groups]
        spoiled = {why: reasons.count(why) for why in dict.fromkeys(reasons) if why is not None}
        lost = sum(g.seconds for g, why in zip(groups, reasons, strict=True) if why is not None)
        share = lost / total if (total := sum(group.seconds for group in groups)) else 0.0
        sides = [side for group in groups for side in group.disturbed_sides()]
        why = None
        if sides and scipy.stats.binomtest(sum(sides), len(sides)).pvalue < BIASED:
            whose = "head" if 2 * sum(sides) > len(sides) else "base"
            why = f"{whose} was disturbed far more often, which may be its own doing"
        elif sum(spoiled.values()) > MOST_SPOILED * len(groups):
            why = "most of them were, so this is how the machine is"
        return cls(len(groups), spoiled, share, why)

    def kept(self, groups: Sequence[Group]) -> list[Group]:
        """The groups to be judged: never one in which the hardware itself was slow."""
        if self.why_kept:
            return [group for group in groups if not any(turn.voided for turn in group.turns)]
        return [group for group in groups if group.spoiled() is None]
