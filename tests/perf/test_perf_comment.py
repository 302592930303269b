"""The script that comments on a pull request: it takes nothing from an artifact for more than text."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import zipfile
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from perf.gate.comparison import Outcome
from perf.gate.saved_runs import load
from perf.gate.verdict import compare
from tests.perf import fake_runs
from tests.perf.html_page import Page

SCRIPT = Path(__file__).parents[2] / ".github" / "scripts" / "perf_comment.py"
SPEC = util.spec_from_file_location("perf_comment", SCRIPT)
assert SPEC
assert SPEC.loader
comment = util.module_from_spec(SPEC)
sys.modules["perf_comment"] = comment
SPEC.loader.exec_module(comment)

COMMIT, RUN = "c0ffee" * 6 + "abcd", "https://example.org/o/r/actions/runs/7"
HOSTILE = (
    "@everyone #1 GH-2 o/r#3 https://evil.example www.evil.example me@evil.example",
    "</code></td></tr></table>\n\n# owned\n\n<script>alert(1)</script>",
    "<img src=x onerror=alert(1)> <a href='//evil.example'>click</a> <!-- dynamic-batch perf -->",
    "`` ` ``` | \\| \\\\| [x](//evil.example) ![x](//evil.example) **b** ~~~ &lt;b&gt; &#64;all",
    "line\rline\u2028line\u2029line\x0bline\x00nul \u202eright to left \ud800",
    "<details><summary>x</summary> " + "<" * 5000,
)


def record(**changes: Any) -> dict[str, Any]:
    numbers = dict(base=1000.0, head=900.0, effect=-0.1, low=-0.12, high=-0.08, tolerance=0.02)
    what = dict(
        benchmark="t.py::test_x[1]", metric="tokens_per_s", outcome="FAIL", improved=False, reason="worse"
    )
    return {**what, **numbers, **changes}


def archive(plain: Any, name: str = "verdict.json", **others: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as files:
        files.writestr(name, plain if isinstance(plain, bytes) else json.dumps(plain))
        for other, content in others.items():
            files.writestr(other, content)
    return data.getvalue()


def rendered(records: list[dict[str, Any]]) -> tuple[str, Page]:
    """The comment, and what a browser would have of it."""
    verdicts = comment.read(archive({"verdicts": records}))
    text = comment.render(verdicts, COMMIT, RUN)
    return text, Page(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(text))


def test_it_reads_what_the_gate_writes(tmp_path):
    entries = [fake_runs.benchmarks(0, 1.0), fake_runs.benchmarks(1, 0.5)[:4]]
    base, head = (
        fake_runs.several(load(fake_runs.save(tmp_path, name, some, number)))
        for number, (name, some) in enumerate(zip(("main", "slow"), entries, strict=True), 1)
    )
    judged = compare(base, head)
    verdicts = comment.read(archive(judged.plain()))
    assert len(verdicts) == len(judged.verdicts)
    for found, verdict in zip(verdicts, judged.verdicts, strict=True):
        assert (found.benchmark, found.reason) == (verdict.benchmark, verdict.reason)
        assert (found.metric, found.kind) == (
            verdict.metric and verdict.metric.name, (str(verdict.outcome), verdict.improved)
        )  # fmt: skip
        assert found.numbers["effect"] == verdict.effect
    assert {kind for kind, _ in comment.KINDS} == {str(outcome) for outcome in Outcome}
    assert {verdict.kind[0] for verdict in verdicts} > {"FAIL", "ERROR"}
    text = comment.render(verdicts, COMMIT, RUN)
    assert text.startswith(f"{comment.MARKER}\n\n### ❌ performance: FAIL\n\n<table>\n")


def test_what_it_says():
    better = record(outcome="PASS", improved=True, effect=0.25, low=0.2, high=0.3, head=0.00125, base=None)
    text, page = rendered([
        record(outcome="PASS", metric="round_s"), better, record(outcome="INCONCLUSIVE", low=None, high=None),
        record(outcome="ERROR", metric=None, reason="is in the baseline and not in this run"), record(),
        record(),
    ])  # fmt: skip
    said = " ".join(page.text)
    assert "2 regressions, 1 not compared, 1 can't tell, 1 better, 1 unchanged at" in said
    assert re.findall("<tr><td>(.*?)</td>", text) == [
        "regression", "regression", "not compared", "can't tell", "better"
    ]  # fmt: skip
    assert "<td>1,000</td><td>900</td><td>-10.0%</td><td>-12.0% to -8.0%</td><td>2.0%</td></tr>" in text
    assert "<td>-</td><td>0.00125</td><td>+25.0%</td><td>+20.0% to +30.0%</td>" in text
    assert page.all("a") == [{"href": RUN}]
    assert "is in the baseline and not in this run" in said
    text, page = rendered([record(outcome="PASS")])
    assert "### ✅ performance: PASS" in text
    assert not page.all("table")
    text, _ = rendered([])
    assert "### ❌ performance: ERROR\n\n<p>nothing was compared at" in text


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_of_an_artifact_is_shown_and_never_obeyed(hostile):
    records = [
        record(benchmark=hostile, metric=hostile, reason=hostile),
        record(benchmark=hostile, metric=None, reason=hostile, outcome="ERROR"),
    ]
    text, page = rendered(records)
    assert {name for name, _ in page.elements} == {"h3", "table", "tr", "th", "td", "code", "p", "a"}
    assert page.all("a") == [{"href": RUN}]
    outside = re.sub("<code>[^<]*</code>", "", text)
    assert outside == re.sub(
        "<code>[^<]*</code>", "", rendered([record(), record(metric=None, outcome="ERROR")])[0]
    )
    assert len(text.split("\n\n")) == 3, "a blank line would end the block of HTML"
    shown = re.findall("<code>([^<]*)</code>", text)
    assert len(shown) == 5
    assert all(line.isprintable() and len(line) <= 6 * comment.MOST_REASON for line in shown)
    assert text.encode()


def test_it_is_never_longer_than_a_comment_may_be():
    records = [record(benchmark="'" * 10_000, metric="'" * 10_000)] * 10
    records += [record(benchmark="'" * 10_000, metric=None, outcome="ERROR", reason="'" * 10_000)] * 30
    text, page = rendered(records)
    assert len(text) < 65_536
    assert len(page.all("tr")) == 1 + comment.MOST_ROWS
    assert "20 more rows and the whole report" in " ".join(page.text)
    extreme = record(base=1e308, head=5e-324, effect=1e300, low=-1e300, high=1e300, tolerance=10**300)
    assert len(rendered([extreme])[0]) < 1000


@pytest.mark.parametrize("data", [
    b"", b"PK", b"not a zip", archive({"verdicts": []})[:-30], archive(b"{"), archive(b"\xff"),
    archive(b"[" * 100_000), archive([]), archive({}), archive({"verdicts": {}}), archive({"verdicts": [1]}),
    archive({"verdicts": [record()] * 20_001}), archive(b" " * (4 << 20) + b"{}"),
    *(archive({"verdicts": [record(**wrong)]}) for wrong in (
        {"benchmark": 3}, {"reason": None}, {"metric": ["x"]}, {"outcome": "GOOD"}, {"outcome": ["FAIL"]},
        {"outcome": "FAIL", "improved": True}, {"improved": 1}, {"base": "1"}, {"base": True},
        {"effect": float("nan")}, {"low": float("inf")}, {"head": 10**400})),
])  # fmt: skip
def test_what_is_no_verdict_is_refused_without_showing_any_of_it(data):
    with pytest.raises(comment.RefusedError) as error:
        comment.read(data)
    assert re.fullmatch(r"(the artifact|verdict\.json) (is|has) [\w ,]+", str(error.value))


def test_nothing_is_written_to_disk_and_nothing_else_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert comment.read(archive("{}", "../../verdict.json")) is None
    assert comment.read(archive({"verdicts": []}, **{"/etc/evil": b"x", "../evil": b"x"})) == []
    assert not list(tmp_path.iterdir())


# What it asks of the API

GH = """#!{python}
import json, os, pathlib, sys
here = pathlib.Path(os.environ["FAKE"])
args = sys.argv[1:]
sent = json.loads(sys.stdin.read()) if "--input" in args else None
with open(here / "calls", "a") as calls:
    print(json.dumps([args, sent]), file=calls)
method, path = args[2], args[3]
fields = dict(arg.split("=", 1) for arg in args[4:] if "=" in arg)
name = "-".join([method, *path.split("/")[3:], *([fields["page"]] if "page" in fields else [])])
answer = here / name
if not answer.exists():
    sys.exit(f"gh: {{name}}: Not Found (HTTP 404)")
sys.stdout.buffer.write(answer.read_bytes())
"""
OURS = {"id": 11, "user": {"login": "github-actions[bot]"}, "body": f"{comment.MARKER}\n\nold"}
LISTED = {"name": "perf-gate-2", "id": 5, "expired": False, "size_in_bytes": 900}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(**answers)` runs the script; a test changes what the API answers, by method and path; None is that
    it refuses."""
    (tmp_path / "bin").mkdir()
    gh = tmp_path / "bin" / "gh"
    gh.write_text(GH.format(python=sys.executable))
    gh.chmod(0o755)
    answers: dict[str, Any] = {
        "GET-actions-runs-7-artifacts": {"artifacts": [{**LISTED, "name": "other", "id": 4}, LISTED]},
        "GET-actions-artifacts-5-zip": archive({"verdicts": [record()]}),
        "GET-pulls": [{"number": 1, "head": {"sha": "another"}}, {"number": 42, "head": {"sha": COMMIT}}],
        "GET-issues-42-comments-1": [],
        "POST-issues-42-comments": {},
        "PATCH-issues-comments-11": {},
    }

    def call(**changes: Any) -> tuple[int, str, list[tuple[list[str], Any]]]:
        for name, answer in {**answers, **changes}.items():
            if answer is None:
                continue
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            (tmp_path / name).write_bytes(data)
        env = dict(
            PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin", FAKE=str(tmp_path), GITHUB_REPOSITORY="o/r", RUN_ID="7",
            GITHUB_SERVER_URL="https://example.org", ARTIFACT="perf-gate-2", HEAD_SHA=COMMIT,
            HEAD_OWNER="fork", HEAD_BRANCH="a$(touch owned)&state=closed",
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, str(SCRIPT)], env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
        (tmp_path / "calls").unlink()
        assert not (tmp_path / "owned").exists()
        return done.returncode, done.stdout, [(args[2:], sent) for args, sent in calls]

    return call


def changes(calls: list[tuple[list[str], Any]]) -> list[tuple[str, str, Any]]:
    return [(args[0], args[1], sent) for args, sent in calls if args[0] != "GET"]


def test_the_first_run_makes_the_comment(run):
    code, out, calls = run()
    assert (code, out) == (0, "the comment on #42 is made\n")
    ((method, path, sent),) = changes(calls)
    assert (method, path) == ("POST", "repos/o/r/issues/42/comments")
    assert sent.keys() == {"body"}
    assert sent["body"].startswith(comment.MARKER)
    assert f'<a href="{RUN}">' in sent["body"]
    asked = next(args for args, _ in calls if args[1] == "repos/o/r/pulls")
    assert "head=fork:a$(touch owned)&state=closed" in asked
    assert "state=open" in asked


@pytest.mark.parametrize("page", [1, 3])
def test_later_runs_update_it_wherever_it_is(run, page):
    """Others' comments are left alone, whatever they begin with, and so is ours if it is another."""
    others = [
        {"id": 1, "user": {"login": "someone"}, "body": f"{comment.MARKER} a trap"},
        {"id": 2, "user": None, "body": None},
        {"id": 3, "user": {"login": "github-actions[bot]"}, "body": f"quotes {comment.MARKER}"},
    ]
    full = [others[0]] * 100
    pages = {f"GET-issues-42-comments-{number}": full for number in range(1, page)}
    pages[f"GET-issues-42-comments-{page}"] = [*others, OURS]
    code, out, calls = run(**pages)
    assert (code, out) == (0, "the comment on #42 is updated\n")
    ((method, path, _),) = changes(calls)
    assert (method, path) == ("PATCH", "repos/o/r/issues/comments/11")


@pytest.mark.parametrize(("answers", "says"), [
    ({"GET-actions-runs-7-artifacts": {"artifacts": []}}, "left no verdict"),
    ({"GET-actions-runs-7-artifacts": {"artifacts": [{**LISTED, "expired": True}]}}, "left no verdict"),
    ({"GET-actions-artifacts-5-zip": archive("{}", "report.html")}, "left no verdict"),
    ({"GET-pulls": []}, "not one open pull request"),
    ({"GET-pulls": [{"number": 42, "head": {"sha": "newer"}}]}, "not one open pull request"),
    ({"GET-pulls": [{"number": n, "head": {"sha": COMMIT}} for n in (1, 2)]}, "not one open pull request"),
])  # fmt: skip
def test_where_there_is_nothing_to_say_nothing_is_said(run, answers, says):
    code, out, calls = run(**answers)
    assert (code, changes(calls)) == (0, [])
    assert says in out


@pytest.mark.parametrize(("answers", "says"), [
    ({"GET-actions-runs-7-artifacts": {"artifacts": [{**LISTED, "size_in_bytes": 1 << 30}]}},
     "refused: .* larger"),
    ({"GET-actions-artifacts-5-zip": archive({"verdicts": "::set-output name=x::y"})}, "refused: .* no list"),
    ({"GET-pulls": b"", "GET-actions-artifacts-5-zip": b"PK"}, "refused: .* no ZIP"),
])  # fmt: skip
def test_what_is_refused_fails_the_run_and_changes_nothing(run, answers, says):
    code, out, calls = run(**answers)
    assert (code, changes(calls)) == (1, [])
    assert re.fullmatch(f"::error title=performance::{says}.*\n", out)
    assert "set-output" not in out


def test_an_api_that_refuses_fails_the_run(run):
    code, out, calls = run(**{"POST-issues-42-comments": None})
    assert (code, out) == (1, "::error title=performance::the API refused; see above\n")
    assert len(changes(calls)) == 1
