"""A bisection as a terminal shows it: every judgement, then the evidence, and the commit found last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rich.console import Group, RenderableType
from rich.text import Text

from perf.ab.bisect import Judgement, Report
from perf.ab.history import Commit
from perf.gate.comparison import Outcome, Verdict
from perf.report.terminal import Fitted, name_length, table
from perf.report.text import clean, middle
from perf.report.verdicts import COLUMNS, RIGHT, parts

HEADING = ("commit", "subject", "judged", "metric", "change", "95 % interval", "seconds", "why")
NUMBERS = ("change", "95 % interval", "seconds")
MOST_SUSPECTS = 20  # that are listed
SUBJECT_LENGTH = 40  # cells, in the table of judgements


def bisect_table(report: Report) -> RenderableType:
    """The judgements in the order they were made, those that bound the first bad commit, and that commit."""

    def make(room: int) -> RenderableType:
        rows = [_row(judgement, room) for judgement in report.judgements]
        title = f"Judged against {report.good.short} {clean(report.good.subject)}"
        evidence = (("First that is worse", report.condemned), ("Last that is not", report.last_good))
        shown = [_evidence(what, judgement, room) for what, judgement in evidence if judgement]
        return Group(table(HEADING, rows, NUMBERS, room, title), *shown, *_conclusion(report))

    return Fitted(make)


def _row(judgement: Judgement, room: int) -> list[str]:
    cells = dict.fromkeys(COLUMNS, "-")
    comparison, verdict = judgement.comparison, _deciding(judgement)
    if comparison and verdict:
        (part,) = parts(replace(comparison, verdicts=(verdict,)), name_length(room))
        cells = dict(zip(COLUMNS, part.rows[0], strict=True))
    reason = next(iter(judgement.reason.splitlines()), "")  # of pytest's output the end is in the JSON
    commit, took = judgement.commit, f"{judgement.seconds:,.0f}" if judgement.budget else "-"
    begin = [commit.short, middle(clean(commit.subject), SUBJECT_LENGTH), str(judgement.finding)]
    return [*begin, cells["metric"], cells["change"], cells["95 % interval"], took, reason]


def _deciding(judgement: Judgement) -> Verdict | None:
    """The verdict of the gravest outcome, among these the one of the largest effect."""
    ranks = list(Outcome)
    return min(
        judgement.verdicts, key=lambda v: (ranks.index(v.outcome), -abs(v.effect or 0.0)), default=None
    )


def _evidence(what: str, judgement: Judgement, room: int) -> RenderableType:
    found = parts(judgement.comparison, name_length(room)) if judgement.comparison else []
    rows = [row for part in found for row in part.rows]
    commit = f"{judgement.commit.short} {clean(judgement.commit.subject)}"
    return table(COLUMNS, rows, RIGHT, room, f"{what}: {commit}")


def _conclusion(report: Report) -> Iterator[Text]:
    if report.first_bad:
        yield _described(report.first_bad)
        yield Text(f"{report.first_bad.short} is the first bad commit", style="bold red")
        return
    for commit in report.suspects[:MOST_SUSPECTS]:
        yield _described(commit)
    if len(report.suspects) > MOST_SUSPECTS:
        yield Text(f"and {len(report.suspects) - MOST_SUSPECTS} more")
    why = "those between cannot be judged" if report.complete else "it was interrupted"
    yield Text(f"the first bad commit is one of these {len(report.suspects)}: {why}", style="bold yellow")


def _described(commit: Commit) -> Text:
    return Text(f"{commit.short}  {commit.date[:10]}  {clean(commit.author)}  {clean(commit.subject)}")
