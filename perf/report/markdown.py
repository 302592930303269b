"""Markdown for `$GITHUB_STEP_SUMMARY`: as much of a report as GitHub shows, what matters most first.

What comes from a file is shown, never obeyed: no Markdown, mention or link in a name has any effect. It is
cut by whole rows, so that no table and no fold is ever broken.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from perf.gate.comparison import Comparison, Outcome
from perf.gate.saved_runs import Run
from perf.gate.steps import NO_STEPS, Steps
from perf.report.figures import figures
from perf.report.steps import HEADING, RIGHT as STEPS_RIGHT, commands, rows as step_rows, says
from perf.report.terminal import CELL_LENGTH
from perf.report.text import clean, middle
from perf.report.verdicts import COLUMNS, RIGHT, brief, headline, parts, sides, title

MARKS = {Outcome.FAIL: "❌", Outcome.ERROR: "❌", Outcome.INCONCLUSIVE: "❔", Outcome.PASS: "✅"}
GITHUB_BYTES = 1024 * 1024  # of a step's summary; of a longer one GitHub shows nothing at all
ROOM = GITHUB_BYTES - 24 * 1024  # for us, the rest being for what others may add
NAME_LENGTH = 100  # characters of a test id


@dataclass(frozen=True)
class Section:
    """A heading and rows: a table whose first two rows are always there, or a list.

    rank: what has the lowest is cut last. mark: `##` and the like, or "" for what is folded away, or None for
    no heading at all.
    """

    name: str
    rows: tuple[str, ...]
    rank: int
    mark: str | None = "###"
    table: tuple[str, ...] = ()
    count: int | None = None

    def text(self, most: int) -> str:
        """The section with at most so many of its rows; without any it is not there."""
        if not self.rows or not most:
            return ""
        shown = "" if most >= len(self.rows) else f", {most:,} of {len(self.rows):,} rows shown"
        name = _prose(self.name + (shown if self.count is None else f" ({self.count}{shown})"))
        body = "\n".join([*self.table, *self.rows[:most], "", ""])
        if self.mark == "":
            return f"<details><summary>{name}</summary>\n\n{body}</details>\n\n"
        return f"{self.mark} {name}\n\n{body}" if self.mark else body


def markdown(
    runs: Sequence[Run],
    comparison: Comparison | None = None,
    left_out: Sequence[str] = (),
    *,
    steps: Steps = NO_STEPS,
    room: int = ROOM,
    whole: str | None = None,
) -> str:
    """The verdict, what is worse, what can't be told, all else folded away: at most `room` bytes of UTF-8.

    What does not fit is cut: figures first, then what is unchanged, better, can't be told, and regressions
    last; it is said how much, and that the whole is in `whole`, an HTML page. Empty where not even the
    verdict has room.
    """
    sections = _sections(runs, comparison, left_out, steps)
    start = ""
    if comparison is not None:
        start = f"## {MARKS[comparison.outcome]} {_prose(headline(comparison))}\n\n"
        start += f"{' → '.join(map(_code, sides(comparison)))}\n\n"

    def text(most: int) -> str:
        kept = _kept(sections, most)
        body = "".join(section.text(kept[section.rank]) for section in sections)
        return f"{start}{_cut(sections, kept, whole)}{body}".rstrip() + "\n"

    def size(most: int) -> int:
        return len(text(most).encode())

    total = sum(len(section.rows) for section in sections)
    fits = total if size(total) <= room else bisect_right(range(total), room, key=size) - 1
    return text(fits) if fits >= 0 else ""


def _sections(
    runs: Sequence[Run], comparison: Comparison | None, left_out: Sequence[str], steps: Steps
) -> list[Section]:
    """Sections in the order of showing."""
    compared = [] if comparison is None else [comparison.base, comparison.head]
    found = [
        Section("Left out", _list(brief(left_out, [*runs, *compared], NAME_LENGTH)), 0, count=len(left_out))
    ]
    if comparison is not None:
        for rank, part in enumerate(parts(comparison, NAME_LENGTH), 2):
            mark = "" if part.folded else "###"
            table, rows = _grid(COLUMNS, part.rows, RIGHT)
            found.append(Section(part.heading, rows, rank, mark, table, part.count))
        found.append(Section("Notes", _list(brief(comparison.notes, compared, NAME_LENGTH)), 1, None))
    if steps.searched:
        table, rows = _grid(HEADING, step_rows(steps, NAME_LENGTH), STEPS_RIGHT)
        ways = tuple(f"- {_prose(line) if '`' in line else f'`{clean(line)}`'}" for line in commands(steps))
        found.append(Section("Steps in the history", rows, 97, table=table))
        found.append(Section("What looks for their commits", ways, 98, None))
        found.append(Section("Steps in the history", _list([says(steps)]), 96, None))
    heading, *cells = figures(runs[-1], NAME_LENGTH)
    table, rows = _grid(heading, cells, heading[1:])
    name = f"All figures of {title(runs[-1])}"
    return [*found, Section(name, rows, 99, "##" if comparison is None else "", table)]


def _kept(sections: Sequence[Section], most: int) -> dict[int, int]:
    """The rows of each section, by its rank, of `most` in all: those that matter more come first."""
    kept = {}
    for section in sorted(sections, key=lambda section: section.rank):
        kept[section.rank] = min(most, len(section.rows))
        most -= kept[section.rank]
    return kept


def _cut(sections: Sequence[Section], kept: dict[int, int], whole: str | None) -> str:
    """The paragraph that says what was cut, if anything was."""
    cut = [
        f"{missing:,} of {len(section.rows):,} rows of {_prose(section.name)}"
        for section in sections
        if (missing := len(section.rows) - kept[section.rank])
    ]
    place = _code(whole) if whole else "the page that `--html` writes"
    limit = f"{GITHUB_BYTES // 1024:,} KiB"
    return (
        f"**Cut, for GitHub shows {limit} a step: {', '.join(cut)}.** All is in {place}.\n\n" if cut else ""
    )


def _list(lines: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"- {_prose(line)}" for line in lines)


def _grid(
    heading: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]
) -> tuple[tuple[str, str], tuple[str, ...]]:
    """The two lines that begin a table, and its rows."""
    rule = ["---:" if column in right else "---" for column in heading]
    cells = [[_code(row[0]), *(_prose(middle(clean(cell), CELL_LENGTH)) for cell in row[1:])] for row in rows]
    first, second, *others = (f"| {' | '.join(row)} |" for row in ([*map(_prose, heading)], rule, *cells))
    return (first, second), tuple(others)


def _code(text: str) -> str:
    """Text from a file as inline code, in a table too."""
    return f"`{clean(text).replace('`', chr(39)).replace('|', chr(92) + '|') or ' '}`"


def _prose(text: str) -> str:
    """Text with every character that Markdown or HTML could take for its own written as an entity."""
    safe = re.sub(r"[^\w\s.,:;%+=()/'?…→-]", lambda found: f"&#{ord(found[0])};", clean(text))
    return safe.replace("://", ":&#47;/")
