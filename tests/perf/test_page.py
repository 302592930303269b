"""The page of a report and its charts: nothing in them acts, asks for anything, overlaps or is too faint."""

from __future__ import annotations

import html
import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, strategies as st
from jinja2 import UndefinedError
from rich.cells import cell_len

from perf import report
from perf.gate.saved_runs import Run, load
from perf.gate.verdict import compare
from perf.report import page, runs_table
from perf.report.charts import DIGIT, HEIGHT, LETTERS, WIDTH, Bar, Chart, Line, log_ticks, ticks
from perf.report.figures import sections
from perf.report.page import templates
from perf.report.terminal import drawn as drawn_table
from perf.report.text import clean
from tests.perf import fake_runs
from tests.perf.html_page import Page


def drawn(chart: Chart) -> str:
    """The chart's figure in HTML."""
    figure: Any = templates().get_template("charts.html.j2").module
    return str(figure.figure(chart, "k"))


@pytest.fixture
def head(tmp_path: Path) -> Run:
    return load(fake_runs.save(tmp_path, "head", number=2))


def test_the_page_asks_for_nothing_and_runs_nothing(head: Run) -> None:
    text = page([head])
    parsed = Page(text)
    assert not {"src", "href", "onclick", "onload", "style"} & {
        key for _, attrs in parsed.elements for key in attrs
    }
    assert "url(" not in text
    assert "@import" not in text
    policies = [
        meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_chart_says_what_it_shows_and_gives_its_numbers(head: Run) -> None:
    parsed = Page(page([head]))
    charts = [attrs for _, attrs in parsed.elements if "aria-labelledby" in attrs]
    ids = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(charts) == len(parsed.all("figure")) == sum(map(len, sections(head).values()))
    assert len(ids) == len(set(ids))
    for chart in charts:
        assert chart["role"] == "img"
        assert {chart["aria-labelledby"], chart["aria-describedby"]} <= set(ids)
    for figure in page([head]).split("<figure>")[1:]:
        assert "<table>" in figure
    assert "tokens/s against batch size. continuous: 3,478 at 1; 136,080 at 256." in "".join(parsed.text)
    assert "sequential: 2,900; dynamic: 38,000; continuous: 61,000." in "".join(parsed.text)


def test_a_whole_suite_has_every_chart(head: Run) -> None:
    titles = {heading: [chart.title for chart in charts] for heading, charts in sections(head).items()}
    times = ["TTFT, ms", "TPOT, ms", "Latency, ms"]
    assert titles == {
        "Throughput": ["Throughput", "Policies", "Peers", "Model scale"],
        "Latency": times,
        "Open load": ["Throughput and latency", "Goodput", *times],
        "How far from the limit": ["Decode roofline", "Prefill roofline"],
        "Memory and start-up": ["Start-up"],
    }


def test_charts_show_what_was_recorded(head: Run, tmp_path: Path) -> None:
    base = load(fake_runs.save(tmp_path, "base", fake_runs.benchmarks(1, 0.5)))
    throughput, policies, *_ = sections(head, base)["Throughput"]
    name = "perf/benchmarks/test_batch_size.py::test_batch_size[{}]"
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    expected = tuple((float(size), head.benchmarks[name.format(size)].info["tokens_per_s"]) for size in sizes)
    assert [(line.name, line.of) for line in throughput.lines] == [
        ("continuous", None),
        ("continuous (base)", "continuous"),
    ]
    assert throughput.lines[0].points == expected
    assert [(bar.name, bar.value, bar.before, bar.note) for bar in policies.bars] == [
        ("sequential", 2900.0, 1450.0, "(1.00x)"),
        ("dynamic", 38000.0, 19000.0, "(13.10x)"),
        ("continuous", 61000.0, 30500.0, "(21.03x)"),
    ]
    decode, prefill = sections(head)["How far from the limit"]
    assert [bar.name for bar in decode.bars][:2] == [
        "batch size 1, context 512",
        "batch size 32, context 512",
    ]
    assert decode.full == prefill.full == 100.0


def test_what_only_the_earlier_run_has_is_a_line_of_its_own(tmp_path: Path) -> None:
    noise = fake_runs.random.Random(0)
    some = [
        fake_runs.entry(way, "batch_size", noise, batch_size=8, policy=way, **fake_runs.speeds(1000.0, 8))
        for way in ("continuous", "dynamic")
    ]
    base = load(fake_runs.save(tmp_path, "base", some))
    head = load(fake_runs.save(tmp_path, "head", some[:1], 2))
    [chart] = sections(head, base)["Throughput"]
    assert [(line.name, line.of) for line in chart.lines] == [
        ("continuous", None),
        ("continuous (base)", "continuous"),
        ("dynamic (base)", None),
    ]
    assert "dynamic (base): 1,000 at 8" in page([base, head], compare(base, head))


def test_a_percentile_that_was_not_recorded_has_no_line(tmp_path: Path) -> None:
    rates = {"offered_rate": 4.0, "tokens_per_s": 3.0, "latency_p50_ms": 2.0}
    run = load(
        fake_runs.save(tmp_path, "load", [fake_runs.entry("4", "load", fake_runs.random.Random(0), **rates)])
    )
    curve, latency = sections(run)["Open load"]
    assert [[line.name for line in chart.lines] for chart in (curve, latency)] == [["P50"], ["P50"]]
    assert "P50: 2 at 3" in page([run])


def test_a_run_without_groups_still_has_a_page(tmp_path: Path) -> None:
    plain = {
        "fullname": "tests/test_a.py::test_a",
        "group": None,
        "stats": {"data": [0.1, 0.2, 0.3]},
        "extra_info": {},
    }
    nulls = fake_runs.entry("x", "batch_size", fake_runs.random.Random(0), batch_size=4, tokens_per_s=None)
    run = load(fake_runs.save(tmp_path, "plain", [plain, nulls]))
    assert sections(run) == {}
    assert "test_a" in page([run])
    assert "0.2" in "\n".join(drawn_table(runs_table([run]), 160))


numbers = st.floats(1e-6, 1e12)


@given(numbers, numbers)
@example(1e-6, 1.0000000000000002e-6)
@example(5.0, 5.0)
def test_ticks_cover_what_they_are_for(a: float, b: float) -> None:
    low, high = sorted((a, b))
    for found in (ticks(low, high), ticks(0.0, high), log_ticks(low, high)):
        assert found == sorted(set(found))
        assert len(found) >= 2
        assert found[-1] >= high * (1 - 1e-9)
    assert ticks(low, high)[0] <= low * (1 + 1e-9)
    assert log_ticks(low, high)[0] <= low * (1 + 1e-9)
    assert len(ticks(low, high)) <= 8


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20), st.booleans(), st.booleans())
@example([(1.0, 1.7e308), (2.0, 1e300)], False, False)
@example([(1.0, 5.5), (2.0, 1.2e8)], False, True)
def test_lines_stay_inside_their_picture(points: list[tuple[float, float]], log_x: bool, log_y: bool) -> None:
    lines = (Line("a", tuple(sorted(points))), Line("b", tuple(points[:1]), "a"))
    svg = drawn(Chart("t", "s", "ms", "x", lines, log_x=log_x, log_y=log_y))
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([^"]+)" cy="([^"]+)"', svg)]
    assert len(places) == len(points) + 1
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    labels = re.findall(r'<text class="end" x="([^"]+)" y="([^"]+)">([^<]+)<', svg)
    assert len(labels) >= 2
    assert all(float(x) >= DIGIT * len(label) for x, _, label in labels)
    assert all(float(low) - float(high) >= LETTERS for (_, high, _), (_, low, _) in pairwise(labels))


@given(st.lists(numbers, min_size=1, max_size=60, unique=True), st.booleans())
def test_labels_below_a_plot_touch_neither_each_other_nor_the_edge(xs: list[float], log_x: bool) -> None:
    svg = drawn(Chart("t", "s", "ms", "x", (Line("a", tuple((x, 1.0) for x in sorted(xs))),), log_x=log_x))
    labels = re.findall(r'<text x="([^"]+)" y="225">([^<]+)<', svg)
    edges = [float(x) + side * len(label) * DIGIT / 2 for x, label in labels for side in (-1, 1)]
    assert edges == sorted(edges)
    assert edges[-1] <= WIDTH + 1e-6


@given(
    st.lists(
        st.tuples(st.text(max_size=90), st.floats(0, 1e9), st.none() | st.floats(0, 1e9)),
        min_size=1,
        max_size=9,
    )
)
@example([("", 5e-324, None)])
@example([("表" * 90, 1.7e308, 1.0)])
def test_bars_stay_inside_their_picture_and_keep_their_names(
    some: list[tuple[str, float, float | None]],
) -> None:
    text = drawn(Chart("t", "s", "tokens/s", bars=tuple(Bar(*bar) for bar in some)))
    parsed = Page(text)
    assert all(0 <= float(bar["width"] or -1) <= WIDTH for bar in parsed.all("rect"))
    for name, _, _ in some:
        assert clean(name) in "".join(parsed.text)
    for label, value in re.findall(r'<p><span title="[^"]*">([^<]*)</span> <span>([^<]*)<', text):
        assert cell_len(html.unescape(label)) + len(value) <= 48


@given(st.text())
def test_a_template_lets_no_text_out(text: str) -> None:
    parsed = Page(templates().from_string('<p title="{{ text }}">{{ text }}</p>').render(text=text))
    assert [name for name, _ in parsed.elements] == ["p"]
    assert "".join(parsed.text) == clean(text) == parsed.all("p")[0]["title"]


def test_a_template_that_is_given_too_little_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        templates().get_template("page.html.j2").render()


def test_what_the_page_is_made_of_is_packaged() -> None:
    room = Path(report.__file__).parent
    project = tomllib.loads((room.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["perf"]
    beside = {path for path in room.iterdir() if path.is_file() and path.suffix != ".py"}
    assert {path.name for path in beside} == {"charts.html.j2", "page.css", "page.html.j2"}
    assert beside <= {path for pattern in patterns for path in room.parent.glob(pattern)}


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    parts_ = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts_)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_enough_contrast(scheme: int) -> None:
    """WCAG 2 AA: 4.5 for text, 3 for lines."""
    style = (Path(report.__file__).parent / "page.css").read_text(encoding="utf-8")
    block = style.split(":root {")[scheme + 1].split("}")[0]
    colours = dict(re.findall(r"--(\w+): (#\w+)", block))
    for name, colour in colours.items():
        for ground in ("ground", "card"):
            dark, light = sorted((luminance(colour), luminance(colours[ground])))
            least = {"ground": 0, "card": 0, "rule": 0}.get(name, 3.0 if name[1:].isdigit() else 4.5)
            assert (light + 0.05) / (dark + 0.05) >= least, f"{name} on {ground}"
