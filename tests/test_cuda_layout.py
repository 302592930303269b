"""How a batch is laid out for a GPU, and the block tables that stay there."""

from __future__ import annotations

import numpy as np
import torch

from engine.backends.cuda.batch_layout import bucket, lay_out, upload
from engine.backends.cuda.block_tables import BlockTables
from engine.step import PENDING, Batch, Span
from tests.oracle import Oracle
from tests.serving import drive, packed as build, use_cuda_backend, work_of  # fmt: skip


def test_rows_come_first_and_pending_tokens_are_named_by_where_they_lie():
    spans = [
        Span(0, 3, computed=4, pages=[9, 8], request="chunk"),
        Span(3, 4, computed=7, pages=[1, 2], request="row"),
        Span(4, 9, computed=0, pages=[3, 4], request="prompt"),
        Span(9, 10, computed=2, pages=[5], request="waits for its token"),
    ]
    batch = Batch([40, 41, 42, 50, 60, 61, 62, 63, 64, PENDING], spans, wanted=[2, 3, 8, 9])
    layout = lay_out(batch, np.array([10, 11, 12, 13]), {"waits for its token": 5}, tile=4)
    assert layout.rows == 2
    ids_T, positions_T, lines_T = layout.inputs_3T.tolist()
    assert ids_T == [50, -6, 40, 41, 42, 60, 61, 62, 63, 64]
    assert positions_T == [7, 2, 4, 5, 6, 0, 1, 2, 3, 4]
    assert lines_T == [11, 13, 10, 10, 10, 12, 12, 12, 12, 12]
    assert layout.order_T.tolist() == [3, 9, 0, 1, 2, 4, 5, 6, 7, 8]
    assert layout.keep_K.tolist() == [4, 0, 9, 1], "in the order of the batch"
    assert layout.wanted == [0, 1, 2, 3]
    assert layout.lines_R.tolist() == [10, 12]
    assert layout.spans_3R.tolist() == [[2, 5], [5, 10], [4, 0]]
    assert sorted(layout.tiles_W2.tolist()) == [[0, 2], [1, 5], [1, 9]]
    assert not layout.is_decode
    shape = layout.shape(greedy=True)
    assert (shape.rows, shape.tokens, shape.requests, shape.tiles, shape.kept, shape.bound) == (
        2,
        8,
        2,
        3,
        4,
        8,
    )
    parts = shape.parts(layout.ints(shape))
    for found, expected in zip(parts, (layout.inputs_3T, layout.keep_K, layout.lines_R), strict=False):
        assert np.array_equal(found, expected)


def test_a_batch_of_rows_gives_all_logits_and_is_padded_with_rows_of_nobody():
    spans = [Span(at, at + 1, computed=5 + at, pages=[at], request=at) for at in range(3)]
    layout = lay_out(Batch([7, 8, 9], spans, wanted=[0, 2]), np.array([4, 5, 6]), {}, tile=4)
    assert layout.is_decode
    assert (layout.keep_K.tolist(), layout.wanted) == ([0, 1, 2], [0, 2])
    shape = layout.shape(greedy=True).padded(most=64)
    assert (shape.rows, shape.kept, shape.bound) == (4, 4, 64)
    assert shape.parts(layout.ints(shape))[0].tolist() == [[7, 8, 9, 0], [5, 6, 7, -1], [4, 5, 6, 0]]


def test_buckets_waste_little():
    for rows in range(1, 600):
        assert rows <= bucket(rows) <= max(rows + 15, 2 * rows - 1)
        assert rows < 80 or bucket(rows) < 1.1 * rows
    assert len({bucket(rows) for rows in range(1, 513)}) == 45
    assert np.all(np.diff([bucket(rows) for rows in range(1, 600)]) >= 0)


def test_requests_keep_their_line_of_the_block_tables_and_the_oldest_gives_its_own_up():
    tables = BlockTables(3, 4, torch.device("cpu"))
    pages = {name: [10 * i + 1, 10 * i + 2] for i, name in enumerate("abcd")}
    spans = {name: Span(0, 1, 0, table, name) for name, table in pages.items()}
    first = tables.update([spans["a"], spans["b"], spans["c"]]).tolist()
    assert sorted(first) == [0, 1, 2]
    pages["b"].append(99)
    assert tables.update([spans["c"], spans["b"]]).tolist() == [first[2], first[1]]
    assert tables.tables_RN[first[1]].tolist() == [11, 12, 99, 0]
    assert tables.update([spans["d"]]).tolist() == [first[0]], "that of the request which was away longest"
    assert tables.tables_RN[first[0], :2].tolist() == pages["d"]
    again = Span(0, 1, 0, [7, 8], "b")  # preempted, and admitted again
    assert tables.update([again]).tolist() == [first[1]]
    assert tables.tables_RN[first[1], :2].tolist() == [7, 8]


def test_pages_that_could_not_be_written_to_the_tables_are_written_the_next_time(tiny, monkeypatch):
    use_cuda_backend(monkeypatch)
    oracle: Oracle = tiny("tiny-llama")
    work, calls = work_of(4), []

    def failing(ints_I, device):
        calls.append(len(calls))
        if calls == [0]:
            raise torch.OutOfMemoryError("planted")
        return upload(ints_I, device)

    server = build(oracle, page_size=4, max_batch_size=2)
    monkeypatch.setattr("engine.backends.cuda.block_tables.upload", failing)
    for output, (_, limit) in zip(drive(server, work), work, strict=True):
        oracle.check(output, limit)
    assert len(calls) > 1
