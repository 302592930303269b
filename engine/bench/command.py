"""The work of `python -m engine bench`, between its options and its exit code."""

from __future__ import annotations

from dataclasses import replace

from engine.bench.compare import Run, compare, environment
from engine.bench.options import BenchOptions
from engine.bench.report import show
from engine.bench.workload import make_workload
from engine.engine import Engine
from engine.progress import Progress

REDRAW_EVERY_S = 1.0  # seldom: the bar is drawn between the steps that are measured


def run(options: BenchOptions) -> bool:
    """Run what the options ask for, show it and write its files; return whether all of it ran.

    On Ctrl-C, the runs that have finished are shown and written.

    Raises:
        InputError: for a model that can't be loaded, a request it has no room for, and one that failed.
        OSError: for a file that can't be written.
    """
    plain = replace(options.config, policy="sequential")  # fuses no weights, and this engine is just asked
    engine = Engine.from_pretrained(options.model, plain, progress=True)
    workload = make_workload(
        options.workload,
        vocab_size=engine.vocab_size,
        tokenizer=engine.tokenizer,
        seed=options.seed,
        arrivals=options.arrivals,
        max_positions=engine.max_positions,
    )
    runs: list[Run] = []
    with Progress(f"{workload.name} on {options.model}", redraw_s=REDRAW_EVERY_S) as progress:
        asked = options.combinations, options.config, options.rounds
        try:
            for finished in compare(engine.loaded, workload, *asked, progress):
                runs.append(finished)
        except KeyboardInterrupt:
            progress.write("interrupted: showing the runs that finished")
    if runs:
        found = {"workload": workload.name, "arrivals": workload.arrivals, "seed": options.seed}
        show(runs, options, {**found, **environment(engine.loaded), "dtype": engine.config.dtype})
    return len(runs) == len(options.combinations) * options.rounds
