"""Put the verdict of a pull request's A/B into one comment on it: `python3 .github/scripts/perf_comment.py`.

Run by perf-comment.yml with the right to write comments, so nothing of the pull request is trusted. Of its
artifact one file is read, in memory, as JSON of a known shape within a size. Whatever text it has is shown in
<code>, escaped: no Markdown, mention, link or HTML in it has any effect. The pull request is the open one
whose last commit is the one that was measured, as the API says. It needs the standard library and `gh`.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, NoReturn

MARKER = "<!-- dynamic-batch perf -->"
AUTHOR = "github-actions[bot]"
FILE = "verdict.json"
MOST_ARTIFACT, MOST_FILE = 32 << 20, 4 << 20  # bytes: of the artifact, and of the file in it
MOST_VERDICTS, MOST_ROWS = 20_000, 20  # that are read, and that are shown
MOST_NAME, MOST_REASON = 120, 240  # characters that are shown; with all of them escaped it is a comment still
PAGE, MOST_PAGES = 100, 30  # of the API: things a page, and pages of comments
KINDS = {  # gravest first, by outcome and whether it is better: a name, and whether its rows are shown
    ("FAIL", False): ("regressions", True),
    ("ERROR", False): ("not compared", True),
    ("INCONCLUSIVE", False): ("can't tell", True),
    ("PASS", True): ("better", True),
    ("PASS", False): ("unchanged", False),
}
MARKS = {"FAIL": "❌", "ERROR": "❌", "INCONCLUSIVE": "❔", "PASS": "✅"}
NUMBERS = ("base", "head", "effect", "low", "high", "tolerance")


class RefusedError(Exception):
    """What the artifact holds is no verdict. The message has none of it."""


@dataclass(frozen=True)
class Verdict:
    """One metric of one benchmark, as `perf ab --json` writes it."""

    benchmark: str
    metric: str | None
    kind: tuple[str, bool]
    reason: str
    numbers: Mapping[str, float | None]


def read(archive: bytes) -> list[Verdict] | None:
    """Return the verdicts in an artifact; None if it has no such file.

    Raises:
        RefusedError: for what is no ZIP archive, too large, no JSON, or of another shape.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            if FILE not in files.namelist():
                return None
            with files.open(FILE) as file:
                text = file.read(MOST_FILE + 1)
    except Exception as error:  # there is no end of what an archive can have wrong
        raise RefusedError("the artifact is no ZIP archive that can be read") from error
    if len(text) > MOST_FILE:
        raise RefusedError(f"{FILE} is larger than {MOST_FILE} bytes")
    try:
        whole = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{FILE} is no JSON") from error
    verdicts = whole.get("verdicts") if isinstance(whole, dict) else None
    if not isinstance(verdicts, list) or len(verdicts) > MOST_VERDICTS:
        raise RefusedError(f"{FILE} has no list of verdicts, or one of more than {MOST_VERDICTS}")
    return [_verdict(record) for record in verdicts]


def _verdict(record: Any) -> Verdict:
    found = record if isinstance(record, dict) else {}
    texts = (found.get("benchmark"), found.get("reason"), found.get("metric") or "")
    kind, numbers = (found.get("outcome"), found.get("improved")), [found.get(name) for name in NUMBERS]
    if not (all(isinstance(text, str) for text in texts) and all(_is_number(number) for number in numbers)):
        raise RefusedError(f"{FILE} has a verdict of another shape")
    if not (isinstance(kind[0], str) and isinstance(kind[1], bool) and kind in KINDS):
        raise RefusedError(f"{FILE} has a verdict of another kind")
    measured = dict(zip(NUMBERS, numbers, strict=True))
    return Verdict(found["benchmark"], found.get("metric"), kind, found["reason"], measured)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and abs(value) <= sys.float_info.max)


def render(verdicts: list[Verdict], commit: str, run: str) -> str:
    """Return the comment: the outcome and the count of each kind, what is not unchanged, a link to the run.

    Args:
        commit: that was measured. run: the address of the run. Both are the API's, not the artifact's.
    """
    counts = {kind: sum(verdict.kind == kind for verdict in verdicts) for kind in KINDS}
    outcome = next((kind[0] for kind, count in counts.items() if count), "ERROR")
    told = ", ".join(f"{count} {_name(kind, count)}" for kind, count in counts.items() if count)
    rows = [v for kind, (_, shown) in KINDS.items() for v in verdicts if shown and v.kind == kind]
    # HTML in one block, which ends at the first blank line: nothing in it is read as Markdown
    block = ["<table>", *map(_row, rows[:MOST_ROWS]), "</table>"] if rows else []
    if rows:
        cells = ("", "benchmark", "metric", "base", "head", "change", "95 % interval", "allowed")
        block.insert(1, f"<tr>{''.join(f'<th>{cell}</th>' for cell in cells)}</tr>")
    left_out = f"{len(rows) - MOST_ROWS} more rows and " if len(rows) > MOST_ROWS else ""
    link = f'<a href="{escape(run)}">{left_out}the whole report</a>'
    what = f"{told or 'nothing was compared'} at"
    block.append(f"<p>{what} {_code(commit, 40)}, measured by this pull request's own code: {link}</p>")
    return "\n".join([MARKER, "", f"### {MARKS[outcome]} performance: {outcome}", "", *block, ""])


def _name(kind: tuple[str, bool], count: int = 1) -> str:
    return KINDS[kind][0].removesuffix("s" if count == 1 else "")


def _row(verdict: Verdict) -> str:
    first = f"<td>{_name(verdict.kind)}</td><td>{_code(verdict.benchmark, MOST_NAME)}</td>"
    if verdict.metric is None:
        return f'<tr>{first}<td colspan="6">{_code(verdict.reason, MOST_REASON)}</td></tr>'
    n = verdict.numbers
    interval = "-" if n["low"] is None else f"{_change(n['low'])} to {_change(n['high'])}"
    allowed = _change(n["tolerance"]).removeprefix("+")
    numbers = (_figure(n["base"]), _figure(n["head"]), _change(n["effect"]), interval, allowed)
    cells = (_code(verdict.metric, MOST_NAME), *(escape(number) for number in numbers))
    return f"<tr>{first}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _code(text: str, most: int) -> str:
    """Text of the artifact as one line of code, its middle left out where it is long."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    if len(line) > most:
        line = f"{line[: most // 2]}…{line[1 - most // 2 :]}"
    return f"<code>{escape(line)}</code>"


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def _change(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:+.1%}" if abs(value) < 1e6 else "very large"


def api(path: str, query: Mapping[str, str] | None = None, *, method: str = "GET", send: Any = None) -> bytes:
    """Return what the API answers. Raises CalledProcessError; `gh` has said why by then."""
    command = ["gh", "api", "--method", method, path]
    for name, value in (query or {}).items():
        command += ["--raw-field", f"{name}={value}"]
    body = None if send is None else json.dumps(send).encode()
    command += [] if send is None else ["--input", "-"]
    return subprocess.run(command, input=body, stdout=subprocess.PIPE, check=True).stdout


def artifact(repository: str, run: str, name: str) -> bytes | None:
    """Return the artifact of a run by its name; None where there is none.

    Raises:
        RefusedError: for one that is too large.
    """
    listed = json.loads(api(f"repos/{repository}/actions/runs/{run}/artifacts", {"name": name}))["artifacts"]
    found = [one for one in listed if one["name"] == name and not one["expired"]]
    if not found:
        return None
    if found[0]["size_in_bytes"] > MOST_ARTIFACT:
        raise RefusedError(f"the artifact is larger than {MOST_ARTIFACT} bytes")
    return api(f"repos/{repository}/actions/artifacts/{found[0]['id']}/zip")


def pull_request(repository: str, owner: str, branch: str, commit: str) -> int | None:
    """Return the number of the one open pull request of a branch whose last commit this is; None without one,
    or with several, which might have other targets."""
    where = {"state": "open", "head": f"{owner}:{branch}", "per_page": str(PAGE)}
    listed = json.loads(api(f"repos/{repository}/pulls", where))
    found = [int(one["number"]) for one in listed if one["head"]["sha"] == commit]
    return found[0] if len(found) == 1 else None


def put(repository: str, number: int, body: str) -> str:
    """Update the comment that this script made, or make one; return which it did."""
    for page in range(1, MOST_PAGES + 1):
        where = {"per_page": str(PAGE), "page": str(page)}
        listed = json.loads(api(f"repos/{repository}/issues/{number}/comments", where))
        for comment in listed:
            author = (comment["user"] or {}).get("login")
            if author == AUTHOR and (comment["body"] or "").startswith(MARKER):
                where_it_is = f"repos/{repository}/issues/comments/{int(comment['id'])}"
                api(where_it_is, method="PATCH", send={"body": body})
                return "updated"
        if len(listed) < PAGE:
            break
    api(f"repos/{repository}/issues/{number}/comments", method="POST", send={"body": body})
    return "made"


def main(environment: Mapping[str, str]) -> str:
    """Do it all; return a line that says what was done.

    Raises:
        RefusedError: for an artifact that holds no verdict.
        CalledProcessError: where the API refuses.
    """
    repository, run = environment["GITHUB_REPOSITORY"], environment["RUN_ID"]
    commit, owner, branch = (environment[name] for name in ("HEAD_SHA", "HEAD_OWNER", "HEAD_BRANCH"))
    archive = artifact(repository, run, environment["ARTIFACT"])
    verdicts = None if archive is None else read(archive)
    if verdicts is None:
        return "the run left no verdict: there is nothing to say"
    number = pull_request(repository, owner, branch, commit)
    if number is None:
        return "not one open pull request ends in the commit that was measured: there is nowhere to say it"
    address = f"{environment['GITHUB_SERVER_URL']}/{repository}/actions/runs/{run}"
    return f"the comment on #{number} is {put(repository, number, render(verdicts, commit, address))}"


def fail(message: str) -> NoReturn:
    print(f"::error title=performance::{message}")
    sys.exit(1)


if __name__ == "__main__":
    try:
        print(main(os.environ))
    except RefusedError as error:
        fail(f"refused: {error}")
    except subprocess.CalledProcessError:
        fail("the API refused; see above")
