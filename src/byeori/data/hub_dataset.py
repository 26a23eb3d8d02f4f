"""Rows from a dataset on the Hugging Face Hub.

`datasets` says which files a configuration's splits have. Where all of them are of a kind that `files` reads, they are
downloaded as they are and read there, so that no value changes on the way; anything else is loaded by `datasets`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byeori.data.files import load_file
from byeori.data.readers import READERS, ending
from byeori.errors import ByeoriError, DataError, HubError
from byeori.support import hub
from byeori.support.text_files import one_line

if TYPE_CHECKING:  # importing them takes a second, which `byeori --help` must not
    from datasets import Dataset, DatasetBuilder

_FILE = re.compile(r"hf://datasets/([^@]+)@([0-9a-f]{40})/(.+)")
_SPLIT = re.compile(r"(?:^|\+)\s*([^\s+\[(]+)")  # the names in "train[:10%] + test"
_UNREACHABLE = re.compile("Connect|Timeout|Network|Proxy|Offline|LocalEntryNotFound")  # names of errors

Files = dict[str, list[tuple[str, str, str]]]
"""Split -> (repository, commit, path) of every file."""


def load_dataset(name: str, config: str | None, split: str, revision: str | None) -> list[tuple[str, Dataset]]:
    """(name for messages, rows) of every file of a split, or of a slice of splits as in `train[:10%]+test`.

    Raises:
        HubError: anything wrong with the repository or the network. DataError: anything wrong with a file in it.
    """
    try:
        with _online(name) as online:
            files = _ask(name, config, revision) if online else _recall(name, config, revision)
            if not files:
                return [(name, _by_datasets(name, config, split, revision))]
            return _read(files, split)
    except ByeoriError:
        raise
    except Exception as error:  # whatever a remote repository or the network can bring about
        raise HubError(f"the dataset {name} {_problem(error, name, config, split, revision)}") from None


@contextmanager
def _online(name: str) -> Iterator[bool]:
    """Whether the Hub answers; where not, datasets is told, which would find it out in half a minute of retries."""
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    online = not offline and hub.reachable(name)
    datasets.config.HF_HUB_OFFLINE = not online
    try:
        yield online
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _by_datasets(name: str, config: str | None, split: str, revision: str | None) -> Dataset:
    import datasets

    return datasets.load_dataset(name, config, split=split, revision=revision)


# --- which files ----------------------------------------------------------------------------------


def _ask(name: str, config: str | None, revision: str | None) -> Files:
    """The files of every split, remembered for a time without a network; none where datasets must read them."""
    import datasets

    builder = datasets.load_dataset_builder(name, config, revision=revision)
    files: Files = {}
    for split, addresses in (builder.config.data_files or {}).items():
        found = [_FILE.fullmatch(address) for address in addresses]
        files[str(split)] = [(match[1], match[2], match[3]) for match in found if match]
        if len(files[str(split)]) < len(addresses):
            return {}
    if not _as_they_are(builder, files):
        return {}
    note = _note(name, config, revision)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(files), encoding="utf-8")
    return files


def _as_they_are(builder: DatasetBuilder, files: Files) -> bool:
    """Whether the files are of known kinds, and the dataset's card asks for nothing special in reading them."""
    endings = {ending(Path(path)) for split in files.values() for _, _, path in split}
    if not endings <= set(READERS):
        return False
    plain: Any = type(builder.config)()
    general = {"name", "version", "data_dir", "data_files", "description"}
    special = {key for key, value in vars(builder.config).items() if key not in general and value != vars(plain)[key]}
    if endings <= {".tsv", ".tsv.gz"} and getattr(builder.config, "sep", None) == "\t":
        special.discard("sep")
    return not special


def _recall(name: str, config: str | None, revision: str | None) -> Files:
    note = _note(name, config, revision)
    return json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}


def _note(name: str, config: str | None, revision: str | None) -> Path:
    import datasets

    key = hashlib.blake2b(json.dumps([name, config, revision]).encode(), digest_size=16).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE) / "byeori" / "hub" / f"{key}.json"


# --- their rows -----------------------------------------------------------------------------------


def _read(files: Files, split: str) -> list[tuple[str, Dataset]]:
    import datasets

    split = "+".join(files) if split == "all" else split
    wanted = dict.fromkeys(_SPLIT.findall(split))
    if unknown := [part for part in wanted if part not in files]:
        raise ValueError(f"Unknown split {unknown[0]!r}. Should be one of {list(files)}.")
    rows = {part: list(_parts(files[part])) for part in wanted}
    lengths = {part: sum(len(table) for _, table in tables) for part, tables in rows.items()}
    found = [
        part
        for piece in datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
        for part in _between(rows[piece.splitname], piece.from_, piece.to)
    ]
    if not found:
        raise DataError(f"the split {split!r} on the Hub has no rows; set dataset_split to another.")
    return found


def _parts(files: list[tuple[str, str, str]]) -> Iterator[tuple[str, Dataset]]:
    """(name, rows) of every file."""
    for repository, commit in dict.fromkeys((repository, commit) for repository, commit, _ in files):
        paths = tuple(path for *origin, path in files if [repository, commit] == origin)
        folder = hub.fetch(repository, paths, revision=commit, kind="dataset")
        for path in paths:
            if not (folder / path).is_file():
                raise HubError(f"{repository}/{path} is not in the cache and the Hugging Face Hub is out of reach")
            try:
                yield f"{repository}/{path}", load_file(folder / path)
            except DataError as error:  # the place in the cache is nothing that a person can mend
                raise DataError(str(error).replace(str(folder / path), f"{repository}/{path} (on the Hub)")) from None


def _between(parts: list[tuple[str, Dataset]], start: int, stop: int) -> Iterator[tuple[str, Dataset]]:
    """Rows start to stop of all parts one after the other; parts without a row of it are left out."""
    for name, rows in parts:
        low, high = max(start, 0), min(stop, len(rows))
        if low < high:
            yield name, rows if high - low == len(rows) else rows.select(range(low, high))
        start, stop = start - len(rows), stop - len(rows)


def _problem(error: Exception, name: str, config: str | None, split: str, revision: str | None) -> str:
    """The end of the sentence "the dataset x ...", from the messages of datasets 4 and 5."""
    problem = one_line(error)
    if listed := re.search(r"(BuilderConfig|Config name|Unknown split).*?(\[.*?\])", problem):
        there = ", ".join(re.findall(r"'(.*?)'", listed[2]))
        if listed[1] == "Unknown split":
            return f"has no split {split!r}; set dataset_split to one of: {there}."
        lacks = f"has no configuration {config!r}" if config else "needs a configuration"
        return f"{lacks}; set dataset_config to one of: {there}."
    if "is a gated dataset" in problem:
        page = f"https://huggingface.co/datasets/{name}"
        return f"is gated; ask for access at {page} and log in with `hf auth login`."
    if "Revision '" in problem:
        return f"has no revision {revision!r}; check dataset_revision."
    if "doesn't exist" in problem:
        return (
            "is no file or folder here and was not found on the Hugging Face Hub; check the spelling, or log "
            "in with `hf auth login` if it is private."
        )
    if _UNREACHABLE.search(type(error).__name__):
        return (
            "is no file or folder here and the Hugging Face Hub cannot be reached; check the path, or the "
            "network, HF_ENDPOINT and HF_HUB_OFFLINE."
        )
    return f"cannot be loaded from the Hugging Face Hub: {problem}"
