"""Charts as inline SVG: lines, bars and sparklines, coloured by the page's CSS so that they follow its
scheme.

Drawn for 400 units of width, so that text stays readable on a phone and three fit beside each other on a
desk. Each has a title, a description and a table of what it shows. It knows numbers and names, no runs and no
files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from perf.report.markup import Markup, clean, number, tag

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 42  # the plot's margins: tick labels on the left, the axis' name below
COLOURS = 6


@dataclass(frozen=True)
class Line:
    """Named (x, y) points in drawing order; `of` is the line it is the earlier state of: same colour, but
    faint."""

    name: str
    points: tuple[tuple[float, float], ...]
    of: str | None = None


@dataclass(frozen=True)
class Bar:
    """A named value, and what it was before where that is known."""

    name: str
    value: float
    before: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """What to draw: lines over axes x and y, or bars of y. `says` explains it in a few words."""

    title: str
    says: str
    y: str
    x: str = ""
    lines: tuple[Line, ...] = ()
    bars: tuple[Bar, ...] = ()
    log_x: bool = False
    log_y: bool = False
    full: float | None = None  # the value at which a bar is full; the largest one where None
    form: Callable[[float | None], str] = number  # how a value is written


def draw(chart: Chart, key: str) -> Markup:
    """The chart as a `figure`: caption, legend, picture and its numbers as a table. `key` is unique on the
    page."""
    picture, rows = (_bars if chart.bars else _lines)(chart)
    svg = _svg(chart, key, *picture)
    heading = tag("figcaption", tag("strong", chart.title), " ", tag("span", chart.says))
    numbers = tag("details", tag("summary", "Numbers"), table(rows, stack=False))
    return tag("figure", heading, _legend(chart), svg, numbers)


def table(rows: list[list[str]], stack: bool = True) -> Markup:
    """Rows as a table that scrolls by itself where it is wide; the first row is the heading, a "why" column
    wraps.

    With `stack` a row becomes a small card on a narrow screen, each cell under its column's name.
    """
    names = rows[0]
    wraps = ["why" if name == "why" else None for name in names]
    head = [tag("th", name, scope="col", class_=wrap) for name, wrap in zip(names, wraps, strict=True)]
    body = []
    for first, *others in rows[1:]:
        cells = zip(others, names[1:], wraps[1:], strict=True)
        body.append(
            tag("tr", tag("th", first, scope="row"), [tag("td", c, data_is=n, class_=w) for c, n, w in cells])
        )
    grid = tag("table", tag("thead", tag("tr", head)), tag("tbody", body), class_="stack" if stack else None)
    return tag("div", grid, class_="scroll", tabindex=0, role="group", aria_label="table")


def sparkline(values: list[float], title: str) -> Markup:
    """A small line of values, oldest first, between their own minimum and maximum, the last one marked."""
    low, high = min(values), max(values)
    step = 112 / max(1, len(values) - 1)
    ys = [14.0 if high == low else 25 - 22 * (value - low) / (high - low) for value in values]
    points = [(4 + i * step, y) for i, y in enumerate(ys)]
    last = tag("circle", cx=f"{points[-1][0]:.1f}", cy=f"{points[-1][1]:.1f}", r=3)
    line = tag("polyline", points=_path(points))
    return tag("svg", tag("title", title), line, last, viewBox="0 0 120 28", class_="spark s1", role="img")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart, and told apart by four digits) that cover low to
    high."""
    rough = max((high - low) / count, abs(high) * 1e-4) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that cover low to high; of many, only the powers and both ends."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    some = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    first = max((i for i, t in enumerate(some) if t <= low), default=0)
    last = min((i for i, t in enumerate(some) if t >= high), default=len(some) - 1)
    some = some[first : max(last, first + 1) + 1]
    return (
        some
        if len(some) < 7
        else [t for i, t in enumerate(some) if i in (0, len(some) - 1) or f"{t:e}"[0] == "1"]
    )


def _short(value: float) -> str:
    size, letter = next(((s, n) for s, n in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= s), (1, ""))
    return f"{value / size:.4g}{letter}"


def _path(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _place(value: float, low: float, high: float, log: bool) -> float:
    """Where value lies between low (0) and high (1)."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return 0.5 if high == low else (value - low) / (high - low)


def _svg(chart: Chart, key: str, height: int, shapes: list[Markup], says: str) -> Markup:
    names = tag("title", chart.title, id=f"{key}-t"), tag("desc", says, id=f"{key}-d")
    size = f"0 0 {WIDTH} {height}"
    return tag("svg", names, shapes, viewBox=size, role="img", aria_labelledby=f"{key}-t {key}-d")


def _legend(chart: Chart) -> Markup | None:
    entries = [(line.name, css) for line, css in zip(chart.lines, _colours(chart).values(), strict=True)]
    if any(bar.before is not None for bar in chart.bars):
        entries = [("now", "s1"), ("before", "was")]
    if len(entries) < 2:
        return None
    swatch = tag("svg", tag("path", d="M0 5H26"), viewBox="0 0 26 10", aria_hidden="true")
    return tag("ul", [tag("li", swatch, name, class_=css) for name, css in entries], class_="legend")


def _colours(chart: Chart) -> dict[str, str]:
    """A line's CSS classes: one colour and dash a line, shared and faint for its earlier state."""
    own = [line.name for line in chart.lines if line.of is None]
    colours: dict[str | None, str] = {name: f"s{i % COLOURS + 1}" for i, name in enumerate(own)}
    return {
        line.name: f"{colours[line.of]} before" if line.of else colours[line.name] for line in chart.lines
    }


def _lines(chart: Chart) -> tuple[tuple[int, list[Markup], str], list[list[str]]]:
    xs = sorted({x for line in chart.lines for x, _ in line.points})
    ys = [y for line in chart.lines for _, y in line.points]
    log_y = chart.log_y and min(ys) > 0
    x_ticks = xs if chart.log_x else ticks(xs[0], xs[-1])
    y_ticks = log_ticks(min(ys), max(ys)) if log_y else ticks(min(0.0, *ys), max(ys))
    x_low, x_high = min(xs[0], x_ticks[0]), max(xs[-1], x_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = _place(x, x_low, x_high, chart.log_x and x_low > 0)
        up = _place(y, y_ticks[0], y_ticks[-1], log_y)
        return LEFT + 6 + across * (WIDTH - LEFT - RIGHT - 12), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    shapes, free = [], -math.inf
    for tick in y_ticks:
        y = at(x_low, tick)[1]
        shapes.append(tag("path", d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", class_="grid"))
        shapes.append(tag("text", _short(tick), x=LEFT - 5, y=f"{y + 4:.1f}", class_="end"))
    for tick in x_ticks:
        x, half = at(tick, y_ticks[0])[0], 4 * len(_short(tick))
        if x - half >= free:  # no label runs into the one before it
            shapes.append(tag("text", _short(tick), x=f"{x:.1f}", y=HEIGHT - BOTTOM + 17, class_="mid"))
            free = x + half + 2
    shapes.append(tag("text", chart.x, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, class_="mid name"))
    colours = _colours(chart)
    for line in sorted(chart.lines, key=lambda line: line.of is None):  # the earlier state lies underneath
        places = [at(*point) for point in line.points]
        hints = [tag("title", f"{line.name}: {chart.form(y)} at {number(x)}") for x, y in line.points]
        pairs = zip(hints, places, strict=True)
        dots = [tag("circle", hint, cx=f"{px:.1f}", cy=f"{py:.1f}", r=3) for hint, (px, py) in pairs]
        shapes.append(tag("g", tag("polyline", points=_path(places)), dots, class_=colours[line.name]))

    known = {line.name: dict(line.points) for line in chart.lines}
    rows = [[chart.x, *known], *([number(x), *(chart.form(p.get(x)) for p in known.values())] for x in xs)]
    said = ("; ".join(f"{chart.form(p[x])} at {number(x)}" for x in (min(p), max(p))) for p in known.values())
    ends = " ".join(f"{name}: {says}." for name, says in zip(known, said, strict=True))
    return (HEIGHT, shapes, f"{chart.y} against {chart.x}. {ends}"), rows


def _bars(chart: Chart) -> tuple[tuple[int, list[Markup], str], list[list[str]]]:
    values = [value for bar in chart.bars for value in (bar.value, bar.before or 0.0)]
    full = max(chart.full or 0.0, *values) or 1.0
    shapes: list[Markup] = []
    rows = [["", chart.y, "before", "note"]]
    for i, bar in enumerate(chart.bars):
        top, name, value = 42 * i, clean(bar.name), chart.form(bar.value)
        shown = " ".join(filter(None, (value, bar.note)))
        room = 52 - len(shown)  # characters of 13 units' type that fit beside the value
        label = name if len(name) <= room else f"{name[: room - 1]}…"
        shapes.append(tag("text", label, tag("title", name), x=0, y=top + 14))
        shapes.append(tag("text", shown, x=WIDTH, y=top + 14, class_="end"))
        for width, css in ((WIDTH, "track"), (bar.value / full * WIDTH, "s1")):
            shapes.append(tag("rect", x=0, y=top + 22, width=f"{width:.1f}", height=10, rx=2, class_=css))
        if bar.before is not None:
            hint = tag("title", f"before: {chart.form(bar.before)}")
            shapes.append(
                tag("path", hint, d=f"M{bar.before / full * WIDTH:.1f} {top + 19}v16", class_="was")
            )
        rows.append([name, value, chart.form(bar.before), bar.note])
    keep = [0, 1, *(i for i in (2, 3) if any(row[i] not in ("-", "") for row in rows[1:]))]
    says = f"{chart.y}. " + "; ".join(f"{bar.name}: {chart.form(bar.value)}" for bar in chart.bars) + "."
    return (42 * len(chart.bars), shapes, says), [[row[i] for i in keep] for row in rows]
