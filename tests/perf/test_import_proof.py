"""`perf ab` proves where a block's code came from: whatever way leads out of its own tree is refused by name.

There is a checkout with a library in `vendor/`, a revision's tree of it, and a Python environment of its own
in whose site-packages traps are laid. Most tests watch one process and not a whole block: the logs are the
same.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import replace
from pathlib import Path

import pytest

from perf.ab.import_proof import Log, Place, Surroundings, Watch, environment
from perf.errors import Exit, GateError
from tests.perf.repos import RECORD, commit, git

pytestmark = pytest.mark.usefixtures("few_plugins")
ROOT = Path(__file__).parents[2]


class Scene:
    """A checkout and its revision's tree; a Python; and `outside` of all that."""

    def __init__(self, folder: Path) -> None:
        self.top, self.tree, self.outside = (folder / name for name in ("checkout", "tree", "outside"))
        self.lib = self.top / "vendor" / "lib" / "__init__.py"
        self.lib.parent.mkdir(parents=True)
        self.lib.write_text("RATE = 100\n")
        (self.top / "vendor" / "work.py").write_text("import lib\n")
        shutil.copytree(self.top, self.tree)
        self.outside.mkdir()
        venv.create(folder / "venv", symlinks=True)
        self.python = folder / "venv" / "bin" / "python"
        (self.site,) = (folder / "venv").glob("lib/python*/site-packages")
        self.count = 0
        self.around = Surroundings(self.top, (self.top, self.tree), frozenset())
        self.since = self.outside.stat().st_ctime + 3600  # nothing that a test puts down is new

    def check(self, code: str, *, path: str | None = None) -> None:
        """Run `code` as a block of the tree would be, and look through what it logged."""
        self.count += 1
        watch = Watch.begin(self.outside / f"watch-{self.count}", self.tree, self.around)
        watch = replace(watch, since=self.since)
        env = watch.environment()
        if path:
            env["PYTHONPATH"] += os.pathsep + path
        command = [self.python, "-c", code]
        done = subprocess.run(command, cwd=self.tree, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        watch.check("block 1, good")

    def refused(self, code: str, **options: str) -> str:
        """Likewise, where it must be refused; gives the message."""
        with pytest.raises(GateError) as error:
            self.check(code, **options)
        assert error.value.code is Exit.NOT_COMPARABLE
        assert str(error.value).startswith("block 1, good: ")
        assert "\n" not in str(error.value)
        return str(error.value).removeprefix("block 1, good: ")


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return Scene(tmp_path)


def hook(scene: Scene) -> None:
    """As an editable install does that maps names to folders."""
    (scene.site / "_editable.py").write_text(
        "import importlib.util, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'lib':\n"
        f"            return importlib.util.spec_from_file_location(name, {str(scene.lib)!r})\n"
        "sys.meta_path.append(Finder())\n"
    )
    (scene.site / "_editable.pth").write_text("import _editable\n")


def path_file(scene: Scene) -> None:
    (scene.site / "lib.pth").write_text(f"{scene.lib.parents[1]}\n")


def link(scene: Scene) -> None:
    (scene.site / "lib").symlink_to(scene.lib.parent)


def clone(scene: Scene) -> None:
    shutil.copytree(scene.top, scene.outside / "clone")
    (scene.outside / "clone" / ".git").mkdir()
    (scene.site / "lib.pth").write_text(f"{scene.outside / 'clone' / 'vendor'}\n")


def link_to_a_clone(scene: Scene) -> None:
    clone(scene)
    (scene.site / "lib.pth").unlink()
    (scene.site / "lib").symlink_to(scene.outside / "clone" / "vendor" / "lib")


def helper_folder(scene: Scene) -> None:
    shutil.copytree(scene.lib.parents[1], scene.outside / "vendor")
    (scene.site / "lib.pth").write_text(f"{scene.outside / 'vendor'}\n")


@pytest.mark.parametrize(("trap", "place"), [
    (path_file, Place.CHECKOUT), (hook, Place.CHECKOUT), (link, Place.CHECKOUT), (clone, Place.ELSEWHERE),
    (link_to_a_clone, Place.ELSEWHERE), (helper_folder, Place.ELSEWHERE),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_what_an_environment_finds_elsewhere_is_refused(scene, trap, place):
    trap(scene)
    said = scene.refused("import lib")
    assert said.startswith(f"lib was imported by {scene.python} -c 'import lib' from {scene.top.parent}")
    assert f"lib/__init__.py, which is {place.value}: " in said


def test_the_other_revisions_tree_is_refused(scene, tmp_path):
    shutil.copytree(scene.tree, tmp_path / "other")
    around = Surroundings(scene.top, (scene.top, scene.tree, tmp_path / "other"), frozenset())
    watch = Watch.begin(tmp_path / "watch", scene.tree, around)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'other' / 'vendor')!r}); import lib"
    subprocess.run([scene.python, "-c", code], env=watch.environment(), check=True)
    file = tmp_path / "other" / "vendor" / "lib" / "__init__.py"
    with pytest.raises(GateError, match=f"from {file}, which is a checkout's copy"):
        watch.check("block 1")


GETS_LIB = "import sys; sys.path.insert(0, {vendor!r}); import lib"
WAYS = {
    "a path": "{gets}",
    "a killed worker": """
import signal, subprocess, sys
code = {gets!r} + "; import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
""",
    "a fork": """
import os
if not os.fork():
    exec({gets!r})
    os._exit(0)
os.wait()
""",
    "a script of the checkout": """
import subprocess, sys
subprocess.run([sys.executable, {script!r}], check=True)
""",
    "a folder to work in": """
import subprocess, sys
subprocess.run([sys.executable, "-c", "import lib"], cwd={vendor!r}, check=True)
""",
    "a module that is not kept": """
import importlib.util
spec = importlib.util.spec_from_file_location("lib", {lib!r})
importlib.util.module_from_spec(spec)
""",
    "an import hook": """
import sys
from importlib.machinery import PathFinder
class Finder:
    find_spec = lambda self, *_: PathFinder.find_spec("lib", [{vendor!r}])
sys.meta_path.insert(0, Finder())
import lib
del sys.meta_path[0], sys.modules["lib"]
""",
    "a module made by hand": """
import sys, types
sys.modules["lib"] = types.ModuleType("lib")
sys.modules["lib"].__file__ = {lib!r}
""",
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_process_imports_it_and_however_it_ends(scene, way):
    vendor = scene.top / "vendor"
    names = {"vendor": str(vendor), "lib": str(scene.lib), "script": str(vendor / "work.py")}
    said = scene.refused(WAYS[way].format(gets=GETS_LIB.format(**names), **names))
    assert f" from {vendor}" in said
    assert f", which is {Place.CHECKOUT.value}: " in said


@pytest.mark.parametrize("option", ["-I", "-S", "-Es"])
def test_a_worker_that_ignores_its_environment_is_refused(scene, option):
    said = scene.refused(f"import subprocess, sys; subprocess.run([sys.executable, {option!r}, '-c', '3'])")
    assert said == (
        f"nobody can say what {scene.python} {option} -c 3 imported, for it ignores its environment: start "
        "it without -I, -E and -S"
    )


@pytest.mark.parametrize("code", [
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).kill()",
    "subprocess.Popen([sys.executable, '-Xdev', '-W', 'error::ImportWarning', 'ISE.py']).kill()",
    "p = subprocess.Popen([sys.executable, '-c', '3']); p.kill(); p.wait()",
])  # fmt: skip
def test_a_worker_that_is_killed_at_once_is_no_fault(scene, code):
    scene.check(f"import subprocess, sys; {code}")


def test_a_python_that_ends_and_logged_nothing_is_refused(scene):
    fake = scene.outside / "python"
    fake.write_text(f"#!/bin/sh\n{scene.python} -I -c 3\n")
    fake.chmod(0o755)
    said = scene.refused(f"import subprocess; subprocess.run([{str(fake)!r}, '-c', '3'])")
    assert said.startswith(f"nobody can say what {fake} -c 3 imported, for it ended and logged nothing: ")
    isolated = "p = subprocess.Popen([sys.executable, '-I', '-c', '3']); p.kill(); p.wait()"
    assert "start it without -I, -E and -S" in scene.refused(f"import subprocess, sys; {isolated}")


@pytest.mark.parametrize("inside", [False, True])
def test_an_installed_command_is_installed(scene, inside):
    if inside:  # an environment inside the checkout, as many have it
        shutil.copytree(scene.python.parents[1], scene.top / ".venv", symlinks=True)
        scene.python = scene.top / ".venv" / "bin" / "python"
    tool = scene.python.parent / "tool"
    tool.write_text(f"#!{scene.python}\nimport colorsys\n")
    tool.chmod(0o755)
    scene.check(f"import subprocess; subprocess.run([{str(tool)!r}], check=True)")
    scene.check(f"import subprocess, sys; subprocess.run([sys.executable, {str(tool)!r}], check=True)")


@pytest.mark.parametrize("ends", ["", "import os; os._exit(0)"])
def test_a_script_of_the_checkout_is_refused_though_it_imports_nothing(scene, ends):
    script = scene.top / "worker.py"
    for folder in (scene.top, scene.tree):
        (folder / "worker.py").write_text(f"X = sum(range(9))\n{ends}\n")
    said = scene.refused(
        f"import subprocess, sys; subprocess.run([sys.executable, {str(script)!r}], check=True)"
    )
    assert said.startswith("__main__ was imported by ")
    assert f" from {script}, which is {Place.CHECKOUT.value}: " in said
    scene.check("import subprocess, sys; subprocess.run([sys.executable, 'worker.py'], check=True)")


def test_another_distributions_part_of_a_package_is_installed(scene):
    spread = "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n"
    for folder, part in ((scene.tree, "ours"), (scene.site, "other")):
        (folder / "acme").mkdir()
        (folder / "acme" / "__init__.py").write_text(spread)
        (folder / "acme" / f"{part}.py").touch()
    scene.check("import acme.ours, acme.other")
    (scene.tree / "acme" / "other.py").touch()
    said = scene.refused(
        f"import acme; acme.__path__.insert(0, {str(scene.site / 'acme')!r}); import acme.other"
    )
    assert f"from {scene.site / 'acme/other.py'}, which is {Place.OTHER.value}" in said


@pytest.mark.parametrize("env", ["{}", "{'PYTHONPATH': '/nowhere'}", "os.environ.clear()"])
def test_a_worker_with_an_environment_of_its_own_is_seen_too(scene, env):
    command = "[sys.executable, '-c', 'import this, MODULE']"
    code = f"import os, subprocess, sys; subprocess.run({command}, check=True, env={env})"
    scene.check(code.replace("MODULE", "json"))
    path_file(scene)
    said = scene.refused(code.replace("MODULE", "lib"))
    assert said.startswith(f"lib was imported by {scene.python} -c 'import this, lib' from")


@pytest.fixture
def extension() -> Path:
    """An extension module of the standard library, in one file, that nothing here has loaded."""
    files = sorted((Path(os.__file__).parent / "lib-dynload").glob("_[!t]*.so"))
    return next(file for file in files if file.name.split(".")[0] not in sys.modules)


def test_what_was_built_in_the_checkout_only_is_refused(scene, extension):
    built, name = scene.top / "built", extension.name.split(".")[0]
    built.mkdir()
    shutil.copy(extension, built)
    said = scene.refused(f"import sys; sys.path.insert(0, {str(built)!r}); import {name}")
    assert said.startswith(f"{name} (and 1 more) was imported by")
    assert said.endswith("the revision has no such file: commit it, or install it, and not with -e")
    said = scene.refused(f"import ctypes; ctypes.CDLL({str(built / extension.name)!r})")
    assert said.startswith(f"the shared library {extension.name} was imported by")
    assert f" from {built / extension.name}, which is {Place.CHECKOUT.value}: " in said


def test_a_link_out_of_the_tree_is_refused(scene):
    for folder in (scene.top, scene.tree):
        (folder / "linked.py").symlink_to(scene.lib)
    said = scene.refused("import linked")
    assert f" from {scene.tree / 'linked.py'}, which is {Place.CHECKOUT.value}: " in said
    assert said.endswith("the revision has a link that leads there: have the file itself in its place")


def test_of_a_namespace_package_each_part_counts(scene):
    for folder, part in ((scene.tree, "ours"), (scene.top / "built", "theirs"), (scene.site, "installed")):
        (folder / "space").mkdir(parents=True)
        (folder / "space" / f"{part}.py").touch()
    (scene.site / "built.pth").write_text(f"{scene.top / 'built'}\n")
    scene.check("import space.ours, space.installed; assert len(set(space.__path__)) == 3")
    assert f"space.theirs was imported by {scene.python} -c" in scene.refused("import space.theirs")


@pytest.mark.parametrize("root", ["", "src"])
def test_a_package_of_the_tree_is_not_taken_from_an_installed_copy(scene, root):
    shutil.copytree(scene.lib.parent, scene.site / "lib")
    scene.check("import lib")  # of the tree's vendor/lib nobody can know that this is the same
    shutil.copytree(scene.lib.parent, scene.tree / root / "lib")
    said = scene.refused(f"import sys; sys.path.insert(0, {str(scene.site)!r}); import lib")
    assert f"from {scene.site / 'lib/__init__.py'}, which is {Place.OTHER.value}: uninstall it" in said


HONEST = """
import importlib.util, multiprocessing, os, pathlib, runpy, subprocess, sys, tempfile, zipfile
import lib, space.part, usual, linked

def work(_):
    import json.tool
    return os.getpid()

with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "made.py").write_text("X = 1")
    sys.path.insert(0, folder)
    import made
    with zipfile.ZipFile(f"{folder}/archive.zip", "w") as archive:
        archive.writestr("zipped.py", "")
    sys.path.insert(0, f"{folder}/archive.zip")
    import zipped
spec = importlib.util.spec_from_file_location("old", os.environ["XDG_CACHE_HOME"] + "/old.py")
importlib.util.module_from_spec(spec)
subprocess.run([sys.executable, "-c", "import lib"], check=True)
subprocess.run([sys.executable, "--version"], check=True, env={})
subprocess.run(["true"], env={})
with multiprocessing.get_context("fork").Pool(1) as pool:
    pool.map(work, [0])
runpy.run_path("vendor/work.py")
assert sys.modules["sitecustomize"].MINE == 1
import perf.gate.metrics
"""


def test_what_is_honest_passes(scene, monkeypatch):
    """Installed files, links of an installer, generated modules, workers, a sitecustomize, this tool
    itself."""
    inside = scene.top / "venv"  # an environment inside the checkout, as many have it
    shutil.copytree(scene.python.parents[1], inside, symlinks=True)
    scene.python = inside / "bin" / "python"
    (site,) = inside.glob("lib/python*/site-packages")
    (scene.outside / "cache").mkdir()
    (scene.outside / "store").mkdir()
    (scene.outside / "cache" / "old.py").touch()
    (scene.outside / "store" / "linked.py").touch()
    (site / "linked.py").symlink_to(scene.outside / "store" / "linked.py")
    (site / "usual.py").touch()
    shutil.copytree(scene.lib.parent, scene.tree / "src" / "lib")
    (scene.tree / "space").mkdir()
    (scene.tree / "space" / "part.py").touch()
    (scene.tree / "sitecustomize.py").write_text("MINE = 1\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(scene.outside / "cache"))
    (scene.outside / "now").touch()
    scene.since = (scene.outside / "now").stat().st_ctime
    scene.check(HONEST, path=str(ROOT))


def test_what_the_other_revision_generated_is_refused(scene, tmp_path):
    """A shared folder outside of all trees, in which a module is made unless there is one already."""
    other = tmp_path / "other"
    shutil.copytree(scene.tree, other)
    around = Surroundings(scene.top, (scene.top, scene.tree, other), frozenset())
    code = f"""
import pathlib, sys
made = pathlib.Path({str(scene.outside)!r}, "made.py")
made.exists() or made.write_text("RATE = 1")
sys.path.insert(0, str(made.parent))
import made
"""
    for number, tree in enumerate((scene.tree, other, scene.tree)):
        watch = Watch.begin(tmp_path / f"watch-{number}", tree, around)
        subprocess.run([scene.python, "-c", code], env=watch.environment(), check=True)
        if tree is scene.tree:
            watch.check("block")
            continue
        with pytest.raises(
            GateError, match=f"made.py, which is {Place.OTHERS.value}: generate it in"
        ) as error:
            watch.check("block 2")
        assert error.value.code is Exit.NOT_COMPARABLE
        assert "\n" not in str(error.value)


def test_python_paths_into_the_checkout_lead_into_the_tree(tmp_path, monkeypatch):
    (tmp_path / "checkout" / "vendor").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "checkout")
    monkeypatch.chdir(tmp_path / "checkout")
    inside = [str(tmp_path / "checkout"), str(tmp_path / "link" / "vendor"), "vendor/x", ""]
    outside = ["..", str(tmp_path / "checkouts"), "/lib"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*inside, *outside]))
    found = environment(Path("/tree"), tmp_path / "checkout")["PYTHONPATH"].split(os.pathsep)
    assert found == ["/tree", "/tree/src", "/tree", "/tree/vendor", "/tree/vendor/x", *outside]


def test_what_a_tree_compiles_is_kept_but_in_the_checkout_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (top := tmp_path / "checkout").mkdir()
    around = Surroundings(top, (top,), frozenset())
    own = Watch.begin(tmp_path / "1", tmp_path / "tree", around).environment()
    assert "PYTHONDONTWRITEBYTECODE" not in own
    assert Watch.begin(tmp_path / "2", top, around).environment()["PYTHONDONTWRITEBYTECODE"] == "1"


def test_a_block_that_logs_nothing_is_refused(tmp_path):
    watch = Watch.begin(tmp_path / "watch", tmp_path, Surroundings(tmp_path, (tmp_path,), frozenset()))
    with pytest.raises(GateError, match="block 7: no process logged its imports") as error:
        watch.check("block 7")
    assert error.value.code is Exit.NOT_COMPARABLE


def test_a_log_whose_process_was_killed_while_it_wrote_is_read(tmp_path):
    lines = ["('process', ['python'], ['/lib'], ['/site'], ['/usr'])", "('module', 'a', '/a.py')", "('mod"]
    (tmp_path / "7").write_text("\n".join(lines))
    log = Log.read(tmp_path / "7")
    assert (log.command, log.site, log.modules) == (("python",), ("/site",), [("a", "/a.py")])


def test_the_log_has_every_module_of_a_process(scene):
    watch = Watch.begin(scene.outside / "watch", scene.tree, Surroundings(scene.top, (), frozenset()))
    code = "import sys, json.tool; print(*[n for n, m in sys.modules.items() if hasattr(m, '__file__')])"
    command = [scene.python, "-c", code]
    done = subprocess.run(command, env=watch.environment(), stdout=subprocess.PIPE, text=True)
    (path,) = watch.folder.glob("[0-9]*")
    assert {"json.tool", "site"} <= set(done.stdout.split()) <= {name for name, _ in Log.read(path).modules}
    assert Log.read(path).command[1:] == ("-c", code)


def test_the_way_out_that_the_command_tells_is_one(scene, monkeypatch):
    """A whole run of the command, of a revision `slow` that halves the library's speed."""
    (scene.top / "test_thing.py").write_text("import lib\n" + RECORD.format(rate="lib.RATE"))
    (scene.top / ".gitignore").write_text("__pycache__\n")
    commit(scene.top, "good")
    scene.lib.write_text("RATE = 50\n")
    commit(scene.top, "slow")
    (scene.site / "all.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    path_file(scene)
    command = [scene.python, "-m", "perf", "ab", "good", "slow", "--", "test_thing.py"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=scene.top, env=env, capture_output=True, text=True)
    assert done.returncode == Exit.NOT_COMPARABLE, done.stderr
    assert len(git(scene.top, "worktree", "list").splitlines()) == 1
    error = done.stderr[done.stderr.index("error: ") :]
    assert error.startswith(
        f"error: good, process 1: lib was imported from {scene.lib}, which is a checkout's"
    )
    assert error.endswith(": set PYTHONPATH=vendor, which is then looked up in each revision's tree\n")
    monkeypatch.chdir(scene.top)
    monkeypatch.setenv("PYTHONPATH", "vendor")
    scene.check(f"import lib; assert lib.__file__ == {str(scene.tree / 'vendor/lib/__init__.py')!r}")


def test_what_was_installed_from_the_checkout_is_refused(scene, monkeypatch):
    """As `pip install ./vendor/lib` does it: real files, and yet the checkout's and no revision's."""
    commit(scene.top, "good")
    shutil.copytree(scene.lib.parent, scene.site / "lib")
    about = scene.site / "lib-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lib\nVersion: 1\n")
    (about / "RECORD").write_text("lib/__init__.py,,\n")
    (about / "direct_url.json").write_text(json.dumps({"url": scene.lib.parent.as_uri(), "dir_info": {}}))
    monkeypatch.setattr(sys, "path", [str(scene.site)])  # where distributions are looked for
    scene.around = Surroundings.of(scene.top, [scene.tree])
    said = scene.refused("import lib")
    file = scene.site / "lib" / "__init__.py"
    assert f"lib was imported by {scene.python} -c 'import lib' from {file}, which is" in said
    assert f"which is {Place.COPY.value}: uninstall it" in said
    scene.check("import json")
