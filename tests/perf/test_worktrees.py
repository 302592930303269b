"""Trees of revisions are whole: submodules and git-lfs files as the revision has them, from the checkout,
offline."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from perf.ab import worktrees
from perf.ab.main import ab
from perf.ab.revisions import commit_of, snapshot
from perf.errors import Exit, GateError
from perf.gate.comparison import Outcome
from tests.perf.repos import LOCAL, RECORD, commit, git

pytestmark = pytest.mark.usefixtures("few_plugins")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """A checkout with a submodule `vendor/lib` (rate 100, then 50), in which there is another, `deep`.

    Where they were cloned from is gone.
    """
    folder = tmp_path_factory.mktemp("made-once")
    for name in ("deep", "lib", "checkout"):
        (folder / name).mkdir()
        git(folder / name, "init", "-q")
    (folder / "deep" / "depth.py").write_text("DEPTH = 1\n")
    commit(folder / "deep", "one")
    add = (*LOCAL, "submodule", "--quiet", "add")
    git(folder / "lib", *add, "--name", "a deep one", "../deep", "lib/deep")
    (folder / "lib" / "lib" / "__init__.py").write_text("from lib.deep import depth\nRATE = 100\n")
    commit(folder / "lib", "fast")
    top = folder / "checkout"
    git(top, *add, "../lib", "vendor/lib")
    git(top, *LOCAL, "submodule", "--quiet", "update", "--init", "--recursive")
    (top / "test_thing.py").write_text("import lib\n" + RECORD.format(rate="lib.RATE"))
    (top / ".gitignore").write_text("__pycache__\n")
    commit(top, "good")
    (top / "vendor" / "lib" / "lib" / "__init__.py").write_text("from lib.deep import depth\nRATE = 50\n")
    commit(top / "vendor" / "lib", "halved")
    commit(top, "slow")
    for name in ("deep", "lib"):
        shutil.rmtree(folder / name)
    return top


@pytest.fixture
def top(made_once, tmp_path, monkeypatch):
    """A copy of that checkout; nothing may be left of the trees."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    top = tmp_path / "checkout"
    shutil.copytree(made_once, top, symlinks=True)
    for config in top.rglob("config"):  # in which URLs are absolute
        config.write_text(config.read_text().replace(str(made_once.parent), str(tmp_path)))
    yield top
    assert list(temporary.iterdir()) == []
    assert len(git(top, "worktree", "list").splitlines()) == 1


def state(top: Path) -> list[str]:
    """What git knows of a checkout and its submodules: index, configuration, references, what has been
    changed."""
    asked = ["ls-files --stage", "config --local --list", "for-each-ref", "rev-parse HEAD"]
    asked.append("status --porcelain")
    repositories = [top, top / "vendor" / "lib", top / "vendor" / "lib" / "lib" / "deep"]
    return [git(repository, *question.split()) for repository in repositories for question in asked]


def contents(tree: Path) -> tuple[str, str]:
    """Rate and depth, as the files of a tree have them."""
    lib = tree / "vendor" / "lib" / "lib"
    return (lib / "__init__.py").read_text().split()[-1], (lib / "deep" / "depth.py").read_text().split()[-1]


def made(top: Path, *revisions: str) -> list[tuple[str, str]]:
    commits = [commit_of(top, revision) for revision in revisions]
    with worktrees.worktrees(top, commits) as found:
        assert all(git(tree, "status", "--porcelain") == "" for tree in found)
        assert all((tree / "vendor" / "lib" / ".git").is_dir() for tree in found)
        return [contents(tree) for tree in found]


@pytest.mark.slow
def test_a_slowdown_in_a_submodule_is_a_regression(top, monkeypatch):
    """The checkout's own copy is on the path, as in most projects that have one: its place in each tree is
    meant."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(top / "vendor" / "lib"), str(ROOT)]))
    before = state(top)
    comparison = ab("good", "slow", ["test_thing.py"], interleave="blocks", blocks=4, repo=top)
    (verdict,) = comparison.verdicts
    assert (verdict.outcome, comparison.exit) == (Outcome.FAIL, Exit.REGRESSION)
    assert (verdict.base, verdict.head) == (pytest.approx(100), pytest.approx(50))
    assert state(top) == before


def test_submodules_are_there_at_the_revisions_commits_and_theirs_too(top):
    assert made(top, "good", "slow") == [("100", "1"), ("50", "1")]


def test_of_a_working_tree_submodules_are_taken_as_they_are(top):
    lib = top / "vendor" / "lib" / "lib"
    (lib / "__init__.py").write_text("RATE = 7\n")
    (lib / "deep" / "depth.py").write_text("DEPTH = 9\n")
    (lib / "deep" / "new.py").touch()
    before = state(top)
    assert made(top, "good", ".") == [("100", "1"), ("7", "9")]
    assert state(top) == before


def test_a_repository_that_is_no_registered_submodule_is_taken_as_it_is(top):
    (top / "embedded").mkdir()
    (top / "embedded" / "a.py").write_text("1")
    commit(top / "embedded", "one")
    with worktrees.worktrees(top, [commit_of(top, "."), commit_of(top, ".")]) as (tree, _):
        assert (tree / "embedded" / "a.py").read_text() == "1"


def test_a_submodule_that_the_checkout_has_put_away_is_taken_from_where_git_keeps_it(top):
    git(top, "submodule", "--quiet", "deinit", "--force", "vendor/lib")
    assert list((top / "vendor" / "lib").iterdir()) == []
    assert made(top, "good", "slow") == [("100", "1"), ("50", "1")]


def test_a_linked_worktree_and_an_own_folder_of_git_will_do(top, tmp_path):
    other = tmp_path / "other"
    git(top, "worktree", "add", "-q", "--detach", str(other), "slow")
    assert made(other, "good", "slow") == [("100", "1"), ("50", "1")]
    git(top, "worktree", "remove", str(other))
    kept = top / ".git" / "modules" / "vendor" / "lib"
    (top / "vendor" / "lib" / ".git").unlink()
    kept.rename(top / "vendor" / "lib" / ".git")  # as old gits had it
    git(top, "config", "--file", "vendor/lib/.git/config", "--unset", "core.worktree")
    assert made(top, "good", "slow") == [("100", "1"), ("50", "1")]


def test_shallow_checkouts_will_do(top, tmp_path):
    """As CI has them: of the submodule there is one commit, on no branch."""
    for name, source in (("shallow", top), ("shallow/vendor/lib", top / "vendor" / "lib")):
        git(tmp_path, "init", "-q", name)
        git(tmp_path / name, "fetch", "-q", "--depth=1", f"file://{source}", "HEAD")
        git(tmp_path / name, "checkout", "-q", "FETCH_HEAD")
    deep = tmp_path / "shallow" / "vendor" / "lib" / "lib" / "deep"
    shutil.rmtree(deep)
    git(tmp_path, "clone", "-q", str(top / "vendor" / "lib" / "lib" / "deep"), str(deep))
    assert made(tmp_path / "shallow", "HEAD", "HEAD") == [("50", "1"), ("50", "1")]


def test_gits_variables_of_a_hook_lead_nowhere_else(top, tmp_path, monkeypatch):
    monkeypatch.chdir(top)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("DIR", ".git"), ("INDEX_FILE", ".git/index"), ("WORK_TREE", str(top))):
            patch.setenv(f"GIT_{name}", value)
        commits = [commit_of(top, "good"), commit_of(top, "slow")]
        with worktrees.worktrees(top, commits) as found:
            assert [contents(tree) for tree in found] == [("100", "1"), ("50", "1")]


@pytest.mark.parametrize("depth", ["vendor/lib", "vendor/lib/lib/deep"])
def test_a_submodule_that_cannot_be_had_is_named_with_the_reason(top, depth):
    kept = top / ".git" / "modules" / "vendor" / "lib"
    shutil.rmtree(kept if depth == "vendor/lib" else kept / "modules" / "a deep one")
    with pytest.raises(GateError) as error:
        made(top, "good", "slow")
    assert error.value.code is Exit.NOT_COMPARABLE
    said = str(error.value)
    commit = git(top, "rev-parse", "good")[:9]
    assert said.startswith(f"base ({commit}): submodule {depth} cannot be initialised at ")
    assert "fetch" in said
    assert "run git submodule update --init --recursive" in said
    assert "\n" not in said


def test_a_commit_that_is_nowhere_and_has_no_url_is_named_with_the_reason(top):
    git(top, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},stray")
    git(top, "commit", "-q", "-m", "a stray gitlink")
    with pytest.raises(GateError, match="submodule stray cannot be initialised at 111111111: ") as error:
        made(top, "HEAD", "good")
    assert error.value.code is Exit.NOT_COMPARABLE
    assert "the checkout does not have this commit, and .gitmodules names no URL for it; " in str(error.value)
    git(top, "config", "submodule.stray.update", "none")
    assert made(top, "HEAD", "good") == [("50", "1"), ("100", "1")]


@pytest.mark.parametrize("say", [("update", "none"), ("active", "false")])
def test_a_submodule_that_nobody_wants_stays_empty(top, say):
    shutil.rmtree(top / ".git" / "modules")
    git(top, "config", f"submodule.vendor/lib.{say[0]}", say[1])
    with worktrees.worktrees(top, [commit_of(top, name) for name in ("good", "slow")]) as found:
        assert [list((tree / "vendor" / "lib").iterdir()) for tree in found] == [[], []]


def test_what_the_checkout_does_not_have_is_fetched(top, tmp_path, monkeypatch):
    """Git lets submodules come from a folder only where the user says so."""
    git(tmp_path, "clone", "-q", "--bare", str(top / "vendor" / "lib"), "lib")
    git(tmp_path, "clone", "-q", "--bare", str(top / "vendor" / "lib" / "lib" / "deep"), "deep")
    shutil.rmtree(top / ".git" / "modules")
    shutil.rmtree(top / "vendor" / "lib")
    (top / "vendor" / "lib").mkdir()
    with pytest.raises(GateError, match="transport 'file' not allowed"):
        made(top, "good", "slow")
    for key, value in (("COUNT", "1"), ("KEY_0", "protocol.file.allow"), ("VALUE_0", "always")):
        monkeypatch.setenv(f"GIT_CONFIG_{key}", value)
    assert made(top, "good", "slow") == [("100", "1"), ("50", "1")]


@pytest.mark.parametrize(("url", "upstream", "found"), [
    ("https://h/x", "https://h/a/b", "https://h/x"), ("/x/y", "https://h/a/b", "/x/y"),
    ("", "https://h/a/b", ""), ("../x", "https://h/a/b", "https://h/a/x"),
    ("../../c/x.git", "https://h/a/b.git/", "https://h/c/x.git"),
    ("./x", "https://h/a/b", "https://h/a/b/x"), ("../x", "git@h:a/b", "git@h:a/x"), ("../x", "h:b", "h:x"),
])  # fmt: skip
def test_a_relative_url_starts_from_the_one_above(url, upstream, found):
    assert worktrees._resolve(url, upstream) == found


WEIGHTS = b"weights " * 99
OID = hashlib.sha256(WEIGHTS).hexdigest()
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{OID}\nsize {len(WEIGHTS)}\n"


def stored(top: Path) -> None:
    place = top / ".git" / "lfs" / "objects" / OID[:2] / OID[2:4]
    place.mkdir(parents=True)
    (place / OID).write_bytes(WEIGHTS)


def worked_on(top: Path) -> None:
    (top / "weights").write_bytes(WEIGHTS)


@pytest.mark.parametrize("where", [stored, worked_on])
def test_contents_of_git_lfs_files_are_taken_from_the_checkout(top, where):
    (top / "weights").write_text(POINTER)
    pointer = commit(top, "pointer")
    where(top)
    with worktrees.worktrees(top, [pointer, pointer]) as found:
        assert [(tree / "weights").read_bytes() for tree in found] == [WEIGHTS, WEIGHTS]
        assert git(found[0], "status", "--porcelain") == ""


def test_a_git_lfs_file_whose_contents_are_not_there_is_named(top, monkeypatch):
    (top / "weights").write_text(POINTER)
    pointer = commit(top, "pointer")
    (top / "weights").write_bytes(WEIGHTS[::-1])  # as long, and another
    with pytest.raises(GateError, match="weights is a git-lfs pointer, and its contents are not in") as error:
        made(top, pointer, "good")
    assert error.value.code is Exit.NOT_COMPARABLE
    monkeypatch.setenv("GIT_LFS_SKIP_SMUDGE", "1")
    with worktrees.worktrees(top, [pointer, pointer]) as found:
        assert (found[0] / "weights").read_text() == POINTER


@pytest.mark.parametrize(
    "bits", [["--assume-unchanged"], ["--skip-worktree"], ["--assume-unchanged", "--skip-worktree"]]
)
@pytest.mark.parametrize("where", ["", "vendor/lib"])
def test_the_working_tree_has_what_git_was_told_not_to_look_at(top, bits, where):
    repository = top / where
    file = "test_thing.py" if not where else "lib/__init__.py"
    for bit in bits:
        git(repository, "update-index", bit, file)
    (repository / file).write_text("CHANGED = 1\n")
    before = git(repository, "ls-files", "-v")
    with worktrees.worktrees(top, [commit_of(top, "HEAD"), commit_of(top, ".")]) as (_, tree):
        assert (tree / where / file).read_text() == "CHANGED = 1\n"
    assert git(repository, "ls-files", "-v") == before


def test_a_sparse_checkout_keeps_what_it_leaves_out(top):
    (top / "far").mkdir()
    (top / "far" / "away.py").write_text("FAR = 1\n")
    (top / "far" / "near.py").write_text("FAR = 1\n")
    commit(top, "far")
    git(top, "sparse-checkout", "set", "--no-cone", "/*", "!/far/")
    assert not (top / "far").exists()
    (top / "far").mkdir()
    (top / "far" / "near.py").write_text("FAR = 2\n")
    with worktrees.worktrees(top, [commit_of(top, "HEAD"), commit_of(top, ".")]) as (_, tree):
        files = git(tree, "ls-tree", "-r", "--name-only", "HEAD").split()
        assert {"far/away.py", "far/near.py"} <= set(files)
        assert git(tree, "show", "HEAD:far/away.py") == "FAR = 1"
        assert git(tree, "show", "HEAD:far/near.py") == "FAR = 2"


def test_an_edit_in_the_second_of_the_last_commit_is_seen(top):
    """Of the same size and time: git then looks at the contents, by the time of its index."""
    git(top, "config", "core.trustctime", "false")
    file, long_ago = top / "same.py", (1_600_000_000, 1_600_000_000)
    file.write_text("RATE = 1\n")
    os.utime(file, long_ago)
    commit(top, "same")
    os.utime(top / ".git" / "index", long_ago)
    file.write_text("RATE = 2\n")
    os.utime(file, long_ago)
    assert git(top, "show", f"{snapshot(top)}:same.py") == "RATE = 2"
