"""From a spec to a model and its tokenizer: `random:NAME`, `smollm2`, a GGUF file, a folder, a hub id."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import DTYPES
from engine.errors import check_text
from engine.machine import auto_dtype, cache_dir
from engine.models.errors import WAYS_OUT, ModelError, in_one_line
from engine.models.gguf_file import from_gguf
from engine.models.gguf_tokenizer import split_as
from engine.models.hub import fetch
from engine.models.presets import PRESETS, SPECS
from engine.models.smollm2 import SMOLLM2_PRE, SMOLLM2_SHA256, sha256, smollm2_folder
from engine.models.stored import read, refuse_adapter, stored_dtype
from engine.models.tokenizers import find_tokenizer
from engine.progress import Progress, on_terminal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


LOG = logging.getLogger(__name__)
AUTO = "auto"


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, in eval mode, without gradients. Build no mask from the pad id: it may be EOS.

    `revision` names the weights: a commit (hub), a sha256 (`smollm2`, GGUF), "random-seed-N" or "local".
    """

    spec: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    revision: str


def load(spec: str, *, device: str = "cpu", dtype: torch.dtype | str = "float32", seed: int = 0,
         progress: bool = False) -> LoadedModel:  # fmt: skip
    """Return the causal LM that `spec` names, on `device`, its weights in `dtype`.

    "auto" is what `engine.machine.auto_dtype` says of the dtype that a folder's or hub id's config states.
    For `random:NAME` equal seed, dtype and kind of device give equal weights; the caller's RNG state stays.
    Stored weights are mapped, not copied, where dtype and device allow; no repository's code is ever run.

    Raises:
        ModelError: if that can't be, in one line with the way out; logging at DEBUG has the traceback.
    """
    spec = check_text("model", os.fspath(spec) if isinstance(spec, os.PathLike) else spec)
    kind, source = _kind(spec)
    import torch

    if (name := str(dtype).removeprefix("torch.")) not in (AUTO, *DTYPES):
        raise ModelError(f"dtype={dtype!r} is not one of {', '.join((AUTO, *DTYPES))}")
    with _guarded(spec, progress, own_bars=kind == "hub") as tell:
        place = torch.empty(0, device=device).device  # an absent device fails here, not after a download
        tell(f"Loading {spec}")
        if name == AUTO and kind in ("random", "gguf", "smollm2"):
            name = auto_dtype(place.type, None)
        if kind == "random":
            model, tokenizer, revision = _random(source, place, name, seed), None, f"random-seed-{seed}"
        elif kind == "gguf":
            (model, tokenizer), revision = from_gguf(Path(source), name), sha256(Path(source))
        elif kind == "smollm2":
            folder = str(smollm2_folder(tell))
            model, tokenizer, revision = read(folder, name), find_tokenizer(folder), SMOLLM2_SHA256
            split_as(SMOLLM2_PRE, tokenizer)  # a folder that an earlier version converted lacks it
        else:
            where, weights = fetch(source) if kind == "hub" else ({}, {})
            refuse_adapter(source, **where)
            stored = stored_dtype(source, **where) if name == AUTO else None
            name = auto_dtype(place.type, stored) if name == AUTO else name
            tokenizer, model = find_tokenizer(source, **where), read(source, name, weights, **where)
            if stored not in (None, "float32"):
                LOG.warning("%s runs in %s (dtype=auto); its config says %s", spec, name, stored)
            revision = where.get("revision", "local")
        model = model.to(place).eval().requires_grad_(False)  # type: ignore[arg-type]
    return LoadedModel(spec, model, tokenizer, revision)


def _kind(spec: str) -> tuple[str, str]:
    """Return random, smollm2, gguf, folder or hub, and the preset's name, the path or the id."""
    path = Path(os.path.expanduser(spec))  # leaves the home of an unknown user as it is
    if spec in SPECS:
        return spec.partition(":")[0], spec.partition(":")[2]
    if spec and os.path.exists(path):  # a name that is too long for a path is none, and no error
        return "folder" if path.is_dir() else "gguf", str(path)
    if spec.count("/") == 1 and not spec.startswith((".", "/", "~")) and not spec.endswith(".gguf"):
        return "hub", spec
    near = ", ".join(difflib.get_close_matches(spec, SPECS) or SPECS)
    raise ModelError(f"model {spec!r} is no folder, .gguf file, hub id (org/name) or name; near: {near}")


def _random(name: str, place: torch.device, dtype: str, seed: int) -> PreTrainedModel:
    """Return seeded weights, drawn in `dtype` on `place`, never twice in memory: 7B in 16 bits is 13.5 GB."""
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


@contextlib.contextmanager
def _guarded(spec: str, progress: bool, own_bars: bool) -> Iterator[Callable[[str], object]]:
    """Quiet the libraries, say any failure in one line, show progress in our words or by their bars."""
    from huggingface_hub.utils import logging as hub_switches
    from transformers.utils import logging as switches

    with contextlib.ExitStack() as stack:
        for chatter in (switches, hub_switches):
            stack.callback(chatter.set_verbosity, chatter.get_verbosity())
            chatter.set_verbosity_error()
        own_bars = own_bars and progress and on_terminal(sys.stderr)
        if switches.is_progress_bar_enabled() and not own_bars:
            stack.callback(switches.enable_progress_bar)
            switches.disable_progress_bar()
        words = stack.enter_context(Progress("Starting", shown=progress and not own_bars))
        try:
            yield words.begin
        except Exception as error:  # a broken file makes the libraries raise anything, OSError to KeyError
            LOG.debug("model %r did not load", spec, exc_info=True)
            if isinstance(error, ModelError):
                raise error from None  # the line has it all; a library's frames would only bury it
            line = in_one_line(error)
            hint = f"set DYNAMIC_BATCH_CACHE if {cache_dir()} can't hold 1 GB; " if spec == "smollm2" else ""
            raise ModelError(f"model {spec!r} did not load: {line}; {hint}{WAYS_OUT}") from None
