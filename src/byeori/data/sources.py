"""Rows from any table: a Hub dataset, files of every usual kind (readers/), or a folder saved by `datasets`.

    path ── its reader's batches ──> Arrow file in datasets' cache (named by content) ── memory map ──> Dataset

Files are read here and not by datasets' own loaders, because those change values: "2024-01-02" becomes a timestamp,
"007" becomes 7, a short csv row is filled up, objects get each other's keys. Rows are held in memory a batch at a time
(a .json file or a workbook as a whole), and 8 bytes each for ROW. A column that cannot be read is left out and named.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from byeori.data import database, remote_files
from byeori.data.columns import ROW, concatenate, has, plain, plain_name, with_nested
from byeori.data.files import Part, load_file, reading
from byeori.data.hub_dataset import load_dataset
from byeori.data.places import local_files, split_weight
from byeori.data.readers.text import open_text, plain_ending
from byeori.errors import DataError
from byeori.support.data_urls import is_database, is_url
from byeori.support.suggestions import nearest
from byeori.support.text_files import redacted

if TYPE_CHECKING:  # importing it takes half a second, which `byeori --help` must not
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows and where they come from.

    rows: all rows, with ROW. parts: (path, number of rows) of each file in order; a Hub dataset is one part.
    notes: sentences for the user about how the rows were read. left_out: columns that cannot be read, and why.
    lacking: columns that not all files have -> a file without them. sources: (path, number of rows, weight or None) of
    each path that was given.
    """

    rows: Dataset
    parts: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[tuple[str, int, float | None], ...] = ()

    def name(self, row: int) -> str:
        """Return what a message calls the row at position `row`: "news.jsonl line 12" or "row 12 of news.csv"."""
        for path, count in self.parts:
            if row < count:
                return _row_name(path, row, [path for path, _ in self.parts])
            row -= count
        raise IndexError(row)

    def after(self, other: Table) -> Table:
        """Return the table with its rows numbered after those of another, and the names of both."""
        numbers = np.arange(len(self.rows)) + len(other.rows)
        rows = self.rows.remove_columns(ROW).add_column(ROW, numbers)
        return replace(self, rows=rows, parts=(*other.parts, *self.parts))

    def with_columns(self, columns: Iterable[str], optional: Container[str] = ()) -> Table:
        """Return the table with those of the columns that stand inside another, such as `translation.ko`.

        Raises:
            DataError: if one of the columns cannot be read, or a file lacks one that is not optional.
        """
        wanted = list(columns)
        for name in wanted:
            head = name if name in self.rows.column_names else name.partition(".")[0]
            if reason := self.left_out.get(head):
                raise DataError(
                    f"the column {head!r} cannot be read: {reason}; write it as text or messages, or remove it."
                )
            if name not in optional and (file := self.lacking.get(head)):
                raise DataError(f"{file} has no column {head!r}; add it, or leave the file out.")
        return replace(self, rows=with_nested(self.rows, wanted))


def load_rows(
    paths: list[str],
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    max_rows: int | None = None,
    columns: Mapping[str, str] | None = None,
    inherited: bool = False,
    query: str | None = None,
) -> Table:
    """Return all rows of `paths`, one after the other, memory-mapped, with the column ROW (0, 1, 2, ...) added.

    A path is a file, a glob, a folder of files (without those named for another split), a folder saved by
    `save_to_disk`, a Hub dataset id, a URL of fsspec, or a database, whose rows `query` selects. `config` (also the
    sheet of a workbook) and `revision` are for the Hub, `split` also for folders. Of each path, only the first
    `max_rows` rows are read. columns: new name -> column; inherited: from a run, so that the table may have the new
    names instead.
    Values of json keep their types, a column missing from a row is None, a csv value is text as written.

    Raises:
        DataError: if anything is wrong with a file.
        HubError: if anything is wrong with the Hub.
    """
    notes: list[str] = []
    parts: list[Part] = []
    origins: list[tuple[str, int]] = []
    known: set[str] = set()
    given: list[tuple[str, int, float | None]] = []
    for path, weight in map(split_weight, paths):
        loaded = list(_load_path(path, config, split, revision, query, notes))
        known |= {plain_name(name) for part in loaded for name in part.rows.column_names}
        loaded = [plain(part, columns or {}) for part in loaded]
        for part in loaded:
            if len(part.rows) == 0:
                raise DataError(f"{part.name} has no rows; give a file with at least one row.")
        loaded = list(_first(loaded, max_rows))
        if Path(loaded[0].name).expanduser().exists():
            origins += [(part.name, len(part.rows)) for part in loaded]
        else:  # on the Hub, where a slice of a split may begin within a file
            origins.append((redacted(path), sum(len(part.rows) for part in loaded)))
        given.append((redacted(path), sum(len(part.rows) for part in loaded), weight))
        parts += loaded
    if not inherited:
        _check_names((columns or {}).values(), sorted(known), paths[0])
    left_out = {name: why for part in parts for name, why in part.left_out.items()}
    parts = [replace(part, rows=part.rows.remove_columns(_common(part.rows.column_names, left_out))) for part in parts]
    rows = concatenate(parts)
    lacking = {name: part.name for part in parts for name in rows.column_names if name not in part.rows.column_names}
    return Table(
        rows=rows.add_column(ROW, np.arange(len(rows))),
        parts=tuple(origins),
        notes=(*notes, *(note for part in parts for note in part.notes)),
        left_out=left_out,
        lacking=lacking,
        sources=tuple(given),
    )


def _check_names(wanted: Iterable[str], known: list[str], path: str) -> None:
    """Raise DataError if a column that the user names is in none of the tables."""
    for name in wanted:
        if not has(known, plain_name(name)):
            near, names = nearest(name, known), ", ".join(known)
            raise DataError(
                f"columns names the column {name!r}, which {path} does not have{near}; its columns are {names}."
            )


def load_recorded(settings: Mapping[str, Any], max_rows: int | None = None) -> Table:
    """Return the rows of a run with these settings. max_rows: fewer of them.

    Raises:
        ByeoriError: as load_rows.
        KeyError: if a setting is not recorded.
    """
    return load_rows(
        settings["data_path"],
        config=settings.get("dataset_config"),
        split=settings["dataset_split"],
        max_rows=max_rows or settings["max_rows"],
        columns=settings.get("columns"),
        inherited=True,
    )


def _common(names: Iterable[str], others: Container[str]) -> list[str]:
    return [name for name in names if name in others]


def _first(parts: Iterable[Part], count: int | None) -> Iterator[Part]:
    """Yield the parts that hold the first `count` rows."""
    for part in parts:
        if count is None or len(part.rows) <= count:
            yield part
        elif count:
            yield replace(part, rows=part.rows.select(range(count)))
        count = None if count is None else max(0, count - len(part.rows))


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
    if plain_ending(path) not in (".jsonl", ".ndjson"):
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


# --- loading ---------------------------------------------------------------------------------------


def _load_path(
    path: str, config: str | None, split: str, revision: str | None, query: str | None, notes: list[str]
) -> Iterator[Part]:
    """Yield everything that one path stands for; `notes` gets what was skipped."""
    files = local_files(path, split, notes)
    if is_database(path):
        yield load_file(database.fetch(path, query), name=redacted(path))
    elif is_url(path):
        copies = remote_files.fetch(path, split, notes)
        yield from (load_file(file, name=name, sheet=config) for name, file in copies.items())
    elif files is None:
        yield from load_dataset(path, config, split, revision)
    elif not files:
        yield Part(name=path, rows=_load_saved(Path(path).expanduser(), split))
    else:
        yield from (load_file(file, name=name, sheet=config) for name, file in files.items())


def _load_saved(folder: Path, split: str) -> Dataset:
    import datasets

    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.exists() and not (path.is_file() or path.is_dir()):  # whose end datasets would wait for
            raise DataError(f"{path} is a pipe or a device, not a file; save the rows again.")
    try:
        with reading(folder):
            saved = datasets.load_from_disk(str(folder))
    except (LookupError, TypeError, AttributeError):  # no Arrow files, no list of them, or a number in its place
        raise DataError(f"{folder} has no rows or is damaged; save it again.") from None
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(saved)} (set dataset_split).")
    return saved[split]
