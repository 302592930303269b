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
    try:
        found = get_hf_file_metadata(hf_hub_url(spec, file), timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if found.commit_hash:
            return {"revision": Path(hf_hub_download(spec, file)).parent.name}  # kept as the cache's newest
        problem = f"{hub} answers, but not as a hub does: see HF_ENDPOINT"
    except HFValidationError as error:
        raise ModelError(f"model {spec!r} is no hub id: {in_one_line(error)}; {WAYS_OUT}") from error
    except EntryNotFoundError as error:
        why = f"has no {file} on {hub}, so no model that Transformers can load"
        raise ModelError(f"model {spec!r} {why}; {WAYS_OUT}") from error
    except GatedRepoError:
        problem = f"ask for access at {hub}/{spec}, then log in (hf auth login)"
    except RepositoryNotFoundError as error:
        why = f"is not on {hub}, or it is private: mend the name, or log in (hf auth login)"
        raise ModelError(f"model {spec!r} {why}; {WAYS_OUT}") from error
    except OfflineModeIsEnabled:
        problem = "HF_HUB_OFFLINE is set, which forbids to ask the hub"
    except Exception as error:  # of whatever lies between here and the hub
        problem = f"{hub} did not give it ({in_one_line(error)})"
    if isinstance(path := try_to_load_from_cache(spec, file), str):  # in a folder named after its commit
        return {"revision": Path(path).parent.name, "local_files_only": True}
    raise ModelError(
        f"model {spec!r} did not load: {problem}; {constants.HF_HUB_CACHE} does not have it; {WAYS_OUT}"
    )
