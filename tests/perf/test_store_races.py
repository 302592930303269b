"""Two writers of one branch: whoever loses begins again on the new tip, and nothing is lost or half done."""

from __future__ import annotations

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from perf.errors import GateError
from perf.store import Branch, branch as branches, open_branch, pull, push
from perf.store.branch import LostRaceError
from tests.perf.repos import git
from tests.perf.stored import REF, clone, files, hub, on_branch, save, untouched


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    return hub(tmp_path)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "MOST_WAIT_S", 0.02)


def put(where: Path, *names: str, remote: str | None = None) -> None:
    push(names, open_branch(where, remote), where / ".benchmarks")


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("remote", [None, "."])
def test_who_is_overtaken_between_reading_and_writing_begins_again(bare, monkeypatch, exists, remote):
    one = clone(bare, "one")
    two = one if remote else clone(bare, "two")
    names = ["early"] if exists else []
    for number, (where, name) in enumerate(
        [(one, "early"), (one, "slow"), (two, "fast"), (two, "faster")], 1
    ):
        save(where, name, number if where is one else number - 2, seed=number)
    if exists:
        put(one, "early", remote=remote)
    advance, overtakers, lost = Branch.advance, ["fast", "faster"], []

    def overtaken(self: Branch, tip: str | None, commit: str) -> None:
        if self.where == one and overtakers and threading.current_thread().name != "other":
            name = overtakers.pop(0)
            other = threading.Thread(target=put, args=(two, name), kwargs={"remote": remote}, name="other")
            other.start()
            other.join()
        try:
            advance(self, tip, commit)
        except LostRaceError as error:
            lost.append(str(error))
            raise

    monkeypatch.setattr(Branch, "advance", overtaken)
    put(one, "slow", remote=remote)
    found = on_branch(one if remote else bare)
    assert len(lost) == 2
    assert len(found) == 3 + len(names)
    assert {path.split("_")[-1] for path in found} == {
        f"{name}.json" for name in [*names, "slow", "fast", "faster"]
    }
    assert git(one if remote else bare, "rev-list", "--count", REF) == str(3 + len(names))


def test_a_remote_whose_branch_moves_while_it_takes_a_push(bare):
    """By a hook, which runs after the remote has checked what the push is built on."""
    one, two = clone(bare, "one"), clone(bare, "two")
    save(one, "early", 1, seed=1)
    put(one, "early")
    save(two, "fast", 1, seed=2)
    put(two, "fast")
    git(bare, "update-ref", "refs/heads/later", REF)
    git(bare, "update-ref", REF, f"{REF}~1")
    hook = bare / "hooks" / "update"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\n[ -e moved ] || git update-ref {REF} refs/heads/later\ntouch moved\n")
    hook.chmod(0o755)
    save(one, "slow", 2, seed=3)
    put(one, "slow")
    assert (bare / "moved").exists()
    assert {path.split("_")[-1] for path in on_branch(bare)} == {"early.json", "fast.json", "slow.json"}


def test_who_is_always_overtaken_gives_up_and_says_so(bare, monkeypatch):
    where = clone(bare, "one")
    save(where, "main")

    def overtaken(self: Branch, tip: str | None, commit: str) -> None:
        raise LostRaceError("fetch first")

    monkeypatch.setattr(Branch, "advance", overtaken)
    monkeypatch.setattr(branches, "ATTEMPTS", 3)
    with pytest.raises(GateError, match="another writer of the branch perf-data at origin was faster"):
        put(where, "main")


@pytest.mark.parametrize(
    ("writers", "clones", "remote"),
    [(4, 2, None), (4, 1, "."), pytest.param(20, 20, None, marks=pytest.mark.slow),
     pytest.param(20, 1, None, marks=pytest.mark.slow)],
)  # fmt: skip
def test_many_writers_at_once_lose_nothing(bare, writers, clones, remote):
    places = [clone(bare, f"clone{number}") for number in range(clones)]
    jobs = [(places[number % clones], f"run{number}") for number in range(writers)]
    for number, (where, name) in enumerate(jobs):
        save(where, name, number // clones + 1, seed=2 * number)
        save(where, name, number // clones + 101, seed=2 * number + 1)
    before = [untouched(where) for where in places]
    barrier = threading.Barrier(writers)

    def write(job: tuple[Path, str]) -> None:
        barrier.wait()
        put(*job, remote=remote)

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, jobs))
    target = places[0] if remote else bare
    found = on_branch(target)
    assert sorted(found.values()) == sorted(text for where in places for text in files(where).values())
    assert len({path.split("/")[-1].split("_")[0] for path in found}) == 2 * writers  # each number once
    assert git(target, "rev-list", "--count", REF) == str(writers)
    if not remote:
        assert [untouched(where) for where in places] == before


class KilledError(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("remote", [None, "."])
def test_a_push_that_is_killed_at_any_step_leaves_all_of_it_or_nothing(bare, monkeypatch, tmp_path, remote):
    where = clone(bare, "one")
    save(where, "early", 1, seed=1)
    put(where, "early", remote=remote)
    save(where, "main", 2, seed=2)
    save(where, "main", 3, seed=3)
    ask, target = branches.ask_git, where if remote else bare
    before, early = untouched(where), on_branch(target)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    steps = 0

    def killed(*args, **options):
        nonlocal steps
        steps -= 1
        if steps < 0:
            raise KilledError
        return ask(*args, **options)

    monkeypatch.setattr(branches, "ask_git", killed)
    monkeypatch.setattr(branches, "git", lambda *args, **options: _checked(killed(*args, **options)))
    done, count = False, 0
    while not done:
        steps = count
        try:
            put(where, "main", remote=remote)
            done = True
        except KilledError:
            assert on_branch(target) == early
            assert untouched(where) == before
        assert list(temporary.iterdir()) == []
        count += 1
    assert count > 8
    assert len(on_branch(target)) == 3


def _checked(done) -> str:
    assert done.returncode == 0
    return done.stdout.decode().strip()


def test_a_pull_that_ends_early_leaves_no_file(bare, monkeypatch):
    one, two = clone(bare, "one"), clone(bare, "two")
    save(one, "main", 1, seed=1)
    save(one, "main", 2, seed=2)
    put(one, "main")
    contents = Branch.contents

    def ended(self, oids):
        yield next(iter(contents(self, oids)))
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Branch, "contents", ended)
        with pytest.raises(KilledError):
            pull([], open_branch(two), two / ".benchmarks")
    assert files(two) == {}
    assert list((two / ".benchmarks").iterdir()) == []
    pull([], open_branch(two), two / ".benchmarks")
    assert files(two) == files(one)
