"""Frames, statistics and flat names of metrics: numpy's numbers, and plain Python where JSON is written."""

from __future__ import annotations

import ast
import dataclasses
import io
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from engine.metrics import LATENCIES, EngineMetrics, RequestMetrics
from tests.test_metrics import BEGUN, FULL, SINGLE, UNSEEN, engine_metrics, record, step_result


def test_frame_has_a_row_a_request_in_order_and_a_column_a_field():
    frame = engine_metrics(*(record(**timeline) for timeline in (UNSEEN, FULL, SINGLE))).frame()
    assert list(frame.columns) == [field.name for field in dataclasses.fields(RequestMetrics)]
    assert frame["latency_ms"].tolist() == [2000.0, 2000.0, 1000.0]
    assert frame["ttft_ms"].isna().tolist() == [True, False, False]


def test_frame_of_nothing_has_its_columns():
    frame = EngineMetrics().frame()
    assert len(frame) == 0
    assert list(frame.columns) == [field.name for field in dataclasses.fields(RequestMetrics)]


def test_frame_is_a_copy():
    metrics = engine_metrics(record(**FULL))
    frame = metrics.frame()
    frame.loc[0, "ttft_ms"] = -1.0
    assert metrics.records[0].ttft_ms == 750.0


@pytest.mark.parametrize("timelines", [(), (UNSEEN,), (FULL, UNSEEN, SINGLE)], ids=["empty", "none", "some"])
def test_frame_survives_csv(timelines):
    frame = engine_metrics(*(record(**timeline) for timeline in timelines)).frame()
    back = pd.read_csv(io.StringIO(frame.to_csv(index=False)), converters={"itl_ms": ast.literal_eval})
    pd.testing.assert_frame_equal(back.astype(frame.dtypes.to_dict()), frame)


@pytest.mark.parametrize("name", LATENCIES[:-1])
def test_latency_columns_are_floats(name):
    assert engine_metrics(record(**UNSEEN)).frame()[name].dtype == np.float64


seconds = st.floats(0.0, 10.0)


@st.composite
def timelines(draw):
    arrival, scheduled, *rest = np.cumsum(draw(st.lists(seconds, min_size=3, max_size=8))).tolist()
    return {"arrival": arrival, "scheduled": scheduled, "times": tuple(rest[:-1]), "finished": rest[-1]}


@given(st.lists(timelines(), min_size=1, max_size=8))
def test_statistics_are_those_of_numpy(many):
    metrics = engine_metrics(*(record(**timeline) for timeline in many))
    summary, columns = metrics.summary(), {}
    for name in LATENCIES[:-1]:
        columns[name] = [value for made in metrics.records if (value := getattr(made, name)) is not None]
    columns["itl_ms"] = [gap for made in metrics.records for gap in made.itl_ms]
    for name, values in columns.items():
        assert summary[name]["count"] == len(values)
        if values:
            mean, low, high = (summary[name][row] for row in ("mean", "min", "max"))
            assert (mean, low, high) == pytest.approx((np.mean(values), min(values), max(values)))
            wanted = np.percentile(values, [50, 95, 99])
            assert [summary[name][row] for row in ("50%", "95%", "99%")] == pytest.approx(wanted.tolist())
        if len(values) > 1:
            assert summary[name]["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-9)


@given(st.lists(timelines(), max_size=8))
def test_a_summary_is_what_pandas_describes(many):
    metrics = engine_metrics(*(record(**timeline) for timeline in many), record(**UNSEEN))
    frame = metrics.frame()
    columns = {name: frame[name].explode().astype(float).dropna() for name in LATENCIES}
    wanted = {name: c.describe(percentiles=[0.5, 0.95, 0.99]) for name, c in columns.items()}
    pd.testing.assert_frame_equal(metrics.summary(), pd.DataFrame(wanted), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("many", [(), (UNSEEN,), (FULL, SINGLE, UNSEEN)], ids=["empty", "none", "some"])
def test_flat_numbers_and_goodput_need_no_frame(monkeypatch, many):
    """They are taken between rounds that are not much longer than a frame takes to build."""

    def refuse(*args, **how):
        raise AssertionError("a frame was built")

    metrics = engine_metrics(*(record(**timeline) for timeline in many))
    wanted = metrics.summary()
    monkeypatch.setattr(pd, "DataFrame", refuse)
    flat, good = metrics.flat(), metrics.goodput(2000, 2000)
    assert good == (2 / 3.0 if len(many) == 3 else 0.0)
    for name in LATENCIES:
        rows = {"mean": "mean", "p50": "50%", "p95": "95%", "p99": "99%"}
        for label, row in rows.items():
            value = flat[f"{name.removesuffix('_ms')}_{label}_ms"]
            assert np.isnan(wanted[name][row]) if value is None else value == wanted[name][row]


def test_percentiles_interpolate():
    metrics = engine_metrics(
        *(record(arrival=0.0, scheduled=0.0, times=(t,), finished=t) for t in (1.0, 2.0, 3.0))
    )
    assert [metrics.summary()["ttft_ms"][row] for row in ("50%", "95%", "99%")] == pytest.approx(
        [2000, 2900, 2980]
    )


def test_summary_has_every_latency_and_statistic_even_of_nothing():
    summary = EngineMetrics().summary()
    assert list(summary.columns) == LATENCIES
    assert {"count", "mean", "std", "min", "50%", "95%", "99%", "max"} <= set(summary.index)
    assert (summary.loc["count"] == 0).all()
    assert summary.loc["mean"].isna().all()


@pytest.mark.parametrize(
    "made",
    [(), (UNSEEN,), (BEGUN,), (SINGLE,), (FULL,), (FULL, UNSEEN, SINGLE)],
    ids=["empty", "unseen", "begun", "single", "full", "all"],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_flat_is_plain_python(made, steps):
    metrics = engine_metrics(*(record(**timeline) for timeline in made))
    for _ in range(steps):
        metrics.count_step(1, step_result(), 1.0)
    flat = metrics.flat()
    assert {type(key) for key in flat} == {str}
    assert {type(value) for value in flat.values()} <= {int, float, type(None)}
    assert json.loads(json.dumps(flat, allow_nan=False)) == flat


def test_flat_has_the_same_names_whatever_happened():
    assert list(EngineMetrics().flat()) == list(engine_metrics(record(**FULL), record(**UNSEEN)).flat())


def test_flat_of_a_known_run():
    metrics = engine_metrics(record(**FULL), record(**SINGLE), record(**UNSEEN))
    metrics.count_step(2, step_result((1, 2), computed=6, padded=2, model_s=0.5, kv_bytes=9), 1.0)
    metrics.count_step(1, step_result((1,), computed=1, padded=1, model_s=0.5, kv_bytes=8), 1.0)
    flat = metrics.flat()
    wanted = {
        "requests": 3, "wall_s": 3.0, "tokens_per_s": 5 / 3, "host_pct": 50.0, "steps": 2,
        "forward_passes": 2, "tokens_computed": 7, "padded_tokens": 3, "padding_ratio": 0.3,
        "output_tokens": 3, "kv_bytes_peak": 9, "batch_size_mean": 1.5, "prompt_tokens_cached": 0,
        "preemptions": 0, "ttft_mean_ms": 875.0, "ttft_p50_ms": 875.0, "ttft_p95_ms": 987.5,
        "ttft_p99_ms": 997.5, "latency_p50_ms": 2000.0, "tpot_p50_ms": 1250 / 3, "itl_mean_ms": 1000 / 3,
        "itl_p50_ms": 250.0,
    }  # fmt: skip
    assert {name: flat[name] for name in wanted} == pytest.approx(wanted)


def test_flat_says_none_where_nothing_was_measured():
    flat = engine_metrics(record(**SINGLE)).flat()
    assert [flat[f"tpot_{label}_ms"] for label in ("mean", "p50", "p95", "p99")] == [None] * 4
    assert [flat[f"itl_{label}_ms"] for label in ("mean", "p50", "p95", "p99")] == [None] * 4
    assert flat["ttft_p99_ms"] == 1000.0
