"""Saved runs on a branch: what a push and a pull move, what they leave alone, what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from perf.errors import Exit, GateError
from perf.gate.saved_runs import load
from perf.store import layout, open_branch, pull, push, stored, transfer
from perf.store.layout import Place, place_of
from tests.perf.repos import git
from tests.perf.stored import MACHINE, REF, clone, files, hub, on_branch, save, untouched


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    return hub(tmp_path)


@pytest.fixture
def repo(bare: Path) -> Path:
    """A shallow clone with two sessions of `main` in its storage."""
    where = clone(bare, "repo")
    save(where, "main", 1, seed=1)
    save(where, "main", 2, seed=2)
    return where


def put(where: Path, *names: str, remote: str | None = None) -> list[transfer.Moved]:
    return push(names, open_branch(where, remote), where / ".benchmarks")


def get(where: Path, *names: str, remote: str | None = None) -> list[transfer.Moved]:
    return pull(names, open_branch(where, remote), where / ".benchmarks")


def refused(code: Exit, call, *args, **options) -> str:
    """The one line of the GateError that a call ends in."""
    with pytest.raises(GateError) as error:
        call(*args, **options)
    assert error.value.code is code
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_push_and_a_pull_are_a_copy_and_leave_everything_else_as_it_was(bare, repo):
    (repo / "code.py").write_text("x = 2\n")  # staged, then changed again, and a file git knows nothing of
    git(repo, "add", "code.py")
    (repo / "code.py").write_text("x = 3\n")
    (repo / "new.txt").write_text("new\n")
    before, main = untouched(repo), git(bare, "rev-parse", "main")
    [moved] = put(repo, "main")
    assert untouched(repo) == before
    assert git(bare, "rev-parse", "main") == main
    assert on_branch(bare) == files(repo)
    assert moved.files == tuple((f"{MACHINE}/{n}_main.json",) * 2 for n in ("0001", "0002"))
    assert git(bare, "rev-list", "--count", REF) == "1"  # a commit a run, and none of the code's
    assert git(bare, "log", "-1", "--format=%s", REF) == f"main: 2 sessions of aaaaaaaaa, {MACHINE}"
    other = clone(bare, "other")
    before = untouched(other)
    [moved] = get(other)
    assert (moved.name, len(moved.files)) == ("main", 2)
    assert files(other) == files(repo)
    assert untouched(other) == before
    assert load("main", other / ".benchmarks").sessions == 2


def test_each_run_is_a_commit_and_the_same_contents_are_there_once(bare, repo):
    save(repo, "change", 3, seed=3)
    main, change = put(repo, "main", "change")
    assert git(bare, "rev-list", "--count", REF) == "2"
    tip = git(bare, "rev-parse", REF)
    again = put(repo, "main", "main", "0002_main", "change")
    assert [(run.files, run.known) for run in again] == [
        ((), tuple(new for _, new in main.files)),
        ((), (main.files[1][1],)),
        ((), (change.files[0][1],)),
    ]
    assert git(bare, "rev-parse", REF) == tip
    assert all(not run.files for run in get(repo))
    copy = save(repo, "baseline", 4, seed=3)  # by another name it is another run
    copy.write_bytes((repo / ".benchmarks" / f"{MACHINE}/0003_change.json").read_bytes())
    [moved] = put(repo, "baseline")
    assert moved.files
    assert len(on_branch(bare)) == 4


def test_a_name_is_all_sessions_of_the_last_ones_commit_and_it_is_said_what_is_not(bare, repo):
    save(repo, "main", 3, seed=3, commit_id="b" * 40)
    [moved] = put(repo, "main")
    assert moved.files == ((f"{MACHINE}/0003_main.json",) * 2,)
    assert "2 of 3 runs saved as 'main' are of other commits, and left out" in moved.notes[0]


def test_two_writers_with_the_same_numbers_overwrite_nothing(bare, repo):
    put(repo, "main")
    other = clone(bare, "other")
    save(other, "main", 1, seed=11)
    save(other, "main", 2, seed=12)
    save(other, "change", 1, seed=13)
    main, change = put(other, "main", "change")
    taken = [f"{MACHINE}/{n}_main.json" for n in ("0003", "0004")]
    assert [new for _, new in main.files] == taken
    assert change.files == ((f"{MACHINE}/0001_change.json", f"{MACHINE}/0005_change.json"),)
    found = on_branch(bare)
    assert {*files(repo).values(), *files(other).values()} == set(found.values())
    assert len(found) == 5
    [back, _] = sorted(get(repo), key=lambda run: -len(run.known))
    assert back.known == tuple(f"{MACHINE}/{n}_main.json" for n in ("0001", "0002"))
    assert files(repo) == found
    [main, change] = sorted(get(other), key=lambda run: -len(run.files))  # whose first two have those numbers
    assert [new for _, new in main.files] == taken
    assert load("change", other / ".benchmarks").path.name == "0001_change.json"
    assert set(files(other).values()) == set(found.values())


def test_a_name_pulls_that_run_and_a_full_name_that_session(bare, repo):
    save(repo, "change", 3, seed=3)
    put(repo, "main", "change")
    other = clone(bare, "other")
    assert [run.name for run in get(other, "change")] == ["change"]
    assert [new for run in get(other, "0002_main") for _, new in run.files] == [f"{MACHINE}/0002_main.json"]
    assert sorted(files(other)) == [f"{MACHINE}/0002_main.json", f"{MACHINE}/0003_change.json"]
    why = refused(Exit.NOT_COMPARABLE, get, other, "nope")
    assert why.startswith("no run 'nope' on the branch perf-data at origin (there: change, main): push it")


def test_without_a_remote_the_branch_is_of_this_repository(repo, bare):
    before = untouched(repo)
    put(repo, "main", remote=".")
    assert on_branch(bare) == {}
    assert on_branch(repo) == files(repo)
    assert get(repo, remote=".")[0].known
    after = untouched(repo)
    assert after[1] - before[1] == {"refs/heads/perf-data", "logs/refs/heads/perf-data"}
    git(repo, "remote", "remove", "origin")
    assert str(open_branch(repo)) == "branch perf-data in this repository"
    assert put(repo, "main")[0].known


def test_a_storage_elsewhere_and_a_folder_inside_the_repository_will_do(bare, repo, tmp_path):
    (repo / "deep").mkdir()
    branch = open_branch(repo / "deep")
    push(["main"], branch, f"file://{repo / '.benchmarks'}")
    pull([], branch, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / MACHINE / "0002_main.json").is_file()


def test_a_commit_needs_no_identity_and_takes_the_one_there_is(bare, repo, monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    for role in ("AUTHOR", "COMMITTER"):
        for part in ("NAME", "EMAIL"):
            monkeypatch.delenv(f"GIT_{role}_{part}", raising=False)
    monkeypatch.delenv("EMAIL", raising=False)
    config = (repo / ".git" / "config").read_bytes()
    put(repo, "main")
    people = "--format=%an <%ae>, %cn <%ce>"
    nobody = "perf store <perf-store@localhost>"
    assert git(bare, "log", "-1", people, REF) == f"{nobody}, {nobody}"
    assert (repo / ".git" / "config").read_bytes() == config
    monkeypatch.setenv("GIT_AUTHOR_NAME", "A. Author")
    monkeypatch.setenv("GIT_AUTHOR_EMAIL", "a@example.org")
    save(repo, "change", 3, seed=3)
    put(repo, "change")
    assert git(bare, "log", "-1", people, REF) == f"A. Author <a@example.org>, {nobody}"


def test_hooks_and_settings_of_the_user_have_no_part_in_it(bare, repo):
    hooks = repo / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for name in ("pre-push", "reference-transaction", "post-index-change"):
        (hooks / name).write_text("#!/bin/sh\nexit 1\n")
        (hooks / name).chmod(0o755)
    for key, value in (("core.splitIndex", "true"), ("commit.gpgSign", "true"), ("push.followTags", "true"),
                       ("core.autocrlf", "true"), ("push.gpgSign", "if-asked")):  # fmt: skip
        git(repo, "config", key, value)
    (repo / ".gitattributes").write_text("* text eol=crlf\n")
    before = untouched(repo)
    put(repo, "main")
    assert on_branch(bare) == files(repo)
    assert untouched(repo) == before
    assert git(bare, "tag") == ""


def test_what_is_no_saved_run_is_refused_before_anything_is_written(bare, repo, tmp_path):
    before = untouched(repo)
    broken = save(repo, "broken", 5)
    broken.write_text("{}")
    assert "is not a pytest-benchmark run" in refused(Exit.NOT_COMPARABLE, put, repo, "main", "broken")
    untold = json.loads(save(repo, "untold", 6).read_text())
    for entry in untold["benchmarks"]:
        entry["extra_info"] = {}
    save(repo, "untold", 6).write_text(json.dumps(untold))
    why = refused(Exit.NOT_COMPARABLE, put, repo, "untold")
    assert "run 'untold' has nothing to compare: " in why
    assert "--benchmark-save-data" in why
    assert "no run 'nope' in " in refused(Exit.NOT_COMPARABLE, put, repo, "nope")
    outside = tmp_path / "0001_main.json"
    outside.write_bytes((repo / ".benchmarks" / MACHINE / "0001_main.json").read_bytes())
    assert "is not in the storage" in refused(Exit.USAGE, put, repo, str(outside))
    assert on_branch(bare) == {}
    assert untouched(repo) == before
    assert not (repo / ".git" / "refs" / "remotes" / "origin" / "perf-data").exists()


def test_a_file_that_is_too_large_is_refused_by_name_both_ways(bare, repo, monkeypatch):
    large = (repo / ".benchmarks" / MACHINE / "0002_main.json").stat().st_size
    put(repo, "main")
    monkeypatch.setattr(transfer, "MOST_BYTES", large - 1)
    save(repo, "main", 3, seed=2)
    why = refused(Exit.USAGE, put, repo, "main")
    assert "0002_main.json has 0.0 MiB, and " in why
    assert "is the most for a file on the branch: measure fewer" in why
    assert f"{MACHINE}/0002_main.json has " in refused(Exit.USAGE, get, clone(bare, "other"))
    assert len(on_branch(bare)) == 2


def test_a_place_without_branch_repository_or_remote_is_named_with_the_way_out(bare, repo, tmp_path):
    why = refused(Exit.NOT_COMPARABLE, get, repo)
    assert why == "there is no branch perf-data at origin: python -m perf store push NAME makes it"
    why = refused(Exit.USAGE, open_branch, tmp_path)
    assert f"{tmp_path} is in no git repository" in why
    assert why.endswith("run it in a checkout")
    why = refused(Exit.USAGE, open_branch, repo, "upstream")
    assert why == "--remote 'upstream' is none of this repository: give origin or . (this repository)"
    assert "is no name of a branch" in refused(Exit.USAGE, open_branch, repo, None, "a..b")
    git(repo, "remote", "rename", "origin", "upstream")
    why = refused(Exit.USAGE, open_branch, repo)
    assert why == "there is no remote 'origin': give --remote upstream or . (this repository)"
    git(repo, "remote", "set-url", "upstream", str(tmp_path / "gone"))
    why = refused(Exit.USAGE, get, repo, remote="upstream")
    assert why.startswith("upstream cannot be read (")
    assert "see that git fetch upstream works here" in why


def test_a_branch_with_other_things_on_it_is_not_written(bare, repo):
    git(bare, "update-ref", "refs/heads/feature", "main")
    folder = clone(bare, "work")
    (folder / "src").mkdir()
    (folder / "src" / "x.py").write_text("\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "code")
    git(folder, "push", "-q", "origin", "HEAD:feature")
    why = refused(Exit.USAGE, push, ["main"], open_branch(repo, name="feature"), repo / ".benchmarks")
    assert why.startswith("the branch feature at origin has src/x.py, which is no saved run: ")
    put(repo, "main", remote=".")
    git(repo, "checkout", "-q", "perf-data")
    assert f"--branch perf-data is checked out in {repo}" in refused(Exit.USAGE, open_branch, repo, ".")


def test_a_push_that_is_not_allowed_says_so_and_is_not_tried_again(bare, repo):
    hook = bare / "hooks" / "pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(
        "#!/bin/sh\necho no right to write >> asked\necho 'you may not, it is locked' >&2\nexit 1\n"
    )
    hook.chmod(0o755)
    why = refused(Exit.USAGE, put, repo, "main")
    assert why.startswith("the branch perf-data at origin cannot be written (")
    assert "remote: you may not, it is locked" in why
    assert "permissions: contents: write" in why
    assert (bare / "asked").read_text().count("\n") == 1
    assert on_branch(bare) == {}


def test_nothing_on_the_branch_leads_out_of_the_storage(bare, repo, tmp_path):
    put(repo, "main")
    contents = (repo / ".benchmarks" / MACHINE / "0001_main.json").read_bytes()
    blob = subprocess.run(["git", "hash-object", "-w", "--stdin"], cwd=bare, input=contents, check=True,
                          capture_output=True).stdout.decode().strip()  # fmt: skip

    def tree(*lines: str) -> str:
        given = "".join(f"{line}\n" for line in lines).encode()
        done = subprocess.run(["git", "mktree"], cwd=bare, input=given, check=True, capture_output=True)
        return done.stdout.decode().strip()

    evil = tree(f"100644 blob {blob}\t0009_evil.json", f"120000 blob {blob}\t0008_link.json")
    root = tree(f"040000 tree {evil}\t..", f"040000 tree {evil}\t.hidden", f"040000 tree {evil}\tgood",
                f"100644 blob {blob}\tREADME.md")  # fmt: skip
    head = git(bare, "commit-tree", root, "-m", "evil")
    git(bare, "update-ref", REF, head)
    other = clone(bare, "other")
    [moved] = get(other)
    assert [new for _, new in moved.files] == ["good/0009_evil.json"]
    assert sorted(files(other)) == ["good/0009_evil.json"]


@pytest.mark.parametrize(
    "path",
    [
        "/0001_a.json",
        "../0001_a.json",
        "a/../0001_a.json",
        ".git/0001_a.json",
        "a\\b/0001_a.json",
        "C:/0001_a.json",
        "0001.json",
        "001_a.json",
        "a/x",
    ],
)
def test_a_path_that_is_no_place_of_a_run(path):
    assert place_of(path, "x") is None


def test_places_keep_their_order_and_are_never_taken_twice():
    def places(*texts: str) -> list[Place]:
        return [place for text in texts if (place := place_of(text, text))]

    def paths(found: list[Place]) -> list[str]:
        return [place.path for place in found]

    there = places("m/0003_a.json", "n/0009_a.json")
    new = places("m/0001_a.json", "m/0007_a.json", "m/0002_b.json", "0002_c.json")
    assert paths(layout.append(new, there)) == [
        "m/0004_a.json", "m/0007_a.json", "m/0008_b.json", "0002_c.json",
    ]  # fmt: skip
    new = places("m/0002_a.json", "m/0003_a.json", "m/0003_b.json")
    assert sorted(paths(layout.insert(new, there))) == ["m/0003_b.json", "m/0004_a.json", "m/0005_a.json"]


def test_runs_on_the_branch_are_put_together_by_name_and_commit_in_the_order_of_time(bare, repo, tmp_path):
    put(repo, "main")
    for number, commit in ((5, "b"), (6, "c"), (7, "c")):
        save(repo, "night", number, seed=number, commit_id=commit * 40)
        put(repo, "night")
    odd = json.loads(save(repo, "odd", 8).read_text()) | {"commit_info": {"id": [1]}, "datetime": 7}
    branch = open_branch(repo)
    tip = branch.tip()
    files = {"m/0009_night.json": b"{}", "README": b"", "m/0010_odd.json": json.dumps(odd).encode()}
    branch.advance(tip, branch.commit(tip, {path: branch.keep(text) for path, text in files.items()}, "x"))
    found = stored(branch, tmp_path / "into")
    about = [(run.name, run.sessions, str(run.commit["id"])[:3]) for run in found.runs]
    assert about == [("main", 2, "aaa"), ("night", 1, "bbb"), ("night", 2, "ccc"), ("odd", 1, "[1]")]
    [line] = found.left_out
    assert line.startswith("run 'm/0009_night.json' is not a pytest-benchmark run")
