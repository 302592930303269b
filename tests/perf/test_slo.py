"""Limits of a request, and the steady part of a load that is judged by them."""

from __future__ import annotations

import math

import pytest

from engine import EngineMetrics, InputError, RequestMetrics
from perf.measure.slo import Slo
from perf.measure.steady import Steady


def request(
    due: float, ttft: float, gap: float = 0.01, tokens: int = 3, reason: str = "length"
) -> RequestMetrics:
    times = [due + ttft + gap * i for i in range(tokens)]
    return RequestMetrics.from_times(
        "r", prompt_tokens=1, arrival_s=due, scheduled_s=due, token_times_s=times,
        finished_s=times[-1] if times else due, finish_reason=reason,
    )  # fmt: skip


def metrics(*requests: RequestMetrics) -> EngineMetrics:
    found = EngineMetrics()
    for one in requests:
        found.add(one)
    return found


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("ttft=200,tpot=50", Slo(200, 50)),
        (" tpot=0.5 , ttft=1e3", Slo(1000, 0.5)),
        ("ttft=200", Slo(200, math.inf)),
        ("tpot=5", Slo(math.inf, 5)),
    ],
)
def test_limits_in_any_order(text: str, limits: Slo) -> None:
    assert Slo.parse(text) == limits


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=", "ttft=0", "ttft=-1", "ttft=nan", "ttft=inf", "itl=5", "ttft=1,ttft=2"]
)
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(InputError, match=r"slo=.*: give milliseconds above 0: ttft=200,tpot=50"):
        Slo.parse(text)


def test_a_request_meets_both_limits_or_does_not() -> None:
    slo = Slo(200, 50)
    assert slo.met(request(0, 0.199, 0.049))
    assert not slo.met(request(0, 0.201, 0.049))
    assert not slo.met(request(0, 0.199, 0.051))
    assert slo.met(request(0, 0.199, 9, tokens=1))  # one token has no TPOT
    assert not slo.met(request(0, 0.1, reason="error"))
    assert not slo.met(request(0, 0.1, tokens=0))


def test_what_a_record_says() -> None:
    found = Slo(200, math.inf).of(
        metrics(request(0, 0.1), request(0, 0.3), request(1, 0.1), request(1, 0.98))
    )
    assert found == {"slo_ttft_ms": 200, "slo_met_pct": 50.0, "goodput": pytest.approx(2 / 2.0)}


def test_the_steady_part_leaves_out_what_came_first_and_what_ended_last() -> None:
    due = [float(i) for i in range(11)]  # in ten seconds; the window is 2 to 10
    late = [request(at, 1.5 if at < 2 else 0.1) for at in due]
    steady = Steady.of(metrics(*late))
    assert len(steady.requests) == 9
    assert steady.seconds == 8
    found = steady.flat(Slo(200, 50))
    assert found["slo_met_pct"] == 100.0
    assert found["goodput"] == pytest.approx(9 / 8)
    assert steady.ended == 9  # one of those before it; the last ends after it
    assert found["steady_ended_rate"] == pytest.approx(9 / 8)
    assert found["steady_ttft_p95_ms"] == pytest.approx(100)
