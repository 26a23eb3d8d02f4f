"""Files from the Hugging Face Hub, by way of its cache.

A download is announced in one line with its size, and shows the client's progress bar on a terminal. Files that were
downloaded once are found without a network.
"""

from __future__ import annotations

import functools
import glob
import os
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from byeori.support import hub_errors
from byeori.support.console import say

WEIGHTS = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
MODEL = (*WEIGHTS, "adapter_config.json", "adapter*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*")


def reachable(name: str) -> bool:
    """Return whether to ask the Hub for `name`; if not, only its cache can have it.

    Clients retry for half a minute if nobody answers; this asks once, and takes seconds.
    """
    if Path(name).exists():
        return True
    return not looks_local(name) and _answers(int(time.monotonic() // 60))


def looks_local(name: str) -> bool:
    """Return whether a name can only be a path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


@functools.lru_cache(maxsize=1)
def _answers(minute: int) -> bool:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # whatever the network can raise; any answer at all is an answer
        return hub_errors.is_untrusted(error)
    return True


def fetch(name: str, patterns: tuple[str, ...], *, revision: str | None = None, kind: str = "model") -> Path:
    """Return the folder in the Hub's cache with the matching files of a repository, up to date if the Hub answers.

    patterns: `*` does not match `/`. kind: model or dataset.

    Raises:
        LocalEntryNotFoundError: if the Hub does not answer and the cache has none of the files.
        Exception: whatever the Hub's client raises.
    """
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    if not reachable(name):
        return cached(name, patterns, revision=revision, kind=kind)
    api = HfApi()
    about: Any = hub_errors.retried(
        lambda: api.repo_info(name, revision=revision, repo_type=kind, files_metadata=True), name
    )
    sizes = {item.rfilename: item.size or 0 for item in about.siblings or []}
    files = [file for file in sizes if any(_matches(file, pattern) for pattern in patterns)]
    if "model.safetensors" in files:  # the parts are the same weights once more
        files = [file for file in files if not _matches(file, "model-*-of-*.safetensors")]
    new = [
        file
        for file in files
        if not isinstance(try_to_load_from_cache(name, file, revision=about.sha, repo_type=kind), str)
    ]
    if new and os.environ.get("RANK", "0") == "0":
        count = f"{len(new)} files" if len(new) > 1 else new[0]
        total = human_size(sum(sizes[file] for file in new))
        say(f"Downloading {name} from the Hugging Face Hub: {count}, {total}")
    exact = [glob.escape(file) for file in files]
    with hub_errors.announced(name):
        folder = hub_errors.retried(
            lambda: snapshot_download(name, revision=revision, repo_type=kind, allow_patterns=exact), name
        )
    return Path(folder)


def cached(name: str, patterns: tuple[str, ...], *, revision: str | None = None, kind: str = "model") -> Path:
    """Return the folder in the Hub's cache that has one of the files that `patterns` names without a `*`.

    Raises:
        LocalEntryNotFoundError: if it has none.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    for file in patterns:
        path = try_to_load_from_cache(name, file, revision=revision, repo_type=kind)
        if isinstance(path, str):
            return Path(path).parents[file.count("/")]
    raise LocalEntryNotFoundError(f"{name} is not in the cache and the Hub does not answer")


def _matches(file: str, pattern: str) -> bool:
    return file.count("/") == pattern.count("/") and (file == pattern or fnmatchcase(file, pattern))


def human_size(size: int) -> str:
    """Return a number of bytes as `812 B`, `4.2 KB` or `1.1 GB`."""
    number = float(size)
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"
