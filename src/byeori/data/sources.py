"""Rows from any table: a Hub dataset, jsonl, json, csv, tsv, parquet, Arrow, or a folder saved by `datasets`.

    path ── its reader's batches ──> Arrow file in datasets' cache (named by content) ── memory map ──> Dataset

Files are read here and not by datasets' own loaders, because those change values: "2024-01-02" becomes a timestamp,
"007" becomes 7, a short csv row is filled up, a column of mixed types becomes JSON text. Rows are held in memory a
batch at a time (a .json file as a whole), and 8 bytes each for ROW.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from byeori.data.files import KNOWN_ENDINGS, check_file, load_file, reading
from byeori.data.hub_dataset import load_dataset
from byeori.data.readers import READERS, ending
from byeori.data.readers.text import check_unique, open_text
from byeori.errors import DataError
from byeori.support.suggestions import nearest, nearest_file
from byeori.support.text_files import one_line

if TYPE_CHECKING:  # importing it takes half a second, which `byeori --help` must not
    from datasets import Dataset, Features

ROW = "__row__"
"""The column that load_rows adds: the 0-based position of the row in the source."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
# The words for a split and where they stand in a file's name, as in `datasets`; "testset" and the like are added here.
_SPLITS = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "val", "dev", "validset", "valset", "devset"),
    "test": ("test", "testing", "testset", "eval", "evaluation", "evalset"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
_SPLIT_WORD = re.compile(rf"(?:^|(?<=[-._ 0-9]))({'|'.join(_SPLIT_OF)})(?=[-._ 0-9])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows and where they come from.

    rows: all rows, with ROW. parts: (path, number of rows) of each file in order; a Hub dataset is one part.
    notes: sentences for the user about files that were skipped.
    """

    rows: Dataset
    parts: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()

    def name(self, row: int) -> str:
        """Return what a message calls the row at position `row`: "news.jsonl line 12" or "row 12 of news.csv"."""
        for path, count in self.parts:
            if row < count:
                return _row_name(path, row, [path for path, _ in self.parts])
            row -= count
        raise IndexError(row)


def load_rows(
    paths: list[str],
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    max_rows: int | None = None,
) -> Table:
    """Return all rows of `paths`, one after the other, memory-mapped, with the column ROW (0, 1, 2, ...) added.

    A path is a file, a glob, a folder of files (without those named for another split), a folder saved by
    `save_to_disk`, or a Hub dataset id. `config` and `revision` are for the Hub, `split` also for folders.
    Values of json keep their types, a column missing from a row is None, a csv value is text as written.

    Raises:
        DataError: if anything is wrong with a file.
        HubError: if anything is wrong with the Hub.
    """
    notes: list[str] = []
    loaded = [(path, list(_load_path(path, config, split, revision, notes))) for path in paths]
    parts = [part for _, tables in loaded for part in tables]
    for name, part in parts:
        if len(part) == 0:
            raise DataError(f"{name} has no rows; give a file with at least one row.")
    rows = _concatenate([(name, _plain_names(name, part.with_format(None))) for name, part in parts])
    rows = rows.add_column(ROW, np.arange(len(rows)))
    origins = []
    for path, tables in loaded:
        if Path(tables[0][0]).expanduser().exists():
            origins += [(name, len(part)) for name, part in tables]
        else:  # on the Hub, where a slice of a split may begin within a file
            origins.append((path, sum(len(part) for _, part in tables)))
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    return Table(rows=rows, parts=tuple(origins), notes=tuple(notes))


def held_out_count(count: int, val_set_size: float) -> int:
    """Return how many of `count` rows to hold out: `val_set_size` is a number (1 or more) or a share (below 1)."""
    if val_set_size >= 1 or val_set_size == 0:
        return int(val_set_size)
    return max(1, round(val_set_size * count))


def split_rows(rows: Dataset, val_set_size: float, seed: int, key_columns: list[str]) -> tuple[Dataset, Dataset | None]:
    """Return (training rows, validation rows or None), both in the order of the source.

    `val_set_size` is a number of rows (1 or more) or a share of them (below 1); 0 means no validation rows.
    Rows that are equal in `key_columns` all go to one side. Rows that occur once are held out first; where they
    are too few, a few rows less than asked for may be held out, never more. The choice depends on the seed and on
    what the rows hold in these columns, not on their order.

    Raises:
        DataError: if no training row or no validation row would be left, or a key column is unknown.
    """
    if val_set_size == 0:
        return rows, None
    wanted = held_out_count(len(rows), val_set_size)
    if wanted >= len(rows):
        raise DataError(
            f"val_set_size {val_set_size:g} leaves none of the {len(rows)} rows to train on; make it smaller."
        )
    keys = hashes(rows, key_columns, seed)
    # np.unique sorts by salted hash, which is the shuffle; the stable sort by size puts single rows first
    _, group, size = np.unique(keys, return_inverse=True, return_counts=True)
    order = np.argsort(size, kind="stable")
    chosen = order[np.cumsum(size[order]) <= wanted]
    if len(chosen) == 0:
        raise DataError(
            f"{wanted} validation rows cannot be held out, because all rows are copies of each other in "
            f"{', '.join(key_columns)} (at least {size.min()} times each); remove the copies or set val_set_size to 0."
        )
    held_out = np.isin(group, chosen)
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))


def _row_name(given: str, row: int, among: list[str]) -> str:
    """Return the name of a row at its position in one file; `among` are all files, some of which may have one name."""
    path = Path(given).expanduser()
    if not path.is_file():
        return f"row {row + 1} of {given}"
    name = path.name if sum(Path(other).name == path.name for other in among) == 1 else given
    if ending(path).removesuffix(".gz") not in (".jsonl", ".ndjson"):
        return f"row {row + 1} of {name}"
    line = row + 1
    for blank in _blank_lines(path, path.stat().st_mtime_ns):
        line += blank <= line
    return f"{name} line {line}"


@functools.lru_cache(maxsize=8)
def _blank_lines(path: Path, changed_ns: int) -> tuple[int, ...]:
    """Return the 1-based numbers of the empty lines; `changed_ns` makes the cache forget a file that was changed."""
    with open_text(path, newline="\n") as lines:
        return tuple(number for number, line in enumerate(lines, start=1) if not line.strip())


def hashes(rows: Dataset, key_columns: list[str], seed: int = 0) -> np.ndarray:
    """Return [rows] uint64: equal for rows with equal keys, in an order that depends on the seed."""
    if unknown := [name for name in key_columns if name not in rows.column_names]:
        raise DataError(
            f"there is no column {unknown[0]!r}{nearest(unknown[0], rows.column_names)}; the columns are "
            f"{', '.join(rows.column_names)}."
        )
    salt = str(seed).encode()[:16]
    digests = bytearray()
    for batch in rows.select_columns(key_columns).with_format("arrow").iter(batch_size=1000):
        for row in batch.to_pylist():
            digests += hashlib.blake2b(repr(row).encode(), digest_size=8, salt=salt).digest()
    return np.frombuffer(bytes(digests), dtype=np.uint64)


# --- where the rows are ---------------------------------------------------------------------------


def check_paths(paths: list[str], split: str = "train") -> None:
    """Raise DataError unless every path is on this machine or may be a Hub dataset.

    Reads no rows, asks no network and imports nothing heavy: what it raises, `load_rows` would raise later.
    """
    for path in paths:
        for file in (_local_files(path, split) or {}).values():
            check_file(file)


def are_local(paths: list[str]) -> bool:
    """Return whether there are paths, and all of them are on this machine: files, folders or globs."""
    return bool(paths) and all(Path(path).expanduser().exists() or matching(path) for path in paths)


def matching(path: str) -> list[Path]:
    """Return the files that a glob matches, by name; none if it is no glob."""
    if not glob.has_magic(path):
        return []
    files = glob.glob(str(Path(path).expanduser()), recursive=True)  # noqa: PTH207  Path.glob finds hidden files too
    return [file for file in map(Path, sorted(files)) if file.is_file()]


def _load_path(
    path: str, config: str | None, split: str, revision: str | None, notes: list[str]
) -> Iterator[tuple[str, Dataset]]:
    """Yield (name for messages, rows) of everything that one path stands for; `notes` gets what was skipped."""
    files = _local_files(path, split, notes)
    if files is None:
        yield from load_dataset(path, config, split, revision)
    elif not files:
        yield path, _load_saved(Path(path).expanduser(), split)
    else:
        yield from ((name, load_file(file)) for name, file in files.items())


def _local_files(path: str, split: str, notes: list[str] | None = None) -> dict[str, Path] | None:
    """Return name -> file of a path; no file for a folder of `save_to_disk`, None for what may be a Hub dataset."""
    local = Path(path).expanduser()
    if local.is_dir():
        if (local / "state.json").exists() or (local / "dataset_dict.json").exists():
            return {}
        return {str(file): file for file in _files_in(local, split, [] if notes is None else notes)}
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


def _files_in(folder: Path, split: str, notes: list[str]) -> list[Path]:
    """Return the data files of a folder by name; without "news-test.jsonl", say, if the split is train."""
    visible = [file for file in sorted(folder.iterdir()) if not file.name.startswith((".", "_"))]
    files = [file for file in visible if file.is_file() and ending(file) in READERS]
    if not files:
        raise DataError(f"the folder {folder} has no data file; known endings are {KNOWN_ENDINGS}.")

    asked = _SPLIT_OF.get(split.lower(), split.lower())
    splits = {file: {_SPLIT_OF[word.lower()] for word in _SPLIT_WORD.findall(file.name)} for file in files}
    wanted = [file for file in files if not splits[file] or asked in splits[file]]
    if not wanted:
        names = ", ".join(file.name for file in files)
        raise DataError(f"the folder {folder} has no file for the split {split!r}; it has {names}.")
    if others := [file.name for file in files if file not in wanted]:
        notes.append(f"Skipped in {folder}, because their names are those of another split: {', '.join(others)}")
    return wanted


def _load_saved(folder: Path, split: str) -> Dataset:
    import datasets

    try:
        with reading(folder):
            saved = datasets.load_from_disk(str(folder))
    except LookupError:  # no Arrow files, or no list of them
        raise DataError(f"{folder} has no rows or is damaged; save it again.") from None
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(saved)} (set dataset_split).")
    return saved[split]


def plain_name(column: str) -> str:
    """Return a column's name as a template writes it: composed letters (NFC), no space around it."""
    return unicodedata.normalize("NFC", column).strip() or column


def _plain_names(path: str, rows: Dataset) -> Dataset:
    names = {name: plain_name(name) for name in rows.column_names}
    check_unique(path, list(names.values()))
    changed = {old: new for old, new in names.items() if old != new}
    return rows.rename_columns(changed) if changed else rows


def _concatenate(parts: list[tuple[str, Dataset]]) -> Dataset:
    """Return the rows of all parts; columns must be the same, and whole numbers become fractions to join fractions."""
    import datasets
    import pyarrow as pa

    parts = [(name, part.remove_columns(ROW) if ROW in part.column_names else part) for name, part in parts]
    first_name, first = parts[0]
    for name, part in parts[1:]:
        if differ := sorted(set(first.column_names) ^ set(part.column_names)):
            where = {column: first_name if column in first.column_names else name for column in differ}
            listed = ", ".join(f"{column} is only in {file}" for column, file in where.items())
            raise DataError(f"{first_name} and {name} have different columns: {listed}; make them the same.")
    tables = [part.select_columns(first.column_names) for _, part in parts]
    if any(table.features != first.features for table in tables):
        fields = []
        for column in first.column_names:
            schemas = {name: pa.schema([part.features.arrow_schema.field(column)]) for name, part in parts}
            try:
                fields += list(pa.unify_schemas([*schemas.values()], promote_options="permissive"))
            except pa.ArrowException:
                types = ", ".join(f"{schema.types[0]} in {name}" for name, schema in schemas.items())
                raise DataError(f"column {column!r} has different types: {types}; make them the same.") from None
        features = datasets.Features.from_arrow_schema(pa.schema(fields))
        tables = [_cast(name, table, features) for (name, _), table in zip(parts, tables, strict=True)]
    return datasets.concatenate_datasets(tables)


def _cast(path: str, rows: Dataset, features: Features) -> Dataset:
    """Return the rows with whole numbers as fractions where other files have fractions, or raise DataError."""
    import pyarrow as pa

    changed = [name for name in features if rows.features[name] != features[name]]
    try:
        return rows.cast(features) if changed else rows
    except pa.ArrowException as error:
        columns = ", ".join(map(repr, changed))
        raise DataError(
            f"{path}: column {columns} cannot be converted to its type in another file ({one_line(error)}); make the "
            "types the same, or write such numbers as text."
        ) from None
