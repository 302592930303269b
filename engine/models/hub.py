"""A hub id's files, fetched before Transformers asks for each one and retries each one.

Only weights are left to it. Of a file that can't be fetched it would say nothing: a model without its own
tokenizer or generation_config would come of a hub that fails in the middle.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from engine.models.errors import WAYS_OUT, ModelError, in_one_line

FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.model.v*", "*.tiktoken", "*.bpe")
TEMPLATES = "additional_chat_templates/"  # all others lie at the top


def fetch(spec: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fetch a hub id's newest commit, but for its weights; return two sets of `from_pretrained` options.

    The first are for all else, which is in the cache then, the second for the weights. The newest commit in
    the cache stands in for a hub that doesn't give the model, and nothing is asked for any more.

    Raises:
        ModelError: if neither has the model, naming which of the two can be mended, and how.
    """
    from huggingface_hub import (
        constants,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        list_repo_files,
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
    except Exception as error:
        fits = next(kind for kind in told if isinstance(error, kind))
        problem = told[fits] if fits is not Exception else f"{told[fits]} ({in_one_line(error)})"
        if fits not in final:
            if isinstance(path := try_to_load_from_cache(spec, file), str):  # in a folder named by its commit
                cached = {"revision": Path(path).parent.name, "local_files_only": True}
                return cached, cached
            problem = f"{problem}; {constants.HF_HUB_CACHE} does not have it"
        raise ModelError(f"model {spec!r} did not load: {problem}; {WAYS_OUT}") from error
    commit = Path(hf_hub_download(spec, file)).parent.name  # kept as the cache's newest
    for name in list_repo_files(spec, revision=commit):
        top = name.removeprefix(TEMPLATES)
        if "/" not in top and any(fnmatch.fnmatch(top, pattern) for pattern in FILES):
            hf_hub_download(spec, name, revision=commit)
    return {"revision": commit, "local_files_only": True}, {"revision": commit}
