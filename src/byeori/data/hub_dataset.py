"""Rows from a dataset on the Hugging Face Hub.

`datasets` lists the files of a configuration's splits. If data/readers can read all of them, they are downloaded as
they are and read there, so that no value changes; anything else is loaded by `datasets`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from byeori.data.files import Part, load_file
from byeori.data.readers import DOCUMENTS, READERS, ending
from byeori.data.readers.text import plain_ending
from byeori.errors import ByeoriError, DataError, HubError
from byeori.support import hub, hub_errors
from byeori.support.atomic_files import new_file
from byeori.support.foreign_files import json_record
from byeori.support.suggestions import nearest
from byeori.support.text_files import one_line

if TYPE_CHECKING:  # importing it takes half a second, which `byeori --help` must not
    from datasets import DatasetBuilder

_FILE = re.compile(r"hf://datasets/([^@]+)@([0-9a-f]{40})/(.+)")
_SPLIT = re.compile(r"(?:^|\+)\s*([^\s+\[(]+)")  # the names in "train[:10%] + test"
_UNREACHABLE = re.compile("Connect|Timeout|Network|Proxy|Offline|LocalEntryNotFound")  # in names of errors

Files = dict[str, list[tuple[str, str, str]]]
"""Split -> (repository, commit, path) of every file."""
_Address = Annotated[list[str], Field(min_length=3, max_length=3)]  # the same in JSON


def load_dataset(name: str, config: str | None, split: str, revision: str | None) -> list[Part]:
    """Return every file of a split, or of a slice of splits as in `train[:10%]+test`.

    Raises:
        HubError: if anything is wrong with the repository or the network.
        DataError: if anything is wrong with a file in it.
    """
    try:
        with _online(name) as online:
            if files := _list_files(name, config, revision, online):
                return _read(files, split)
            import datasets

            rows = datasets.load_dataset(name, config, split=split, revision=revision)
            return [Part(name=name, rows=rows)]
    except ByeoriError:
        raise
    except Exception as error:  # whatever a remote repository or the network can raise
        raise HubError(_sentence(error, name, config, split, revision)) from None


@contextmanager
def _online(name: str) -> Iterator[bool]:
    """Yield whether the Hub answers; if not, `datasets` works offline, instead of half a minute of retries."""
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    online = not offline and hub.reachable(name)
    datasets.config.HF_HUB_OFFLINE = not online
    try:
        yield online
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


# --- which files ----------------------------------------------------------------------------------


def _list_files(name: str, config: str | None, revision: str | None, online: bool) -> Files:
    """Return the files of every split, offline from a list written earlier; none if `datasets` must read them."""
    import datasets

    key = hashlib.blake2b(json.dumps([name, config, revision]).encode(), digest_size=16).hexdigest()
    listing = Path(datasets.config.HF_DATASETS_CACHE) / "byeori" / "hub" / f"{key}.json"
    if not online:
        if not listing.is_file():
            return {}
        known = json_record(listing, dict[str, list[_Address]], DataError, advice="remove it and go online once")
        return {split: [(repo, commit, path) for repo, commit, path in files] for split, files in known.items()}
    builder = datasets.load_dataset_builder(name, config, revision=revision)
    files: Files = {}
    for split, addresses in (builder.config.data_files or {}).items():
        matches = map(_FILE.fullmatch, addresses)
        files[str(split)] = [(match[1], match[2], match[3]) for match in matches if match]
        if len(files[str(split)]) < len(addresses):
            return {}
    if not _are_plain_files(builder, files):
        return {}
    listing.parent.mkdir(parents=True, exist_ok=True)
    with new_file(listing) as temporary:
        temporary.write_text(json.dumps(files), encoding="utf-8")
    return files


def _are_plain_files(builder: DatasetBuilder, files: Files) -> bool:
    """Return whether the files are of known kinds, and the dataset's card asks for no special way to read them."""
    endings = {ending(Path(path)) for split in files.values() for _, _, path in split}
    if not endings <= set(READERS) - set(DOCUMENTS):  # `datasets` reads texts line by line
        return False
    plain: Any = type(builder.config)()
    general = {"name", "version", "data_dir", "data_files", "description"}
    special = {key for key, value in vars(builder.config).items() if key not in general and value != vars(plain)[key]}
    tabs = getattr(builder.config, "sep", None) == "\t"
    if tabs and all(plain_ending(Path(f"a{name}")) == ".tsv" for name in endings):
        special.discard("sep")
    return not special


# --- their rows -----------------------------------------------------------------------------------


def _read(files: Files, split: str) -> list[Part]:
    import datasets

    split = "+".join(files) if split == "all" else split
    wanted = dict.fromkeys(_SPLIT.findall(split))
    if unknown := [part for part in wanted if part not in files]:
        raise ValueError(f"Unknown split {unknown[0]!r}. Should be one of {list(files)}.")  # as `datasets` says it
    rows = {part: list(_parts(files[part])) for part in wanted}
    lengths = {part: sum(len(table.rows) for table in tables) for part, tables in rows.items()}
    parts = [
        part
        for piece in datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
        for part in _between(rows[piece.splitname], piece.from_, piece.to)
    ]
    if not parts:
        raise DataError(f"the split {split!r} on the Hub has no rows; set dataset_split to another.")
    return parts


def _parts(files: list[tuple[str, str, str]]) -> Iterator[Part]:
    """Yield the rows of every file."""
    for repository, commit in dict.fromkeys((repository, commit) for repository, commit, _ in files):
        paths = tuple(path for *origin, path in files if [repository, commit] == origin)
        folder = hub.fetch(repository, paths, revision=commit, kind="dataset")
        for path in paths:
            if not (folder / path).is_file():
                raise HubError(f"{repository}/{path} is not in the cache and the Hugging Face Hub cannot be reached")
            try:
                yield load_file(folder / path, name=f"{repository}/{path}")
            except DataError as error:  # the user does not know the path in the cache
                raise DataError(str(error).replace(str(folder / path), f"{repository}/{path} (on the Hub)")) from None


def _between(parts: list[Part], start: int, stop: int) -> Iterator[Part]:
    """Yield rows `start` to `stop` of all parts in a row, without the parts that have none of them."""
    for part in parts:
        count = len(part.rows)
        low, high = max(start, 0), min(stop, count)
        if low < high:
            yield part if high - low == count else replace(part, rows=part.rows.select(range(low, high)))
        start, stop = start - count, stop - count


def _sentence(error: Exception, name: str, config: str | None, split: str, revision: str | None) -> str:
    """Return one sentence for whatever is wrong with a dataset on the Hub, or on the way to it."""
    if problem := _problem(error, name, config, split, revision):
        return f"the dataset {name} {problem}"
    unreachable = (
        f"the dataset {name} is not a local file or folder and the Hugging Face Hub cannot be reached; check the path, "
        "or the network, HF_ENDPOINT and HF_HUB_OFFLINE."
    )
    if found := hub_errors.explanation(error, f"the dataset {name}", unreachable=unreachable):
        return found
    if _UNREACHABLE.search(type(error).__name__):
        return unreachable
    return f"the dataset {name} cannot be loaded from the Hugging Face Hub: {one_line(error)}"


def _problem(error: Exception, name: str, config: str | None, split: str, revision: str | None) -> str | None:
    """Return the end of the sentence "the dataset x ...", from the messages of datasets 4 and 5, if they tell."""
    problem = one_line(error)
    if listed := re.search(r"(BuilderConfig|Config name|Unknown split).*?(\[.*?\])", problem):
        names = re.findall(r"'(.*?)'", listed[2])
        if listed[1] == "Unknown split":
            return f"has no split {split!r}{nearest(split, names)}; set dataset_split to one of: {', '.join(names)}."
        lacks = f"has no configuration {config!r}{nearest(config, names)}" if config else "needs a configuration"
        return f"{lacks}; set dataset_config to one of: {', '.join(names)}."
    if "is a gated dataset" in problem:
        page = f"https://huggingface.co/datasets/{name}"
        return f"is gated; ask for access at {page} and log in with `hf auth login`."
    if "Revision '" in problem:
        return f"has no revision {revision!r}; check dataset_revision."
    if "doesn't exist" in problem:
        return (
            "is not a local file or folder and was not found on the Hugging Face Hub; check the spelling, or log in "
            "with `hf auth login` if it is private."
        )
    return None
