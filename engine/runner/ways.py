"""The ways to multiply by a weight on a CPU, and which is fastest on this machine for how many rows.

float32 `F.linear` is up to three times slower than the machine can be at the row counts of decoding. What is better
differs between CPUs (oneDNN's packed weights, or the weight on the left), so it is measured once a machine and shape,
on the model's own weights, and kept in the cache folder.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock

from engine.compiled import SYMBOLS
from engine.machine import cache_dir, cpu_name

# (x [T, M], bias [N] or None, what to add [T, N] or None) -> [T, N]
Way = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
ROWS = (1, 4, 16, 32, 64, 128, 512)  # measured; what lies between counts as the next, and what is beyond as the last
MOST = 4e9  # multiply-adds of one product worth measuring: beyond, every way is near the machine's peak
TOY = 2**18  # bytes of a weight whose measurement would take longer than whatever it saves
COLD = 64e6  # bytes of weights to go through, so that they come from memory as they do in a model
ENOUGH = 4e8  # multiply-adds to time at once, where this is reached with fewer weights: then caches matter no more
FEW = 4  # rows that oneDNN multiplies faster than fewer, and that compiled products take at a time
LONG = 0.04  # seconds of rounds for a number of rows, two at least
HOPELESS = 1.5  # a way that takes so many times the fastest's time in the first round is out
# What a way's time counts as: others than these two cost a layer's one call, and gain little by being near them.
FAVOUR = {"packed": 0.75, "panels": 0.75}
ABREAST = 3  # panels read at once: with FEW rows, sums that fit the registers of any CPU
WIDE = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8  # outputs of a panel: a vector


def _plus(out_TN: torch.Tensor, *terms: torch.Tensor | None) -> torch.Tensor:
    """A product with what there is to be added to it, in place."""
    for term in terms:
        if term is not None:
            out_TN.add_(term)
    return out_TN


def plain(weight_NM: torch.Tensor) -> Way:
    """torch's own."""

    def multiply(x_TM: torch.Tensor, bias_N: torch.Tensor | None, add_TN: torch.Tensor | None) -> torch.Tensor:
        out_TN = F.linear(x_TM, weight_NM, bias_N)
        return _plus(out_TN, add_TN)

    return multiply


def left(weight_NM: torch.Tensor) -> Way:
    """The weight on the left: few rows are then few columns, which MKL takes better."""

    def multiply(x_TM: torch.Tensor, bias_N: torch.Tensor | None, add_TN: torch.Tensor | None) -> torch.Tensor:
        rows = len(x_TM)
        if rows == 1:
            x_TM = x_TM.repeat(2, 1)  # a product with two columns is three times as fast as with one
        out_TN = (weight_NM @ x_TM.t()).t()[:rows].contiguous()
        return _plus(out_TN, bias_N, add_TN)

    return multiply


class Packed:
    """oneDNN on a copy of the weight in the order in which its kernels read it."""

    def __init__(self, weight_NM: torch.Tensor) -> None:
        self.copy = torch.ops.mkldnn._reorder_linear_weight(weight_NM, 32)

    def __call__(self, x_TM: torch.Tensor, bias_N: torch.Tensor | None, add_TN: torch.Tensor | None) -> torch.Tensor:
        """[T, M] -> [T, N]."""
        rows = len(x_TM)
        if rows < FEW:
            return self(filled(x_TM), bias_N, None if add_TN is None else filled(add_TN))[:rows]
        if add_TN is None:
            return torch.ops.mkldnn._linear_pointwise(x_TM, self.copy, bias_N, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x_TM, add_TN, self.copy, bias_N, "add")


class Panels:
    """One row by a copy of the weight in panels of W outputs, [C, M, W]: a batch of small products.

    Each reads its panel from end to end, at the pace of the memory where oneDNN reaches two thirds of it. Compiled
    (`multiply_panels`), they suit more rows.
    """

    def __init__(self, weight_NM: torch.Tensor) -> None:
        self.size = len(weight_NM)
        filled_MN = F.pad(weight_NM, (0, 0, 0, -self.size % (ABREAST * WIDE))).t()
        self.copy_CMW = filled_MN.unflatten(1, (-1, WIDE)).transpose(0, 1).contiguous()

    def __call__(self, x_TM: torch.Tensor, bias_N: torch.Tensor | None, add_TN: torch.Tensor | None) -> torch.Tensor:
        """[T, M] -> [T, N]."""
        out_CTW = torch.bmm(x_TM.expand(len(self.copy_CMW), -1, -1), self.copy_CMW)
        out_TN = out_CTW.transpose(0, 1).flatten(1)[:, : self.size].contiguous()
        return _plus(out_TN, bias_N, add_TN)


WAYS: dict[str, Callable[[torch.Tensor], Way]] = {"packed": Packed, "panels": Panels, "plain": plain, "left": left}
COPIES = {"packed", "panels"}  # hold the weight again
LONE = "panels"  # slow for more rows than one, and not measured there

# Inductor takes oneDNN's products only by weights that are constants of its program. Under names of our own, which end
# like the C functions behind them, they are products by any weight.
LIBRARY = torch.library.Library("dynamic_batch", "DEF")
LIBRARY.define("_linear_pointwise(Tensor x, Tensor w, Tensor? b, str attr, float[]? scalars, str? algorithm) -> Tensor")
LIBRARY.define("_linear_pointwise_binary(Tensor x, Tensor other, Tensor w, Tensor? b, str attr) -> Tensor")
PRODUCT = torch.ops.dynamic_batch._linear_pointwise.default
PRODUCT_ADD = torch.ops.dynamic_batch._linear_pointwise_binary.default
SYMBOLS[PRODUCT] = (
    "AOTITorchError aoti_torch_cpu__linear_pointwise(AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle* b, "
    "const char* attr, const double** scalars, int64_t count, const char** algorithm, AtenTensorHandle* out)"
)
SYMBOLS[PRODUCT_ADD] = (
    "AOTITorchError aoti_torch_cpu__linear_pointwise_binary(AtenTensorHandle x, AtenTensorHandle other, "
    "AtenTensorHandle w, AtenTensorHandle* b, const char* attr, AtenTensorHandle* out)"
)


@torch.library.register_fake("dynamic_batch::_linear_pointwise", lib=LIBRARY)
def _product(x_TM: torch.Tensor, weight_NM: torch.Tensor, *options: object) -> torch.Tensor:
    return x_TM.new_empty(x_TM.shape[0], weight_NM.shape[0])


@torch.library.register_fake("dynamic_batch::_linear_pointwise_binary", lib=LIBRARY)
def _product_add(x_TM: torch.Tensor, add_TN: torch.Tensor, *options: object) -> torch.Tensor:
    return torch.empty_like(add_TN)


def multiply_packed(x_TM: torch.Tensor, weight: torch.Tensor, add_TN: torch.Tensor | None = None) -> torch.Tensor:
    """[T, M] by the copy that `Packed` made -> [T, N], in a function to be compiled."""
    if add_TN is None:
        return PRODUCT(x_TM, weight, None, "none", None, None)
    return PRODUCT_ADD(x_TM, add_TN, weight, None, "add")


def multiply_panels(
    x_TM: torch.Tensor, panels_CMW: torch.Tensor, size: int, add_TN: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, M], T a multiple of FEW, by the copy that `Panels` made -> [T, size], in a function to be compiled.

    FEW rows by ABREAST panels are sums of one loop: they stay in registers while it reads the weight once. That is
    the inner loop of every good matrix product (Goto and van de Geijn, 2008), and for few rows all there is to it.
    """
    row_1BM1s = _stored(x_TM).unflatten(0, (-1, FEW))[None, ..., None].unbind(2)
    panel_C1MWs = panels_CMW.unflatten(0, (-1, ABREAST))[:, :, None].unbind(1)
    sums_CSBW = torch.stack([(row * panel).sum(2) for row in row_1BM1s for panel in panel_C1MWs], 1)
    out_BRCPW = sums_CSBW.unflatten(1, (FEW, ABREAST)).permute(3, 1, 0, 2, 4)
    if add_TN is not None:
        add_TN = F.pad(add_TN, (0, panels_CMW.shape[0] * WIDE - size))
        out_BRCPW = out_BRCPW + add_TN.unflatten(0, (-1, FEW)).unflatten(2, out_BRCPW.shape[2:])
    return _stored(out_BRCPW).flatten(2).flatten(0, 1)[:, :size]


def _stored(x: torch.Tensor) -> torch.Tensor:
    """The same, but a compiler stores it as it is rather than compute it anew wherever it is read."""
    x = x.clone(memory_format=torch.contiguous_format)
    return x.as_strided(x.shape, x.stride())


def filled(x_TM: torch.Tensor) -> torch.Tensor:
    """At least FEW rows: those of x, and zeros."""
    return F.pad(x_TM, (0, 0, 0, torch.sym_max(0, FEW - x_TM.shape[0])))


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN can take this weight packed."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def choose(
    weights: Sequence[Callable[[], torch.Tensor]], ways: Mapping[str, Callable[[torch.Tensor], Way]] = WAYS
) -> list[tuple[int, str]]:
    """The fastest ways for weights of one shape [N, M]: (up to so many rows, name of the way), rising.

    Measured the first time on a machine, in a second or so; afterwards read from the cache folder. The weights are
    made when they are needed.
    """
    first = weights[0]()
    if not can_pack(first):
        return [(ROWS[-1], "plain")]
    if first.nbytes < TOY:
        return [(ROWS[-1], "packed")]
    several = weights[: max(1, int(COLD // first.nbytes))]

    def measure() -> list[str]:
        made = [weight() for weight in several]
        every = {name: [make(weight) for weight in made] for name, make in ways.items()}
        return fastest_ways(every, first.numel(), first.shape[1])

    return kept("x".join(map(str, first.shape)), list(ways), measure)


def kept(what: str, names: Sequence[str], measure: Callable[[], list[str]]) -> list[tuple[int, str]]:
    """(up to so many rows, the fastest of the names): what `measure` gives, or gave before on this machine."""
    file = cache_dir() / "linear.json"
    threads, isa = f"{torch.get_num_threads()} threads", os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    key = " | ".join((cpu_name(), threads, torch.__version__, isa, ", ".join(names), what))
    fastest = _read(file).get(key)
    if fastest is None:
        fastest = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            fresh = file.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps({**_read(file), key: fastest}, indent=1))
            fresh.replace(file)
    return list(zip(ROWS, fastest, strict=False))


def fastest_ways(every: Mapping[str, Sequence[Way]], size: int, width: int) -> list[str]:
    """The name of the fastest way for each of ROWS, as far as it is worth measuring: best of a few rounds.

    Args:
        every: of each way by its name, several of the same size, with weights of their own.
        size: multiply-adds of one of them, a row.
        width: of a row.
    """
    names: list[str] = []
    for rows in ROWS:
        if set(names) - {LONE} and rows * size > MOST:
            break
        x = torch.full((rows, width), 0.5)
        best = {name: float("inf") for name in every if rows == 1 or name != LONE}
        rounds, until = 0, time.perf_counter() + LONG
        while rounds < 2 or time.perf_counter() < until:
            rounds, limit = rounds + 1, HOPELESS * min(best.values())
            for name in [name for name, seconds in best.items() if seconds <= limit]:
                started = time.perf_counter()
                for way in every[name][: 1 + int(ENOUGH / rows / size)]:
                    way(x, None, None)
                best[name] = min(best[name], time.perf_counter() - started)
        fastest = min(best, key=lambda name: best[name] * FAVOUR.get(name, 1.0))
        names.append(fastest)
    return names


def _read(file: Path) -> dict[str, list[str]]:
    """What is kept; nothing if there is no file, or not one of ours."""
    try:
        kept = json.loads(file.read_text())
        return kept if isinstance(kept, dict) else {}
    except (OSError, ValueError):
        return {}
