"""`perf sweep`: throughput against latency."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from engine import InputError
from perf import console
from perf.console import Json, Storage
from perf.gate.storage import STORAGE

app = typer.Typer()


@app.command()
def sweep(
    target: Annotated[str | None, Option(metavar="URL", help="A server; without it, an engine here.")] = None,
    served_model: Annotated[str | None, Option(metavar="ID", help="Its model, if not its first.")] = None,
    api: Annotated[str | None, Option(help="How it is asked: chat or completions.")] = None,
    backend: Annotated[str | None, Option(help="Of an engine here; continuous, if none is named.")] = None,
    model: Annotated[str | None, Option(help="What an engine runs, or is served.")] = None,
    asked: Annotated[str, Option("--workload", metavar="NAME|FILE", help="What is asked.")] = "mixed-64",
    rates: Annotated[str, Option(help="Requests a second, comma-separated, or auto.")] = "auto",
    slo: Annotated[str, Option(metavar="ttft=MS,tpot=MS", help="Limits of a request.")] = "ttft=200,tpot=50",
    max_batch_size: Annotated[int, Option(min=1, help="Of an engine; sent at once to a server.")] = 32,
    plot: Annotated[Path | None, Option(help="Draw it here; a .png or .svg.")] = None,
    save: Annotated[str | None, Option(metavar="NAME", help="Save it as a session of this name.")] = None,
    storage: Storage = str(STORAGE),
    json: Json = None,
) -> None:
    """Offer a workload at rising rates, and find the highest at which 99 % of requests meet the limits.

    It stops where the server falls behind. `auto` finds the rates by itself. A saved sweep is compared as any
    run is: its goodput at each rate is gated, and so is the highest rate.
    """
    from importlib.util import find_spec

    from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info as generate_machine_info

    from perf.gate.storage import check_name, folder
    from perf.gate.writing import run_of, save as save_run
    from perf.measure.session import BenchSession
    from perf.measure.slo import Slo
    from perf.measure.sweep import sweep as measure
    from perf.option_types import rates as read_rates
    from perf.report.sweep_table import sweep_table, write_plot
    from perf.report.terminal import show
    from perf.servers.target import Target

    console.writable(plot=plot, json=json)
    if plot and find_spec("matplotlib") is None:
        raise InputError("plot needs matplotlib: pip install 'dynamic-batch[plot]'")
    if target is not None and backend is not None:
        raise InputError("target and backend are two things to measure: give one")
    where = folder(storage)
    if save is not None:
        check_name(save)
    limits = Slo.parse(slo)
    options: dict[str, Any] = {} if target is None else {"target": Target.parse(target, served_model, api)}
    found = None if rates == "auto" else read_rates(rates)
    bench = BenchSession(model=model, dtype=None, rounds=1, quick=False, inject_slowdown=0.0, slo=limits)
    name = "http" if target else backend or "continuous"
    with console.progress(len(found) + 1 if found else 8) as advance:
        curve = measure(
            bench, name, asked, found, slo=limits, max_batch_size=max_batch_size, options=options,
            advance=advance,
        )  # fmt: skip
    show(sweep_table(curve), console.WIDTH)
    if plot:
        write_plot(plot, curve)
    if save:
        path = save_run(run_of(curve.entries(), generate_machine_info()), save, where)
        console.say(f"saved as {save!r} in {path}")
    console.write_json(json, curve.plain())
