"""Files of the model that a server is to serve, found before anything is started."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine import cache_dir, smollm2_folder, smollm2_gguf
from perf.errors import Exit, GateError


@dataclass(frozen=True)
class Model:
    """A model's files, a folder or a .gguf file, and the id it is served by."""

    name: str
    path: Path


def find_model(peer: str, spec: str, tell: Callable[[str], object], *, gguf: bool = False) -> Model:
    """Return the files that a spec names: a folder, or the .gguf file if the peer reads that.

    `smollm2` is fetched if need be; of a hub id the hub's cache must have the files.

    Raises:
        GateError: if there are none, or in another format, with the way out.
    """
    if spec == "smollm2":
        return Model(spec, (smollm2_gguf if gguf else smollm2_folder)(tell))
    path = Path(spec).expanduser()
    name = spec
    if path.exists():
        path = path.resolve()
        name = re.sub(r"[^\w.-]+|-{2,}|\.{2,}", "-", path.stem if path.suffix == ".gguf" else path.name)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not spec.endswith(".gguf"):
        path = cached_snapshot(spec)
    else:
        raise refused(f"model {spec!r} is no folder, .gguf file, hub id (org/name) or smollm2")
    if gguf:
        return Model(name, the_gguf(peer, path))
    if path.is_file() or not (path / "config.json").is_file():
        raise refused(f"{peer} reads a folder with config.json: {spec} is none")
    return Model(name, path)


def cached_snapshot(spec: str) -> Path:
    """Return the folder of a hub id in the hub's cache. Raises GateError if it isn't there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise refused(
            f"model {spec!r} is no folder, and not in the hub's cache: hf download {spec}"
        ) from None


def the_gguf(peer: str, path: Path) -> Path:
    """Return the file itself, or the only .gguf file of a folder."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise refused(f"{peer} reads .gguf files: {path} is none")
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found)
    what = f"has {len(found)}: name one of {names}" if found else "has none: convert it, or name a .gguf file"
    raise refused(f"{peer} reads one .gguf file; {path} {what}")


def hub_cache_of(model: Model) -> Path:
    """Return a hub's cache that has this model and no other, by its name: links to its files."""
    state = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(model.path.iterdir())
    ]
    key = hashlib.sha256(repr((model.name, str(model.path), state)).encode()).hexdigest()[:12]
    cache = cache_dir() / "peers" / "hub" / key
    if cache.exists():
        return cache
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
        fresh = Path(scratch, "cache")
        repository = fresh / f"models--{model.name.replace('/', '--')}"
        snapshot = repository / "snapshots" / key
        snapshot.mkdir(parents=True)
        for file in model.path.iterdir():
            (snapshot / file.name).symlink_to(file.resolve())
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(key)
        try:
            fresh.rename(cache)
        except OSError:  # another process was faster
            if not cache.exists():
                raise
    return cache


def refused(message: str) -> GateError:
    """Return the error of a command to mend."""
    return GateError(message, Exit.USAGE)
