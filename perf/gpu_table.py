"""The table of the CUDA path: decode, prefill, TTFT, memory and start-up of random-weights models, in one
process.

`perf/gpu_check.sh` runs it after the GPU tests. Each row is measured by itself, and one that fails says why
and leaves the others alone; rows that would begin after the budget is spent are left out by name. Every shape
runs once before it is timed. With `--device cpu --tiny` it runs anywhere, to show that it does. An engine's
KV memory is most of what is free, so no method may hold one when it asks for the next.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import Engine, EngineConfig, SamplingParams
from engine.models import LoadedModel, kv_bytes_per_token, load
from engine.runner.graphs import OFTEN
from perf.measure.machine_speed import sync
from perf.measure.nvml import Monitor
from perf.measure.session import free

Row = dict[str, Any]  # figures by name, or why there are none


def prompts(loaded: LoadedModel, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random token ids: no two prompts begin the same, so no prefix is shared."""
    rng = np.random.default_rng(seed)
    return rng.integers(3, loaded.model.config.vocab_size, size=(count, length)).tolist()


def exactly(tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=tokens, temperature=0.0, repetition_penalty=1.0, ignore_eos=True)


class Bench:
    """One machine's ceilings, the models in use, and what was measured."""

    def __init__(self, device: str, dtype: str, tiny: bool) -> None:
        self.device, self.dtype, self.tiny = device, dtype, tiny
        self.main = "random:tiny-qwen2" if tiny else "random:qwen2.5-0.5b"
        self._loaded: dict[str, LoadedModel] = {}
        self._engines: dict[tuple, Engine] = {}
        self.copy_bytes_s, self.matmul_flops_s = self._ceilings()

    def _ceilings(self) -> tuple[float, float]:
        """Copy bandwidth (bytes read and written) and matmul rate on random data: the median of ten."""
        size = 2**31 if self.device == "cuda" else 2**24
        side, dtype = (8192, torch.float16) if self.device == "cuda" else (512, torch.float32)
        x, y = (torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        copy = self._median(lambda: y.copy_(x))
        matmul = self._median(lambda: torch.mm(a, b))
        return 2 * size / copy, 2 * side**3 / matmul

    def _median(self, work: Callable[[], object], times: int = 10) -> float:
        seconds = []
        for i in range(times + 3):
            sync(self.device)
            started = time.perf_counter()
            work()
            sync(self.device)
            if i >= 3:
                seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    def loaded(self, spec: str) -> LoadedModel:
        if spec not in self._loaded:
            self._loaded.clear()  # one at a time: 7B in 16 bits takes 13.5 GB
            self.free()
            self._loaded[spec] = load(spec, device=self.device, dtype=self.dtype)
        return self._loaded[spec]

    def engine(self, spec: str, **config: Any) -> Engine:
        key = (spec, *sorted(config.items()))
        loaded = self.loaded(spec)
        if key not in self._engines:
            self.free()
            self._engines[key] = Engine(
                loaded, EngineConfig(device=self.device, prefix_caching=False, **config)
            )
        return self._engines[key]

    def free(self) -> None:
        """Let the engines go, and what torch keeps of them, which counts as taken where others look."""
        self._engines.clear()
        free()

    def decode(self, spec: str, batch: int, context: int = 512, tokens: int = 128) -> Row:
        """Steady decode: from when every request has its second token until the first ends."""
        context, tokens = (16, 12) if self.tiny else (context, tokens)
        server = self.engine(spec, max_batch_size=max(batch, 32))
        loaded, seconds = self.loaded(spec), 0.0
        for seed in range(2):
            requests = [server.add_request(p, exactly(tokens)) for p in prompts(loaded, batch, context, seed)]
            while min(r.output_len for r in requests) < 2:
                server.step()
            sync(self.device)
            started, before = time.perf_counter(), sum(r.output_len for r in requests)
            while all(r.result is None for r in requests):
                server.step()
            seconds = time.perf_counter() - started
            made = sum(r.output_len for r in requests) - before
            while server.has_work:
                server.step()
        model: Any = loaded.model
        weights = sum(p.nbytes for p in model.parameters())
        if not model.config.tie_word_embeddings:  # of the input embedding, only the rows looked up are read
            weights -= model.get_input_embeddings().weight.nbytes
        read = weights + batch * (context + tokens // 2) * kv_bytes_per_token(model)
        steps = made / batch
        return {
            "tok_s": made / seconds,
            "step_ms": 1e3 * seconds / steps,
            "bandwidth_pct": 100 * read * steps / seconds / self.copy_bytes_s,
        }

    def compiled(self, batch: int) -> Row:
        """Steady decode through torch.compile instead of our fused layers."""
        from perf import gpu_compiled  # whatever is wrong with it, the other rows go on

        return gpu_compiled.decode(self, batch)

    def against_sequential(self) -> Row:
        """The demonstration project's shape: 32 requests of 128 tokens in, 256 out; continuous at batch
        16."""
        inside, out, count = (8, 8, 4) if self.tiny else (128, 256, 32)
        loaded = self.loaded(self.main)
        rates = {}
        for policy, batch, number in (("continuous", 16, count), ("sequential", 1, 4)):
            server = self.engine(self.main, policy=policy, max_batch_size=batch, runner="packed")
            for seed in range(2):
                work = prompts(loaded, number, inside, seed)
                started = time.perf_counter()
                server.generate(work, exactly(out), progress=False)
                rates[policy] = number * out / (time.perf_counter() - started)
            del server
        model: Any = loaded.model
        ids = torch.tensor(prompts(loaded, 1, inside), device=self.device)
        options = dict(
            do_sample=False, pad_token_id=0, eos_token_id=None, attention_mask=torch.ones_like(ids)
        )
        for some in (4, out // 4):
            sync(self.device)
            started = time.perf_counter()
            model.generate(ids, max_new_tokens=some, **options)
            sync(self.device)
            rates["generate"] = some / (time.perf_counter() - started)
        return {
            **{f"{name}_tok_s": rate for name, rate in rates.items()},
            "over_sequential": rates["continuous"] / rates["sequential"],
            "over_generate": rates["continuous"] / rates["generate"],
        }

    def ttft(self) -> Row:
        """32 prompts of 128 tokens at once, in a server that has seen steps of such sizes OFTEN enough."""
        count, length = (4, 8) if self.tiny else (32, 128)
        server = self.engine(self.main, max_batch_size=32)
        for seed in range(OFTEN + 2):
            outputs = server.generate(
                prompts(self.loaded(self.main), count, length, seed), exactly(4), progress=False
            )
        times = [output.metrics.ttft_ms or 0.0 for output in outputs]
        return {
            "ttft_p50_ms": float(np.percentile(times, 50)),
            "ttft_p95_ms": float(np.percentile(times, 95)),
        }

    def prefill(self) -> Row:
        """8,192 tokens packed as 8 prompts of 1,024: model FLOPs over the time to their first tokens."""
        count, length = (2, 8) if self.tiny else (8, 1024)
        loaded = self.loaded(self.main)
        server = self.engine(self.main, max_batch_size=32)
        seconds = []
        for seed in range(6):
            started = time.perf_counter()
            server.generate(prompts(loaded, count, length, seed), exactly(1), progress=False)
            seconds.append(time.perf_counter() - started)
        config, model = loaded.model.config, loaded.model
        head = model.get_output_embeddings().weight.numel()
        matrices = model.num_parameters() - head * (1 if config.tie_word_embeddings else 2)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = 2 * config.num_hidden_layers * config.num_attention_heads * head_dim * length**2 * count
        flops = 2 * matrices * count * length + attention + 2 * head * count
        best = statistics.median(seconds[2:])
        return {
            "ms": 1e3 * best,
            "tok_s": count * length / best,
            "mfu_pct": 100 * flops / best / self.matmul_flops_s,
        }

    def largest_batch(self) -> Row:
        """512 requests that reach 1k of context, none preempted."""
        count, inside, out = (8, 8, 8) if self.tiny else (512, 960, 64)
        server = self.engine(self.main, max_batch_size=count)
        started = time.perf_counter()
        server.generate(prompts(self.loaded(self.main), count, inside), exactly(out), progress=False)
        counters = server.metrics.counters
        return {
            "requests": max(counters.batch_sizes), "preemptions": counters.preemptions,
            "tok_s": count * out / (time.perf_counter() - started),
        }  # fmt: skip

    def ready(self) -> Row:
        """From a loaded model to the end of a first batch of 8 requests: proofs, KV memory, compilation,
        captures."""
        loaded = self.loaded(self.main)
        self.free()
        started = time.perf_counter()
        server = self.engine(self.main, max_batch_size=32)
        built = time.perf_counter() - started
        server.generate(prompts(loaded, 8, 16), exactly(8), progress=False)
        return {"engine_s": built, "first_batch_s": time.perf_counter() - started}

    def utilisation(self) -> Row:
        """NVML's share of time in which a kernel ran, sampled by a thread while 32 requests decode."""
        server = self.engine(self.main, max_batch_size=32)
        # From 4,200 to 12,200 positions one graph does: none is captured on the way, and 3 s of decoding find
        # room.
        requests = [server.add_request(p, exactly(8000)) for p in prompts(self.loaded(self.main), 32, 4200)]
        while min(r.output_len for r in requests) < 2:
            server.step()

        def steps(seconds: float) -> None:
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                server.step()

        steps(1.0)  # NVML's figure is of up to a second that is past
        with Monitor(self.device) as monitor:
            steps(2.0)
        steady = all(r.result is None for r in requests)
        for request in requests:
            server.abort(request.id)
        reading = monitor.reading
        if reading.util_pct is None or not steady:
            raise RuntimeError(reading.reason or "no reading, or requests ended before it")
        return {"utilisation_pct": reading.util_pct, "energy_j": reading.energy_j or "not told"}

    def gaps(self, trace: Path) -> Row:
        """Share of 40 decode steps of 32 requests in which no kernel runs, from a trace, which is saved."""
        server = self.engine(self.main, max_batch_size=32)
        requests = [server.add_request(p, exactly(100)) for p in prompts(self.loaded(self.main), 32, 512)]
        for _ in range(20):
            server.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(40):
                server.step()
            sync(self.device)
        for request in requests:
            server.abort(request.id)
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
        kinds = ("kernel", "gpu_memcpy", "gpu_memset")
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in kinds)
        busy, end = 0.0, spans[0][0]
        longest = 0.0
        for begin, until in spans:
            longest = max(longest, begin - end)
            busy += max(0.0, until - max(begin, end))
            end = max(end, until)
        span = end - spans[0][0]
        return {
            "idle_pct": 100 * (1 - busy / span),
            "longest_gap_us": longest,
            "kernels_a_step": len(spans) / 40,
        }

    def against_transformers(self) -> Row:
        """`mixed-256` through Transformers' continuous batching and through ours."""
        from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig

        from engine.workload import make

        loaded = self.loaded(self.main)
        items = make(
            "mixed-256" if not self.tiny else "mixed-8", vocab_size=loaded.model.config.vocab_size
        ).items
        server = self.engine(self.main, max_batch_size=256)
        for _ in range(2):
            started = time.perf_counter()
            outputs = server.replay(items, progress=False)
            seconds = time.perf_counter() - started
        made = sum(len(output.token_ids) for output in outputs)
        ours = {
            "tok_s": made / seconds,
            "ttft_p95_ms": float(np.percentile([o.metrics.ttft_ms or 0.0 for o in outputs], 95)),
        }
        del server
        self.free()
        greedy = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1)
        # Of all the free memory its cache would take so much that its own warm-up fails.
        limits = ContinuousBatchingConfig(
            max_requests_per_batch=256, use_cuda_graph=self.device == "cuda", max_memory_percent=0.4
        )
        theirs: Row = {}
        model: Any = loaded.model
        with (
            torch.no_grad(),
            model.continuous_batching_context_manager(greedy, continuous_batching_config=limits) as manager,
        ):
            for _ in range(2):
                started = time.perf_counter()
                for item in items:
                    limit = item.params.max_new_tokens
                    manager.add_request(list(item.prompt), max_new_tokens=limit, record_timestamps=True)
                finished = []
                for result in manager:
                    finished += [result] if result.is_finished() else []
                    if len(finished) == len(items):
                        break
                theirs["transformers_tok_s"] = sum(len(r.generated_tokens) for r in finished) / (
                    time.perf_counter() - started
                )
                waits = [1e3 * (r.timestamps[0] - r.created_time) for r in finished if r.timestamps]
                theirs["transformers_ttft_p95_ms"] = float(np.percentile(waits, 95)) if waits else "not told"
        return {**ours, **theirs, "ratio": ours["tok_s"] / theirs["transformers_tok_s"]}


def rows(bench: Bench, trace: Path) -> dict[str, Callable[[], Row]]:
    """What is measured, the most wanted first."""
    main, cuda = bench.main, bench.device == "cuda"
    table: dict[str, Callable[[], Row]] = {"ready": bench.ready}
    table |= {
        f"decode b={b}": partial(bench.decode, main, b) for b in ((1, 32, 256) if not bench.tiny else (1, 3))
    }
    table |= {"ttft 32x128": bench.ttft, "prefill 8k": bench.prefill}
    if cuda:
        table |= {"utilisation b=32": bench.utilisation, "gaps b=32": lambda: bench.gaps(trace)}
    table |= {"continuous b=16": bench.against_sequential, "512 x 1k": bench.largest_batch}
    table |= {"mixed-256 vs transformers": bench.against_transformers}
    if not bench.tiny:
        table |= {
            f"decode b=16 {s}": partial(bench.decode, f"random:{s}", 16) for s in ("qwen2-1.5b", "mistral-7b")
        }
    if cuda:  # most of it is compilation
        table |= {f"torch.compile b={b}": partial(bench.compiled, b) for b in (32, 1)}
    return table


def measured(bench: Bench, measure: Callable[[], Row]) -> Row:
    """A row, or why it failed; and nothing is left of it on the GPU then."""
    try:
        return measure()
    except Exception as error:
        traceback.print_exc()
        row = {"failed": repr(error)[:300]}
    bench.free()  # not above: the error holds all that the row did
    return row


def show(name: str, row: Row) -> None:
    shown = ", ".join(f"{k} {v if isinstance(v, str) else format(v, '.5g')}" for k, v in row.items())
    print(f"{name:28s} {shown}", flush=True)  # at once, or a run that is cut off shows nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short runs: shows that it runs")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which no row begins")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--trace", type=Path, default=Path("gpu_trace.json"))
    options = parser.parse_args()
    started = time.perf_counter()
    bench = Bench(options.device, options.dtype, options.tiny)
    copy, matmul = bench.copy_bytes_s / 1e12, bench.matmul_flops_s / 1e12
    print(
        f"{options.dtype}; measured ceilings: copy {copy:.2f} TB/s, matmul {matmul:.0f} TFLOP/s", flush=True
    )
    found: dict[str, Row] = {}
    for name, measure in rows(bench, options.trace).items():
        if time.perf_counter() - started > options.budget:
            found[name] = {"left_out": f"the budget of {options.budget:.0f} s was spent"}
        else:
            found[name] = measured(bench, measure)
        show(name, found[name])
        if options.json is not None:  # after each row, or a run that is cut off leaves nothing
            device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
            made_on = {
                "device": device,
                "dtype": options.dtype,
                "torch": torch.__version__,
                "weights": "random",
            }
            ceilings = {"copy_bytes_s": bench.copy_bytes_s, "matmul_flops_s": bench.matmul_flops_s}
            options.json.write_text(json.dumps({**made_on, **ceilings, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
