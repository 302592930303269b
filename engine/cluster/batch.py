"""A file of requests on a Ray cluster, by Ray Data: blocks of its lines go to actors with an engine each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from engine.batch import Batch, Row, Summary, answer_file
from engine.cluster import Cluster, config_of_each, connected
from engine.config import EngineConfig
from engine.openai_api.served_model import ServedModel

ROWS = 256  # of a block: what an actor that dies has to be done again, at most, and computes together


class Worker:
    """An actor: an engine, and the requests of a block at a time."""

    def __init__(self, spec: str, config: EngineConfig, name: str) -> None:
        from engine.engine import Engine

        self._model = ServedModel(Engine.from_pretrained(spec, config, progress=False), name)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answer the rows of a block; their records as JSON."""
        columns = block["number"], block["text"], block["custom_id"]
        rows = (Row(int(number), bytes(text), name) for number, text, name in zip(*columns, strict=True))
        records = [json.dumps(one) for some in Batch(self._model).answer(rows) for one in some]
        return {"record": np.array(records, dtype=object)}


def run(source: Path, target: Path, spec: str, config: EngineConfig, name: str, cluster: Cluster) -> Summary:
    """Answer every line of a file that has no answer yet. Raises InputError as `engine.batch.run` does."""
    spread = partial(answer, spec=spec, config=config, name=name, cluster=cluster)
    return answer_file(source, target, spread, None, progress=True)


def answer(
    rows: Iterator[Row], spec: str, config: EngineConfig, name: str, cluster: Cluster
) -> Iterator[list[dict[str, Any]]]:
    """Give the records of all lines, in any order, as blocks of them are done.

    An actor that dies is started again, and its rows are computed again; none is lost.
    """
    asked = [{"number": row.number, "text": row.text, "custom_id": row.custom_id} for row in rows]
    if not asked:
        return
    with connected():
        ray.data.DataContext.get_current().enable_progress_bars = False
        blocks = max(cluster.replicas, -(-len(asked) // ROWS))
        answered = ray.data.from_items(asked, override_num_blocks=blocks).map_batches(
            Worker,
            fn_constructor_args=(spec, config_of_each(config, cluster), name),
            batch_size=None,
            concurrency=cluster.replicas,
            num_gpus=cluster.gpus or None,
            num_cpus=1.0 if cluster.cpus is None else cluster.cpus,  # Ray Data has work of its own
        )
        for block in answered.iter_batches(batch_size=None):
            yield [json.loads(record) for record in block["record"]]
