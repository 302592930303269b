"""Charts of lines and bars: what they show, and where the marks of lines lie; charts.html.j2 draws them.

Pictures are 400 units wide, so that text stays readable on a phone and three fit beside each other on a desk.
It knows numbers and names, no runs and no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perf.report.text import FLOAT_MAX, number

WIDTH, HEIGHT = 400, 250
TOP, RIGHT, BOTTOM = 12, 386, 208  # the plot's edges; below it are tick labels and the axis' name
INSET = 6  # from the plot's sides to the outermost points
DIGIT, LETTERS = 8.5, 14  # units that a character of a tick label takes at most: its width, its height
COLOURS = 6
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """Named (x, y) points in drawing order; the earlier state `of` another line has its colour, but faint."""

    name: str
    points: tuple[tuple[float, float], ...]
    of: str | None = None


@dataclass(frozen=True)
class Bar:
    """A named value, and the one before where that is known."""

    name: str
    value: float
    before: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """Lines over axes x and y, or bars of y. `says` explains it in a few words."""

    title: str
    says: str
    y: str
    x: str = ""
    lines: tuple[Line, ...] = ()
    bars: tuple[Bar, ...] = ()
    log_x: bool = False
    log_y: bool = False
    full: float | None = None  # the value at which a bar is full, if that is not the largest one
    form: Callable[[float | None], str] = number  # how a value is written

    @property
    def longest(self) -> float:
        """The value at which a bar is full, above 0."""
        return max(self.full or 0.0, *(max(bar.value, bar.before or 0.0) for bar in self.bars)) or 1.0


@dataclass(frozen=True)
class Plot:
    """Places of the marks of a chart of lines.

    left: x where the plot begins. grid: y of each line behind it. beside, below: places of labels, and those.
    points: of each line by its name.
    """

    left: float
    grid: list[float]
    beside: list[tuple[float, str]]
    below: list[tuple[float, str]]
    points: dict[str, Points]


def plot(chart: Chart) -> Plot:
    """Place the marks of a chart of lines."""
    xs = sorted({x for line in chart.lines for x, _ in line.points})
    ys = [y for line in chart.lines for _, y in line.points]
    log_x, log_y = chart.log_x and xs[0] > 0, chart.log_y and min(ys) > 0
    x_ticks = xs if chart.log_x else ticks(xs[0], xs[-1])
    y_ticks = log_ticks(min(ys), max(ys)) if log_y else ticks(min(0.0, *ys), max(ys))
    left = 8 + DIGIT * max(len(_short(tick)) for tick in y_ticks)
    ends = min(xs[0], x_ticks[0]), max(xs[-1], x_ticks[-1])
    across = scale(*ends, left + INSET, RIGHT - INSET, log_x)
    up = scale(y_ticks[0], y_ticks[-1], BOTTOM, TOP, log_y)
    return Plot(
        left,
        [up(tick) for tick in y_ticks],
        _apart([(up(tick), _short(tick)) for tick in reversed(y_ticks)], lambda label: LETTERS),
        _apart([(across(tick), _short(tick)) for tick in x_ticks], lambda label: DIGIT * len(label)),
        {line.name: [(across(x), up(y)) for x, y in line.points] for line in chart.lines},
    )


def spark(values: Sequence[float]) -> Points:
    """Places of values, oldest first, between their own minimum and maximum in 120 by 28 units."""
    across, up = scale(0, max(1, len(values) - 1), 4, 116), scale(min(values), max(values), 25, 3)
    return [(across(i), up(value)) for i, value in enumerate(values)]


def colours(lines: Sequence[Line]) -> dict[str, str]:
    """CSS classes by line: one colour and dash a line, shared and faint for its earlier state."""
    own = [line.name for line in lines if line.of is None]
    found = {name: f"s{i % COLOURS + 1}" for i, name in enumerate(own)}
    return {line.name: f"{found[line.of]} before" if line.of else found[line.name] for line in lines}


def scale(low: float, high: float, first: float, last: float, log: bool = False) -> Callable[[float], float]:
    """A function from values low to high to places first to last, in the middle where all values are one."""
    form = math.log if log else float
    low, high = form(low), form(high)

    def place(value: float) -> float:
        share = 0.5 if high == low else (form(value) - low) / (high - low)
        return round(first + share * (last - first), 1)

    return place


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Values that cover low to high, 1, 2 or 5 times a power of ten apart; four digits tell them apart."""
    rough = max((high - low) / count, abs(high) * 1e-4) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(min(i * step, FLOAT_MAX), 12) for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that cover low to high; of many, only the powers and both ends."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    some = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    first = max((i for i, t in enumerate(some) if t <= low), default=0)
    last = min((i for i, t in enumerate(some) if t >= high), default=len(some) - 1)
    some = some[first : max(last, first + 1) + 1]
    return some if len(some) < 7 else [some[0], *(t for t in some[1:-1] if f"{t:e}"[0] == "1"), some[-1]]


def _apart(labels: list[tuple[float, str]], size: Callable[[str], float]) -> list[tuple[float, str]]:
    """Labels along an axis, inside the picture, without those that would run into the one before."""
    kept, free = [], -math.inf
    for wanted, label in labels:
        half = size(label) / 2
        place = min(wanted, WIDTH - half)
        if place - half >= free:
            kept.append((place, label))
            free = place + half + 4
    return kept


def _short(value: float) -> str:
    size, letter = next(((s, n) for s, n in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= s), (1, ""))
    return f"{value:.4g}" if abs(value) >= 1e13 else f"{value / size:.4g}{letter}"
