"""The limits that a container sets: control groups, in trees of files as Linux shows them."""

from __future__ import annotations

import logging
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from engine import Engine, EngineConfig, cgroup, machine
from engine.bench.compare import environment
from engine.runner.memory import free_bytes, peak_bytes

CPU = torch.device("cpu")
NONE = 9223372036854771712  # how version 1 writes that there is no limit
MIB = 2**20
Tree = Callable[..., Path]
Files = dict[str, object]

V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
PART = V2.replace(" / ", " /pod ", 1)
V1 = [
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755",
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
]
IN_V1 = ["9:name=systemd:/", "4:memory:/a/b", "1:cpu,cpuacct:/a/b"]
HYBRID = [*V1, "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """`tree(groups, mounts, files)`: lines of /proc/self/cgroup and mountinfo, and files by their paths."""

    def make(groups: list[str], mounts: list[str], files: dict[str, object]) -> Path:
        lists = {"proc/self/cgroup": "\n".join(groups), "proc/self/mountinfo": "\n".join(mounts)}
        for name, text in (lists | files).items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        return tmp_path

    return make


def v2(folder: str, most: object, used: int, stat: str = "anon 5\nfile 3", **more: object) -> Files:
    at = f"sys/fs/cgroup/{folder}".rstrip("/")
    return {f"{at}/memory.max": most, f"{at}/memory.current": used, f"{at}/memory.stat": stat} | {
        f"{at}/{name.replace('_', '.')}": value for name, value in more.items()
    }


def v1(folder: str, most: object, used: int, stat: str = "cache 1") -> Files:
    at = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    sizes = {f"{at}/memory.limit_in_bytes": most, f"{at}/memory.usage_in_bytes": used}
    return {**sizes, f"{at}/memory.stat": stat}


def quota(folder: str, quota_us: int) -> Files:
    """Version 1's, of a tenth of a second."""
    at = f"sys/fs/cgroup/cpu,cpuacct/{folder}"
    return {f"{at}/cpu.cfs_quota_us": quota_us, f"{at}/cpu.cfs_period_us": 100_000}


MEMORY = {
    "v2, one group": (["0::/a"], [V2], v2("a", 100, 30), 70),
    "v2, files not in use": (["0::/a"], [V2], v2("a", 100, 30, "inactive_file 20\nactive_file 9"), 90),
    "v2, more files than use": (["0::/a"], [V2], v2("a", 100, 30, "inactive_file 50"), 100),
    "v2, over the limit": (["0::/a"], [V2], v2("a", 100, 130), 0),
    "v2, in a namespace": (["0::/"], [V2], v2("", 100, 30), 70),
    "v2, throttled first": (["0::/a"], [V2], v2("a", 100, 30, memory_high=80), 50),
    "v2, throttled only": (["0::/a"], [V2], v2("a", "max", 30, memory_high=80), 50),
    "v2, no limit": (["0::/a"], [V2], v2("a", "max", 30, memory_high="max"), None),
    "v2, an ancestor is tighter": (["0::/a/b"], [V2], v2("a", 60, 50) | v2("a/b", 90, 30), 10),
    "v2, two up": (["0::/a/b/c"], [V2], v2("a", 60, 50) | v2("a/b", "max", 9) | v2("a/b/c", 90, 3), 10),
    "v2, its own is tighter": (["0::/a/b"], [V2], v2("a", 600, 50) | v2("a/b", 90, 30), 60),
    "v2, the root has none": (["0::/a"], [V2], v2("a", 100, 30) | {"sys/fs/cgroup/memory.stat": ""}, 70),
    "v2, a part is mounted": (["0::/pod/x"], [PART], v2("x", 90, 30) | v2("", 50, 10), 40),
    "v2, outside of what is mounted": (["0::/../other"], [V2], v2("", 100, 30), 70),
    "v2, a group of another name": (["0::/gone (deleted)"], [V2], v2("", 100, 30), 70),
    "v2, mounted where a space is": (
        ["0::/a"], [V2.replace("/sys/fs/cgroup", "/my\\040groups")], {
            name.replace("sys/fs/cgroup", "my groups"): value for name, value in v2("a", 100, 30).items()
        }, 70,
    ),
    "v1, nested": (IN_V1, V1, v1("a", 80, 60) | v1("a/b", 100, 30), 20),
    "v1, no limit": (IN_V1, V1, v1("", NONE, 900) | v1("a", NONE, 60) | v1("a/b", NONE, 30), NONE - 900),
    "v1, files not in use": (IN_V1, V1, v1("a/b", 100, 30, "inactive_file 1\ntotal_inactive_file 20"), 90),
    "v1, an unseen ancestor": (IN_V1, V1, v1("a/b", NONE, 30, "hierarchical_memory_limit 90"), 60),
    "v1, a container shows its own": (
        ["4:memory:/docker/12ab"], [V1[2].replace(" / ", " /docker/12ab ", 1)], v1("", 100, 30), 70,
    ),
    "v1, a container without that": (["4:memory:/docker/12ab"], V1, v1("", 100, 30), 70),
    "hybrid, in version 1": (["4:memory:/a", "0::/"], HYBRID, v1("a", 100, 30), 70),
    "hybrid, in both": (["4:memory:/a", "0::/b"], HYBRID, v1("a", 100, 30) | v2("unified/b", 50, 10), 40),
    "v2, a deleted group has ancestors": (["0::/a/b (deleted)"], [V2], v2("a", 60, 50), 10),
    "v2, a group that is not shown has": (["0::/a/b"], [V2], v2("a", 60, 50) | v2("", 100, 30), 10),
    "lines of another make": (["junk", "0::/a"], ["junk", "1 2 3", V2], v2("a", 100, 30), 70),
    "usage that cannot be read": (["0::/a"], [V2], {"sys/fs/cgroup/a/memory.max": 100}, 100),
    "nonsense": (["0::/a"], [V2], v2("a", "lots", 30), None),
    "not mounted": (["0::/a"], ["31 23 0:28 / /sys rw - sysfs sysfs rw"], {}, None),
    "no groups": ([], [V2], {}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", MEMORY)
def test_memory_is_what_the_tightest_group_leaves(tree, case):
    groups, mounts, files, left = MEMORY[case]
    assert cgroup.memory_left(tree(groups, mounts, files)) == left


def test_without_control_groups_nothing_is_limited(tmp_path):
    """As on a system that has no /proc."""
    assert cgroup.memory_left(tmp_path) is None
    assert cgroup.processors(tmp_path) is None
    assert machine.processors(tmp_path) == machine.processors()
    assert 0 < free_bytes(CPU, tmp_path) <= psutil.virtual_memory().total


def test_what_cannot_be_read_limits_nothing(tree, monkeypatch):
    root = tree(["0::/a"], [V2], v2("a", 100, 30))

    def refused(file, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "read_text", refused)
    assert cgroup.memory_left(root) is None
    assert cgroup.processors(root) is None


def test_free_on_a_cpu_is_no_more_than_a_container_leaves(tree):
    free = psutil.virtual_memory().available
    assert free_bytes(CPU, tree(["0::/a"], [V2], v2("a", 64 * MIB, 30 * MIB))) == 34 * MIB
    found = free_bytes(CPU, tree(["4:memory:/a"], V1, v1("a", NONE, 30)))
    assert found == pytest.approx(free, rel=0.5), "no limit is not a limit"


def test_keys_and_values_take_their_share_of_a_container(tiny, tree, monkeypatch):
    root = tree(["0::/a"], [V2], v2("a", 64 * MIB, 63 * MIB))
    monkeypatch.setattr("engine.runner.memory.free_bytes", lambda device: free_bytes(device, root))
    engine = Engine(tiny("tiny-llama").loaded, EngineConfig(kv_memory=0.5))
    memory = engine.scheduler.memory
    assert memory.pages * engine.runner.backend.page_bytes <= MIB // 2 * 1.1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system has no such limits")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_free_is_no_more_than_the_process_may_take(limit):
    kind, used = getattr(resource, limit), psutil.Process().memory_info()
    before, most = resource.getrlimit(kind), (used.vms if limit == "RLIMIT_AS" else used.data) + 512 * MIB
    resource.setrlimit(kind, (most, before[1]))
    try:
        found = free_bytes(CPU)
    finally:
        resource.setrlimit(kind, before)
    assert 256 * MIB < found <= 512 * MIB


A = "sys/fs/cgroup/a"
PROCESSORS = {
    "v2": (["0::/a"], [V2], {f"{A}/cpu.max": "150000 100000"}, 1.5),
    "v2, no limit": (["0::/a"], [V2], {f"{A}/cpu.max": "max 100000"}, None),
    "v2, nested": (["0::/a/b"], [V2], {f"{A}/cpu.max": "1 2", f"{A}/b/cpu.max": "4 1"}, 0.5),
    "v1": (IN_V1, V1, quota("a/b", 250_000), 2.5),
    "v1, no limit": (IN_V1, V1, quota("a/b", -1), None),
    "v1, nested": (IN_V1, V1, quota("a/b", 250_000) | quota("a", 50_000), 0.5),
    "nonsense": (["0::/a"], [V2], {f"{A}/cpu.max": "many"}, None),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_processors_are_what_the_tightest_quota_fills(tree, case):
    groups, mounts, files, share = PROCESSORS[case]
    assert cgroup.processors(tree(groups, mounts, files)) == share


@pytest.mark.parametrize(
    ("quota", "bound", "most"), [("150000", 8, 2), ("50000", 8, 1), ("max", 8, 8), ("900000", 3, 3)]
)
def test_a_process_uses_what_it_is_bound_to_and_its_quota_fills(tree, monkeypatch, quota, bound, most):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(bound)), raising=False)
    assert machine.processors(tree(["0::/a"], [V2], {f"{A}/cpu.max": f"{quota} 100000"})) == most


def test_an_engine_uses_no_more_threads_than_there_are_processors_for_it(tiny, monkeypatch, caplog):
    monkeypatch.setattr(machine, "processors", lambda: 2)
    for threads, expected in ((7, 2), (2, 2), (1, 1)):
        torch.set_num_threads(threads)  # the fixture of all tests puts it back
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            engine = Engine(tiny("tiny-llama").loaded)
        assert torch.get_num_threads() == expected
        assert engine.runner.backend._team.size == expected
        assert [("2 processors" in message) for message in caplog.messages] == [True] * (threads > expected)


def test_the_peak_is_that_of_the_process_and_not_of_the_one_that_started_it(tiny, tmp_path, monkeypatch):
    """A process that another started has that one's peak in `ru_maxrss`, as its own memory is not yet."""
    used = SimpleNamespace(ru_maxrss=2**40)
    monkeypatch.setattr(resource, "getrusage", lambda who: used)
    status = tmp_path / "status"
    assert peak_bytes(status) == (2**40 if sys.platform == "darwin" else 2**50)
    status.write_text("VmPeak:\t  99 kB\nVmHWM:\t   12 kB\nVmRSS:\t   7 kB\n")
    assert peak_bytes(status) == 12 * 1024
    if Path("/proc/self/status").is_file():
        assert environment(tiny("tiny-llama").loaded)["peak_rss_bytes"] < 2**42


@pytest.mark.parametrize(
    ("lists", "bound", "nodes"),
    [
        (["0-3,8-11", "4-7,12-15"], {0, 9}, 1),
        (["0-3,8-11", "4-7,12-15"], {3, 12}, 2),
        (["0", ""], {0}, 1),  # a node may have memory alone
        ([], {0, 1}, 1),
    ],
)
def test_processors_on_several_nodes_of_memory_are_warned_of_once(
    lists: list[str], bound: set[int], nodes: int, tree: Tree, monkeypatch: Any, caplog: Any
) -> None:
    files = {f"sys/devices/system/node/node{i}/cpulist": text for i, text in enumerate(lists)}
    root = tree([], [], dict(files))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: bound, raising=False)
    assert machine.memory_nodes(root) == nodes
    monkeypatch.setattr(machine, "memory_nodes", lambda: nodes)
    machine._warn_of.cache_clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(machine, "processors", lambda: 2)
    machine.limit_threads()
    machine.limit_threads()
    assert sum("nodes of memory" in line for line in caplog.messages) == (nodes > 1)
