"""Where rows are: files, folders, globs, and what may be a dataset on the Hub. Nothing heavy is imported here."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from byeori.data.files import KNOWN_ENDINGS, check_file
from byeori.data.readers import DOCUMENTS, READERS, ending
from byeori.errors import DataError
from byeori.support.data_urls import is_url
from byeori.support.suggestions import nearest_file

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_WEIGHT = re.compile(r"(.+):(\d+(?:\.\d+)?|\.\d+)")
# The words for a split and where they stand in a file's name, as in `datasets`; "testset" and the like are added here.
_SPLITS = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "val", "dev", "validset", "valset", "devset"),
    "test": ("test", "testing", "testset", "eval", "evaluation", "evalset"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
_SPLIT_WORD = re.compile(rf"(?:^|(?<=[-._ 0-9]))({'|'.join(_SPLIT_OF)})(?=[-._ 0-9])", re.IGNORECASE)


def split_weight(path: str) -> tuple[str, float | None]:
    """Return a path and the weight behind it: `a.jsonl:0.7` -> ("a.jsonl", 0.7); None without one.

    Raises:
        DataError: if the weight is 0.
    """
    match = _WEIGHT.fullmatch(path)
    if not match or Path(path).exists() or re.fullmatch(r"\w+://[^/]*", match[1]):  # a port
        return path, None
    if float(match[2]) == 0:
        raise DataError(f"the weight of {match[1]} is 0; give a number above 0, or leave the path out.")
    return match[1], float(match[2])


def check_paths(paths: list[str], split: str = "train") -> None:
    """Raise DataError unless every path is on this machine or may be a Hub dataset.

    Reads no rows, asks no network and imports nothing heavy: what it raises, `load_rows` would raise later.
    """
    weights = dict(map(split_weight, paths))
    if without := [path for path, weight in weights.items() if weight is None]:
        if len(without) < len(weights):
            raise DataError(
                f"{without[0]} has no weight, and others have; write one behind it, such as {without[0]}:0.5."
            )
    elif len(weights) == 1:
        raise DataError(f"the weight of {paths[0]} has no effect, because there is no other data_path; remove it.")
    for path in weights:
        for file in (local_files(path, split) or {}).values():
            check_file(file)


def are_local(paths: list[str]) -> bool:
    """Return whether there are paths, and all of them are on this machine: files, folders or globs."""
    plain = [split_weight(path)[0] for path in paths]
    return bool(plain) and all(Path(path).expanduser().exists() or matching(path) for path in plain)


def matching(path: str) -> list[Path]:
    """Return the files that a glob matches, by name; none if it is no glob."""
    if not glob.has_magic(path):
        return []
    files = glob.glob(str(Path(path).expanduser()), recursive=True)  # noqa: PTH207  Path.glob finds hidden files too
    return [file for file in map(Path, sorted(files)) if file.is_file()]


def local_files(path: str, split: str, notes: list[str] | None = None) -> dict[str, Path] | None:
    """Return name -> file of a path; no file for a folder of `save_to_disk`, None for what is not on this machine."""
    if is_url(path):
        return None
    local = Path(path).expanduser()
    if local.is_dir():
        if (local / "state.json").exists() or (local / "dataset_dict.json").exists():
            return {}
        inside = [file for file in sorted(local.iterdir()) if file.is_file()]
        return {str(file): file for file in files_of_split(inside, local, split, [] if notes is None else notes)}
    if local.exists():
        return {path: local}
    if glob.has_magic(path):
        if not (files := matching(path)):
            raise DataError(f"no file matches {path}; check the folder and the pattern.")
        return {str(file): file for file in files}
    if ending(local) in READERS or path.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(path):
        if not local.parent.is_dir():
            raise DataError(f"there is no file {path}: the folder {local.parent} does not exist; check the path.")
        raise DataError(f"there is no file {path}{nearest_file(local)}; check the path.")
    return None


def files_of_split(inside: list[Path], folder: object, split: str, notes: list[str]) -> list[Path]:
    """Return the data files among those of a folder; without "news-test.jsonl", say, if the split is train.

    Raises:
        DataError: if there is none.
    """
    files = [file for file in inside if not file.name.startswith((".", "_")) and ending(file) in READERS]
    if not files:
        raise DataError(f"the folder {folder} has no data file; known endings are {KNOWN_ENDINGS}.")
    if tables := [file for file in files if ending(file) not in DOCUMENTS]:
        files = tables  # the texts are about them: README.md, LICENSE.txt

    asked = _SPLIT_OF.get(split.lower(), split.lower())
    splits = {file: {_SPLIT_OF[word.lower()] for word in _SPLIT_WORD.findall(file.name)} for file in files}
    wanted = [file for file in files if not splits[file] or asked in splits[file]]
    if not wanted:
        names = ", ".join(file.name for file in files)
        raise DataError(f"the folder {folder} has no file for the split {split!r}; it has {names}.")
    if others := [file.name for file in files if file not in wanted]:
        notes.append(f"Skipped in {folder}, because their names are those of another split: {', '.join(others)}")
    return wanted
