"""The inner loop of attention's products, as LLVM instructions: a tile whose weights lie in pages.

    scores: queries by keys,                       mixed: a softmax's weights by values,
    an inner step for each dimension               an inner step for each position, page after page

             PART        PART                               PART        PART
          +-----------+-----------+                      +-----------+-----------+
     d =  | positions | of the    |                p =   | values'   | values'   |
     0    | of a page | page      |                0     | dims 0 .. | dims 16 ..|  of a page
     1    |           | after it  |                1     |           |           |
     ..   |           |           |                ..    + - - - - - + - - - - - +
          +-----------+-----------+                0     |           |           |  of the page after it
                                                   ..    +-----------+-----------+

A tile is one or more parts wide, and each lies at an address of its own. Sums stay in registers from page to
page. Otherwise it is a tile as `engine.backends.cpu.tile` writes it.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from engine.backends.cpu.simd import CACHE_LINE, I64, ITEM, Loop
from engine.backends.cpu.tile import K_UNROLL, Tile, TileArguments, TileWriter

PART = CACHE_LINE // ITEM  # numbers of a part
ADDRESS = 8  # bytes
PREFIX = "paged_"  # of names of functions


class PagedArguments(NamedTuple):
    """Arguments of a paged tile's function, all int64: addresses, bytes from one row to the next, and sizes.

    x is float32, or bfloat16 where the weights are a PAIR.
    """

    x: ir.Value
    x_row: ir.Value
    x_page: ir.Value  # bytes from what a page is multiplied by to what the next one is
    pages: ir.Value  # addresses of weights, an int64 for each part of each page
    offset: ir.Value  # bytes from these addresses on
    count: ir.Value  # pages
    w_row: ir.Value
    size: ir.Value  # inner steps of a page, an even number of them, of pairs where they lie in pairs
    out: ir.Value
    out_row: ir.Value
    add: ir.Value  # 0: out is overwritten
    ahead: ir.Value  # addresses of what is to be prefetched, for each part of each page


SIGNATURE = ir.FunctionType(ir.VoidType(), [I64] * len(PagedArguments._fields))


def emit_paged_tile(function: ir.Function, tile: Tile, number: ir.Type) -> None:
    """Write the body of a function of PagedArguments, for weights of a type: float, i16 (bfloat16) or PAIR.

    It computes

        out[r, :] = (out[r, :] if add) + sum over page < count, k < size of x[r, page, k] * w[page, k, :]

    in float32, and prefetches at each address of `ahead` as much as it reads at that of the weights.
    """
    b, args, none = ir.IRBuilder(function.append_basic_block("entry")), PagedArguments(*function.args), I64(0)
    same = {name: getattr(args, name) for name in ("x", "x_row", "w_row", "size", "out", "out_row", "add")}
    t = TileWriter(b, tile, number, TileArguments(**{**dict.fromkeys(TileArguments._fields, none), **same}))
    parts = range(tile.width // PART)
    iterations, starts = b.udiv(args.size, I64(K_UNROLL * t.steps)), t.starts()
    step_bytes, x_bytes = t.bytes_of_steps(args.w_row), t.bytes_of_steps(I64(t.x_item))
    both_bytes, both_x_bytes = (b.mul(one, I64(K_UNROLL)) for one in (step_bytes, x_bytes))
    size_bytes = b.mul(iterations, both_bytes)
    pages = Loop(b)
    page, x, table, ahead = (pages.carry(start) for start in (none, args.x, args.pages, args.ahead))
    sums = {key: pages.carry(start) for key, start in starts.items()}

    def addresses(of: ir.Value) -> list[ir.Value]:
        return [b.add(t.load(b.add(of, I64(ADDRESS * part)), I64, ADDRESS), args.offset) for part in parts]

    weights, following = addresses(table), addresses(ahead)
    loop = Loop(b)
    x_k, offset = loop.carry(x), loop.carry(none)
    carried = {key: loop.carry(total) for key, total in sums.items()}
    after = dict(carried)
    for turn in range(K_UNROLL):
        # Opaque, or there would be a register for the sum of it and each address: more than there are on x86.
        here = t.opaque(b.add(offset, b.mul(step_bytes, I64(turn))))
        x_here = b.add(x_k, b.mul(x_bytes, I64(turn)))
        t.multiply(turn, x_here, [b.add(address, here) for address in weights], after)
        for address in following:
            t.prefetch_lines(b.add(address, here), CACHE_LINE)
    next_offset = b.add(offset, both_bytes)
    steps = [(x_k, b.add(x_k, both_x_bytes)), (offset, next_offset)]
    steps += [(carried[key], after[key]) for key in after]
    loop.end(steps, again=b.icmp_signed("<", next_offset, size_bytes))
    next_page, entries = b.add(page, I64(1)), I64(ADDRESS * len(parts))
    places = [(page, next_page), (x, b.add(x, args.x_page))]
    places += [(table, b.add(table, entries)), (ahead, b.add(ahead, entries))]
    places += [(sums[key], after[key]) for key in after]
    pages.end(places, again=b.icmp_signed("<", next_page, args.count))
    t.scale_add_and_store(after)
    b.ret_void()
