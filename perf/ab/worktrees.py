"""Working trees of git revisions for `perf ab`, whole: with submodules and the contents of git-lfs files.

What the checkout has of them is taken from there, without a network. The checkout itself stays as it is: its
index and configuration, and those of its submodules, are read and never written. It measures nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from perf.ab.revisions import git, gitlinks
from perf.errors import GateError, sigterm_interrupts, uninterrupted

NO_HOOKS = ("-c", "core.hooksPath=/dev/null")
POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\n(?:.*\n)*?oid sha256:([0-9a-f]{64})\nsize (\d+)\n"
)
POINTER_BYTES = 1024  # a git-lfs pointer is smaller


@contextmanager
def worktrees(top: Path, commits: Sequence[str]) -> Iterator[list[Path]]:
    """A detached worktree for each of two commits, in a temporary folder; removed on SIGTERM too.

    Raises:
        GateError: code 3, for a submodule or a git-lfs file that cannot be had.
    """
    with sigterm_interrupts():
        folder = Path(tempfile.mkdtemp(prefix="perf-ab-"))
        trees = [folder / side for side in ("base", "head")]
        try:
            store = top / git(top, "rev-parse", "--git-common-dir")
            upstream = _setting(top, "remote.origin.url") or str(top)
            for tree, commit in zip(trees, commits, strict=True):
                git(top, *NO_HOOKS, "worktree", "add", "--quiet", "--detach", str(tree), commit)
                try:
                    _complete(tree, top, "", [store], upstream)
                except GateError as error:
                    raise GateError(f"{tree.name} ({commit[:9]}): {error}") from None
            yield trees
        finally:
            with uninterrupted():
                try:
                    for tree in trees:
                        if tree.exists():
                            git(top, "worktree", "remove", "--force", str(tree))
                finally:
                    shutil.rmtree(folder)


def _complete(top: Path, checkout: Path, within: str, stores: Sequence[Path], upstream: str) -> None:
    """Give a new working tree what git left out of it: contents of git-lfs files, submodules, and theirs.

    Args:
        top: the new working tree of the whole.
        checkout: its counterpart.
        within: where in both the repository is that is completed; the checkout may have nothing there.
        stores: git directories that the checkout keeps for this repository.
        upstream: the URL of this repository, which relative URLs of submodules start from.
    """
    tree, origin = top / within, checkout / within
    _fill_pointers(tree, origin, stores)
    known = _modules(tree)
    for path, commit in gitlinks(tree):
        settings = known.get(path, {})
        key = f"submodule.{settings.get('name', path)}"
        active = _setting(origin, f"{key}.active") or "true"
        chosen = _setting(origin, f"{key}.update") or settings.get("update")
        if chosen == "none" or active.lower() in ("false", "no", "off", "0"):
            continue  # git's own ways to say that this one stays empty
        url = _setting(origin, f"{key}.url") or _resolve(settings.get("url", ""), upstream)
        found = list(_stores(origin / path, settings.get("name", path), stores))
        place = f"{within}/{path}".lstrip("/")
        try:
            _check_out(tree / path, commit, found, url)
        except GateError as error:
            there = f" -C {shlex.quote(within)}" if within else ""
            why = " ".join(str(error).split())
            raise GateError(
                f"submodule {place} cannot be initialised at {commit[:9]}: {why}; run git submodule update "
                f"--init --recursive, or git{there} config {shlex.quote(key)}.update none if it is not needed"
            ) from None
        _complete(top, checkout, place, found, url)


def _modules(repo: Path) -> dict[str, dict[str, str]]:
    """Read what .gitmodules says of each submodule, by its path; with the submodule's `name`."""
    if not (repo / ".gitmodules").is_file():
        return {}
    found: dict[str, dict[str, str]] = {}
    for entry in git(repo, "config", "--file", ".gitmodules", "--list", "-z").split("\0"):
        key, _, value = entry.partition("\n")
        section, _, rest = key.partition(".")
        name, _, variable = rest.rpartition(".")
        if section == "submodule" and ".." not in Path(name).parts:
            found.setdefault(name, {"name": name})[variable] = value
    return {settings["path"]: settings for settings in found.values() if "path" in settings}


def _setting(repo: Path, key: str) -> str | None:
    """A value of a repository's configuration; None if unset, or where the folder is no repository."""
    if not (repo / ".git").exists():
        return None
    return git(repo, "config", "--default", "", "--get", key) or None


def _resolve(url: str, upstream: str) -> str:
    """The URL of a submodule, of which `./x` and `../x` are relative to that of the repository it is in."""
    base, slash = upstream.rstrip("/"), "/"
    if not url.startswith(("./", "../")):
        return url
    while url.startswith(("./", "../")):
        step, _, url = url.partition("/")
        if step == "..":
            slash = "/" if "/" in base else ":"  # host:repository has no other place to cut
            base = base.rpartition(slash)[0]
    return f"{base}{slash}{url}"


def _stores(place: Path, name: str, parents: Sequence[Path]) -> Iterator[Path]:
    """The git directories where a checkout keeps a submodule: its own, and where git puts one away."""
    if (place / ".git").is_dir():
        yield place / ".git"
    elif (place / ".git").is_file():
        kept = place / (place / ".git").read_text(encoding="utf-8").partition(":")[2].strip()
        yield kept / (kept / "commondir").read_text().strip() if (kept / "commondir").is_file() else kept
    yield from (parent / "modules" / name for parent in parents)


def _check_out(place: Path, commit: str, stores: Sequence[Path], url: str) -> None:
    """Make a repository of `place` at a commit, of the objects in `stores`, else of those fetched from `url`.

    The stores are borrowed from and not written to, so that there is nothing to be cleaned up in them.
    """
    place.mkdir(parents=True, exist_ok=True)
    form = ["--object-format=sha256"] if len(commit) == 64 else []
    git(place, "init", "--quiet", "--template=", *form)
    own = place / ".git"
    kept = [store.resolve() for store in stores if (store / "objects").is_dir()]
    (own / "objects" / "info").mkdir(parents=True, exist_ok=True)
    borrowed = b"".join(os.fsencode(store / "objects") + b"\n" for store in kept)
    (own / "objects" / "info" / "alternates").write_bytes(borrowed)
    if cut := "".join((store / "shallow").read_text() for store in kept if (store / "shallow").is_file()):
        (own / "shallow").write_text(cut)
    if lfs := next((store / "lfs" for store in kept if (store / "lfs").is_dir()), None):
        git(place, "config", "lfs.storage", str(lfs))
    try:
        git(place, "cat-file", "-e", f"{commit}^{{commit}}")
    except GateError:
        if not url:
            why = "the checkout does not have this commit, and .gitmodules names no URL for it"
            raise GateError(why) from None
        # As git does for submodules: not from where only a user's own hand may send it.
        git(place, "fetch", "--quiet", "--depth=1", "--", url, commit, extra={"GIT_PROTOCOL_FROM_USER": "0"})
    git(place, *NO_HOOKS, "checkout", "--quiet", "--detach", commit)


def _fill_pointers(tree: Path, origin: Path, stores: Sequence[Path]) -> None:
    """Put the contents of git-lfs files where a tree has only pointers to them, as it has without git-lfs.

    Raises:
        GateError: if the contents are not in the checkout; never if GIT_LFS_SKIP_SMUDGE asks for pointers.
    """
    if os.environ.get("GIT_LFS_SKIP_SMUDGE", "0").lower() not in ("0", "false", ""):
        return
    for path in _small_files(tree):
        file = tree / path
        pointer = POINTER.fullmatch(file.read_bytes()) if file.is_file() and not file.is_symlink() else None
        if pointer is None:
            continue
        oid, size = pointer[1].decode(), int(pointer[2])
        places = [store / "lfs" / "objects" / oid[:2] / oid[2:4] / oid for store in stores]
        known = next((place for place in [*places, origin / path] if _holds(place, oid, size)), None)
        if known is None:
            raise GateError(
                f"{path} is a git-lfs pointer, and its contents are not in the checkout: run git lfs fetch "
                "--all, or set GIT_LFS_SKIP_SMUDGE=1 if nothing measured reads it"
            )
        shutil.copyfile(known, file)
        git(tree, "update-index", "--assume-unchanged", "--", path)  # or the tree would count as edited


def _small_files(tree: Path) -> Iterator[str]:
    """The tracked files that are small enough for a git-lfs pointer."""
    for entry in git(tree, "ls-tree", "-r", "-l", "-z", "HEAD").split("\0"):
        about, _, path = entry.partition("\t")
        mode, _, _, size = about.split() if path else ("", "", "", "")
        if mode.startswith("100") and int(size) < POINTER_BYTES:
            yield path


def _holds(file: Path, oid: str, size: int) -> bool:
    """Return whether a file has the contents that a pointer means."""
    if not file.is_file() or file.stat().st_size != size:
        return False
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == oid
