"""What a storage tells of its machine's noise: groups of sessions, a self-test's findings, no more."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perf import cli
from perf.errors import Exit, GateError
from perf.gate import saved_runs
from perf.gate.noise import NOISE_FILE, Found, Noise, Spread, read_noise, write_noise
from tests.perf import fake_runs

Save = Callable[..., Path]
METRIC = "tokens_per_s"


def entry(rate: float, **extra: Any) -> dict[str, Any]:
    found = fake_runs.entry("32", "batch_size", random.Random(0), batch_size=32, **extra)
    found["extra_info"]["rounds"] = {METRIC: [rate] * 5, "forward_passes": [64] * 5}
    return found


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Save:
    """`save(name, number, rate, commit)` saves a session in the storage of the current directory."""
    monkeypatch.chdir(tmp_path)
    folder = Path(".benchmarks") / "machine"
    folder.mkdir(parents=True)

    def write(name: str, number: int, rate: float, commit: str, dirty: bool = False, **extra: Any) -> Path:
        about = {"id": commit * 40, "dirty": dirty}
        return fake_runs.save(folder, name, [entry(rate, **extra)], number, commit_info=about)

    return write


def of(noise: Noise, path: Path) -> Spread:
    (benchmark,) = saved_runs.read(path).benchmarks.values()
    return noise.of(benchmark, METRIC)


def test_groups_of_one_name_and_commit_tell_and_no_others(save: Save):
    x = [save("a", 1, 100.0, "1"), save("a", 2, 110.0, "1"), save("a", 3, 50.0, "2")]
    save("b", 4, 100.0, "1")
    save("b", 5, 200.0, "3", dirty=True)
    save("b", 6, 300.0, "3", dirty=True)
    assert of(read_noise(), x[0]) == Spread(pytest.approx(math.log(1.1) ** 2 / 2), 1)
    save("b", 7, 121.0, "1")
    assert of(read_noise(), x[0]) == Spread(pytest.approx((math.log(1.1) ** 2 + math.log(1.21) ** 2) / 2), 2)
    judged = saved_runs.load("0001_a")
    assert of(read_noise(without=[judged]), x[0]).df == 1
    assert read_noise().of(judged.benchmarks[next(iter(judged.benchmarks))], "ttft_p50_ms") == Spread()


@pytest.mark.parametrize("other", [{"fingerprint": {"gpu": "another"}}, {"model": "another"}, {"seed": 9}])
def test_another_machine_or_another_thing_tells_nothing(save: Save, other: dict[str, Any]):
    here = save("a", 1, 100.0, "1")
    save("b", 2, 100.0, "1", **other)
    save("b", 3, 110.0, "1", **other)
    assert of(read_noise(), here).df == 0


def test_a_session_that_cannot_be_read_is_named_and_the_rest_counts(save: Save):
    path = save("a", 1, 100.0, "1")
    save("a", 2, 110.0, "1")
    save("a", 3, 0, "1").write_text("{")
    noise = read_noise()
    assert of(noise, path).df == 1
    assert len(noise.notes) == 1
    assert "0003_a.json' cannot be read as JSON" in noise.notes[0]


def test_without_a_storage_nothing_is_known(tmp_path: Path):
    noise = read_noise(tmp_path / "nowhere")
    assert (noise.groups, noise.found, noise.notes) == ({}, {}, ())


def found(path: Path, variance: float = 1e-4, df: float = 7.0, metric: str = METRIC) -> Found:
    (benchmark,) = saved_runs.read(path).benchmarks.values()
    return Found(benchmark.fullname, benchmark.fingerprint, metric, variance, df)


def test_what_a_self_test_found_is_kept_beside_the_runs_and_replaced(save: Save):
    path = save("a", 1, 100.0, "1")
    assert write_noise(".benchmarks", [found(path)]) == Path(".benchmarks") / NOISE_FILE
    assert of(read_noise(), path) == Spread(pytest.approx(7e-4), 7.0)
    write_noise(".benchmarks", [found(path, 4e-4, 3.0), found(path, metric="ttft_p50_ms")])
    assert of(read_noise(), path) == Spread(pytest.approx(12e-4), 3.0)
    save("a", 2, 110.0, "1")
    assert of(read_noise(), path).df == 4.0
    assert [file.name for file in Path(".benchmarks").iterdir() if file.is_file()] == [NOISE_FILE]
    assert saved_runs.load("0001_a").path == path  # it is no run


def test_a_storage_is_made_for_it(tmp_path: Path, save: Save):
    path = save("a", 1, 100.0, "1")
    write_noise(f"file://{tmp_path}/new/storage", [found(path)])
    assert of(read_noise(tmp_path / "new" / "storage"), path).df == 7.0


GOOD = {"benchmark": "t", "fingerprint": {"cpu": "x"}, "metric": METRIC, "variance": 0.1, "df": 2}
BROKEN = [
    "", "{", "[]", "3", "{}", '{"version": 9, "noise": []}', '{"version": 1}', '{"version": 1, "noise": 3}',
    '{"version": 1, "noise": [3]}', "[" * 100_000, "\xff",
]  # fmt: skip
BROKEN += [
    json.dumps({"version": 1, "noise": [GOOD | change]})
    for change in (
        {"variance": -1}, {"variance": "0.1"}, {"variance": math.nan}, {"df": 0}, {"df": None}, {"df": True},
        {"metric": "charm"}, {"metric": [1]}, {"benchmark": 3}, {"fingerprint": 3}, {"more": 1},
        {"fingerprint": {"cpu": 3}},
    )
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_record_that_is_none_is_an_error_that_names_the_way_out(save: Save, text: str, capsys: Any):
    path = save("a", 1, 100.0, "1")
    save("b", 2, 100.0, "2")
    (Path(".benchmarks") / NOISE_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(GateError, match=r"is no record of a machine's noise .*: delete it, and ") as error:
        read_noise()
    assert error.value.code is Exit.NOT_COMPARABLE
    assert "\n" not in str(error.value)
    with pytest.raises(GateError, match="delete it"):
        write_noise(".benchmarks", [found(path)])
    for command, code in (("compare", 3), ("report", 0)):
        with pytest.raises(SystemExit) as end:
            cli.main([command, "a", "b"])
        assert end.value.code == code
        assert "noise.json' is no record" in " ".join("".join(capsys.readouterr()).split())


def test_a_quiet_runners_own_nights_let_one_session_a_side_decide(save: Save, capsys: Any):
    """Four groups of three sessions, 0.4 % apart; then a pull request measured once, on either side."""
    noise, number = random.Random(2), 0
    for commit in "1234":
        for _ in range(3):
            number += 1
            save("night", number, 90.0 * math.exp(noise.gauss(0, 0.004)), commit)
    save("main", 20, 100.0, "a")

    def compare(head: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["compare", "main", head])
        return int(str(end.value.code)), capsys.readouterr().out

    save("slow", 21, 90.0, "b")
    save("same", 22, 100.0, "c")
    code, out = compare("slow")
    assert code == 1
    assert "main (aaaaaaaaa, 1 session) -> slow (bbbbbbbbb, 1 session)" in out
    assert compare("same")[0] == 0
    for path in Path(".benchmarks").rglob("*_night.json"):
        path.unlink()
    code, out = compare("slow")
    assert code == 4
    assert "noise is unknown" in " ".join(out.split())
