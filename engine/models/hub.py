"""Ask the hub for a model once, before Transformers asks for each of its files and retries each one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.models.errors import WAYS_OUT, ModelError, in_one_line


def reach(spec: str) -> dict[str, Any]:
    """Return the options of `from_pretrained` for a hub id: its newest commit, or the last one in the cache.

    The cache stands in for a hub that doesn't give the model, and then no file is asked for any more.

    Raises:
        ModelError: if neither has the model, naming which of the two can be mended, and how.
    """
    from huggingface_hub import (
        constants,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    file, hub = "config.json", constants.ENDPOINT
    told = {  # of an error, the first that fits
        HFValidationError: "it is no hub id, which is an org/name of letters, digits, '-', '_' and '.'",
        GatedRepoError: f"ask for access at {hub}/{spec}, then log in (hf auth login)",
        RepositoryNotFoundError: f"it is not on {hub}, or private: mend the name, or log in (hf auth login)",
        EntryNotFoundError: f"it has no {file} on {hub}, so nothing that Transformers can load",
        OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, which forbids to ask the hub",
        Exception: f"{hub} did not give it",
    }
    final: tuple[type[Exception], ...] = (HFValidationError, RepositoryNotFoundError, EntryNotFoundError)
    try:
        found = get_hf_file_metadata(hf_hub_url(spec, file), timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if not found.commit_hash:
            raise ConnectionError("it answers, but not as a hub does: see HF_ENDPOINT")
        return {"revision": Path(hf_hub_download(spec, file)).parent.name}  # kept as the cache's newest
    except Exception as error:
        fits = next(kind for kind in told if isinstance(error, kind))
        problem = told[fits] if fits is not Exception else f"{told[fits]} ({in_one_line(error)})"
        if fits not in final:
            if isinstance(path := try_to_load_from_cache(spec, file), str):  # in a folder named by its commit
                return {"revision": Path(path).parent.name, "local_files_only": True}
            problem = f"{problem}; {constants.HF_HUB_CACHE} does not have it"
        raise ModelError(f"model {spec!r} did not load: {problem}; {WAYS_OUT}") from error
