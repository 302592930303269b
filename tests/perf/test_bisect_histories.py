"""`perf bisect` where there are merges: branches from before the good end, first parents, any history."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from perf.ab.bisect import Finding
from tests.perf.bisected import Judge, found, made, state

MERGED = {"c0": [], "m1": ["c0"], "s1": ["m1"], "s2": ["s1"], "m2": ["m1"], "s3": ["s2"], "m3": ["m2"]}
MERGED |= {
    "m4": ["m3", "s3"],
    "m5": ["m4"],
    "t1": ["m2"],
    "t2": ["t1", "s2"],
    "m6": ["m5", "t2"],
    "m7": ["m6"],
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    return made(tmp_path_factory.mktemp("merged") / "repo", MERGED)


@pytest.mark.parametrize("culprit", [name for name in MERGED if name != "c0"])
def test_merges_are_followed_or_taken_for_one(merged, culprit):
    before = state(merged)
    judge = Judge(merged, MERGED, culprit)
    _, suspects = found(merged, judge, bad="m7")
    assert suspects == [culprit]
    chain = ["m1", "m2", "m3", "m4", "m5", "m6", "m7"]
    judge = Judge(merged, MERGED, culprit)
    _, suspects = found(merged, judge, bad="m7", first_parent=True)
    assert suspects == [next(name for name in chain if culprit in judge.ancestors(name))]
    assert set(judge.commits) <= set(chain)
    assert state(merged) == before


OLD = {"c0": [], "s1": ["c0"], "s2": ["s1"], "fast": ["c0"], "m1": ["fast"], "m2": ["m1", "s2"], "m3": ["m2"]}


@pytest.mark.parametrize(("culprit", "suspects"), [
    ("m1", ["m1"]), ("m3", ["m3"]), ("m2", ["m2", "s2", "s1"]), ("s2", ["m2", "s2", "s1"])
])  # fmt: skip
def test_a_branch_from_before_the_good_end_is_not_blamed_for_being_as_slow_as_ever(
    tmp_path, culprit, suspects
):
    """`fast` made it fast; s1 and s2 left before that, and what they do is seen once they are merged."""
    folder = made(tmp_path / "repo", OLD)
    judge = Judge(folder, OLD, culprit, unfit=("c0", "s1", "s2"))
    report, left = found(folder, judge, good="fast", bad="m3")
    assert left == suspects
    assert judge.commits.count("c0") <= 1
    if "s1" in suspects:
        why = [j.reason for j in report.judgements if j.finding is Finding.BROKEN]
        assert len(why) == 2
        assert len({"s1", "s2"}.intersection(judge.commits)) == 1  # where both left is known by then
        assert all("which is not as good: bad" in reason for reason in why)


def test_a_branch_from_before_the_good_end_that_was_as_fast_is_searched(tmp_path):
    folder = made(tmp_path / "repo", OLD)
    for culprit, before in (("s1", None), ("s2", "s1")):
        judge = Judge(folder, OLD, culprit)
        report, suspects = found(folder, judge, good="fast", bad="m3")
        assert suspects == [culprit]
        assert judge.commits.count("c0") == 1  # where it left
        assert (report.last_good and judge.names[report.last_good.commit.id]) == before


@st.composite
def histories(draw):
    """Parents of up to 14 commits, a culprit, the good end, commits that cannot be judged."""
    count = draw(st.integers(3, 14))
    parents = {"c0": []}
    for number in range(1, count):
        before = draw(st.integers(max(0, number - 3), number - 1))
        others = draw(st.lists(st.integers(0, number - 1), max_size=1))
        parents[f"c{number}"] = list(dict.fromkeys(f"c{n}" for n in [before, *others]))
    bad = f"c{count - 1}"

    def ancestors(name):
        return {name}.union(*(ancestors(parent) for parent in parents[name]))

    good = draw(st.sampled_from(sorted(ancestors(bad) - {bad})))
    culprit = draw(st.sampled_from(sorted(ancestors(bad) - ancestors(good))))
    speedup = draw(st.sampled_from(sorted(ancestors(good))))
    unfit = [name for name in parents if speedup not in ancestors(name)]
    names = st.sampled_from(sorted(set(parents) - {bad}))
    kinds = draw(st.dictionaries(names, st.sampled_from(["unsure", "incomparable"]), max_size=4))
    return parents, good, bad, culprit, unfit, kinds, draw(st.booleans())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=histories())
def test_in_any_history_the_commit_is_among_those_that_remain(tmp_path_factory, history):
    """And each that remains beside the earliest bad one could not be judged."""
    parents, good, bad, culprit, unfit, kinds, first_parent = history
    folder = made(tmp_path_factory.mktemp("any") / "repo", parents)
    judge = Judge(folder, parents, culprit, kinds, unfit)
    report, suspects = found(folder, judge, good, bad, first_parent=first_parent)
    wanted = culprit
    if first_parent:
        chain = [bad]
        while parents[chain[-1]]:
            chain.append(parents[chain[-1]][0])
        wanted = [name for name in chain if culprit in judge.ancestors(name)][-1]
    assert wanted in suspects
    final = {judge.names[j.commit.id]: j.finding for j in report.judgements}
    assert final[judge.names[report.condemned.commit.id]] is Finding.BAD
    rest = set(suspects) - {judge.names[report.condemned.commit.id]}
    assert {final[name] for name in rest} <= {Finding.BROKEN, Finding.CANT_TELL}
    if not kinds and not unfit:
        assert suspects == [wanted]
    assert max(judge.commits.count(name) for name in judge.commits) <= 2
