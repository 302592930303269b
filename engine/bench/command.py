"""What `python -m engine bench` does between its options and its exit code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.bench import report, table
from engine.bench.compare import Run, compare, environment
from engine.bench.options import BenchOptions
from engine.bench.workload import make_workload
from engine.engine import Engine
from engine.output import Output
from engine.progress import Progress

REDRAW_EVERY_S = 1.0  # seldom: the bar is drawn between the steps that are measured


def run(options: BenchOptions) -> bool:
    """Run what the options ask for, show it and write its files; return whether all of it ran.

    On Ctrl-C, the runs that have finished are shown and written.

    Raises:
        InputError: for a model that can't be loaded, a request it has no room for, and one that failed.
        OSError: for a file that can't be written.
    """
    # The policy that joins no weights: this engine is just asked.
    engine = Engine.from_pretrained(
        options.model, replace(options.config, policy="sequential"), progress=True
    )
    workload = make_workload(
        options.workload,
        vocab_size=engine.vocab_size,
        tokenizer=engine.tokenizer,
        seed=options.seed,
        arrivals=options.arrivals,
        max_positions=engine.max_positions,
    )
    runs: list[Run] = []
    with Progress(f"{options.workload} on {options.model}", redraw_s=REDRAW_EVERY_S) as progress:
        asked = options.combinations, options.config, options.rounds
        try:
            for finished in compare(engine.loaded, workload, *asked, progress):
                runs.append(finished)
        except KeyboardInterrupt:
            progress.write("interrupted: showing the runs that finished")
    if runs:
        found = {"workload": options.workload, "arrivals": options.arrivals, "seed": options.seed}
        show(runs, options, {**found, **environment(engine.loaded), "dtype": engine.config.dtype})
    return len(runs) == len(options.combinations) * options.rounds


def show(runs: list[Run], options: BenchOptions, environment: dict[str, Any]) -> None:
    """Show runs as a table and write the files that the options name."""
    on = f"{options.model} ({environment['dtype']}, {environment['device']})"
    title = f"{options.workload}, arrivals {options.arrivals}, on {on}"
    summary, out = report.summarise(runs), Output()
    below = [table.caption(summary), *table.notes(summary, environment)]
    out.show(table.columns(summary), title, below, "--wide shows every column", options.wide)
    if options.csv:
        report.requests_frame(runs).to_csv(options.csv, index=False)
    if options.json:
        report.write_json(options.json, runs, environment)
    if options.plot:
        report.write_plot(options.plot, summary, title)
    out.close()
