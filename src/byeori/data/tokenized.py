"""Rows -> tokenized rows, in Arrow files on disk: memory-mapped, and cached by content.

A tokenized table has a line for each example (a preference row makes two, chosen and rejected) and these columns:

    token_ids   the example's tokens          targets    flattened [start, end) pairs
    row         position in the source        shortened  tokens that the prompt lost
    straddles   tokens over the prompt's end  digest     of the token ids, to find duplicates
    problem     why the row cannot be trained ("" where it can)      too_long   whether length is the reason
    no_prompt   whether the columns of the prompt are empty
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from byeori.data.row_kinds import RowKind
from byeori.data.tokenize import Encoding, Example
from byeori.errors import DataError, TemplateError, TooLongError

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from pyarrow import ChunkedArray

# Below this the processes take longer to start than they save.
_ROWS_PER_PROCESS = 20_000
# Rows of a column that is gone through once are in memory together.
_ROWS_AT_ONCE = 20_000
# To be increased when rows are tokenized otherwise than before, or their problems have other words.
_FORMAT = "6"


def encode_table(rows: Dataset, how: Encoding, row_kind: RowKind, *, progress: bool = True) -> Dataset:
    """Tokenize every row into the lines of its examples; rows that cannot be trained keep theirs, with a `problem`.

    All cores are used on large tables, progress is shown, and the result is taken from the cache when rows,
    tokenizer, template and settings are the same.
    """
    from datasets import Dataset, disable_progress_bars, enable_progress_bars

    (enable_progress_bars if progress else disable_progress_bars)()
    if not len(rows):
        return Dataset.from_dict({name: [] for name in _features()}, features=_features())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(cores, len(rows) // _ROWS_PER_PROCESS)
    with _into_cache():
        return rows.map(
            _encode_batch,
            batched=True,
            batch_size=256,
            fn_kwargs={"how": how, "row_kind": row_kind},
            remove_columns=rows.column_names,
            features=_features(),
            num_proc=processes if processes > 1 else None,
            new_fingerprint=fingerprint(rows, how, row_kind),
            desc="Tokenizing",
        )


@contextmanager
def _into_cache() -> Iterator[None]:
    """Turn a full disk into one sentence; datasets stumbles over its half-written file and raises something else.

    Raises:
        DataError: the tokenized rows could not be written.
    """
    from datasets import config

    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise DataError(
            f"the tokenized rows could not be written to {config.HF_DATASETS_CACHE} ({cause.strerror or cause}); free "
            "space there, or set HF_DATASETS_CACHE to another folder"
        ) from None


def _features() -> Features:
    """The columns; named, because a first batch without a usable row would leave their types open."""
    from datasets import Features, List, Value

    kinds = {name: Value("int64") for name in ("row", "shortened", "straddles")}
    lists = {"token_ids": List(Value("int32")), "targets": List(Value("int32"))}
    words = {
        "digest": Value("string"),
        "problem": Value("string"),
        "too_long": Value("bool"),
        "no_prompt": Value("bool"),
    }
    return Features({**lists, **kinds, **words})


def fingerprint(rows: Dataset, how: Encoding, row_kind: RowKind) -> str:
    """A name for the tokenized table: of the rows' content and everything that tokenizing depends on."""
    template = how.template.text if how.template else how.tokenizer.chat_template
    special = None if how.template else how.tokenizer.special_tokens_map  # a chat template writes them
    settings = [_FORMAT, template, special, how.cutoff_len, how.bos, how.eos, how.train_on_inputs, row_kind.name]
    state = [rows._fingerprint, how.core.to_str(), json.dumps(settings, default=str)]
    return hashlib.sha256("\0".join(state).encode()).hexdigest()[:16]


def _encode_batch(batch: dict[str, list[Any]], how: Encoding, row_kind: RowKind) -> dict[str, list[Any]]:
    lines = []
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        problem, too_long = "", False
        try:
            examples = row_kind.encode(row, how)
        except TemplateError as error:
            examples = [Example(token_ids=(), targets=(), row=int(row.get("__row__", 0)))] * row_kind.examples
            problem, too_long = str(error), isinstance(error, TooLongError)
        content = "".join(f"{example.token_ids}{example.targets}" for example in examples)
        digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        no_prompt = how.template is not None and how.template.has_empty_prompt(row)
        lines += [(*_line(example), digest, problem, too_long, no_prompt) for example in examples]
    return {name: list(values) for name, values in zip(_features(), zip(*lines, strict=True), strict=True)}


def _line(example: Example) -> tuple[Any, ...]:
    ids = np.asarray(example.token_ids, dtype=np.int32)
    edges = [edge for span in example.targets for edge in span]
    return ids, edges, example.row, example.shortened, example.straddles


def usable(table: Dataset) -> Dataset:
    """The rows that can be trained."""
    import pyarrow.compute as pc

    good = np.flatnonzero(pc.equal(column(table, "problem"), ""))
    return table if len(good) == len(table) else table.select(good)


def column(table: Dataset, name: str) -> ChunkedArray:
    """One column as Arrow, hundreds of times faster to go through than as Python values."""
    return table.select_columns(name).with_format("arrow")[:].column(name)


def _parts(table: Dataset, name: str) -> Iterator[ChunkedArray]:
    """One column as Arrow, a part of its rows at a time."""
    for part in table.select_columns(name).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        yield part.column(name)


def lengths(table: Dataset) -> np.ndarray:
    """Tokens of each row [rows]."""
    import pyarrow.compute as pc

    counts = [pc.list_value_length(part).to_numpy() for part in _parts(table, "token_ids")]
    return np.concatenate(counts) if counts else np.zeros(0, dtype=np.int32)


def content(table: Dataset) -> str:
    """A hash of all that a table's rows are tokenized to, in their order."""
    whole = hashlib.sha256()
    for digests in _parts(table, "digest"):
        whole.update("".join(digests.to_pylist()).encode())
    return whole.hexdigest()


def target_tokens(table: Dataset) -> int:
    """Trained tokens of all rows."""
    edges = column(table, "targets").combine_chunks().flatten().to_numpy()
    return int(edges[1::2].sum(dtype=np.int64) - edges[::2].sum(dtype=np.int64))


def example(table: Dataset, index: int) -> Example:
    """One tokenized line as an Example."""
    line = table[int(index)]
    edges = line["targets"]
    return Example(
        token_ids=line["token_ids"],
        targets=tuple(zip(edges[::2], edges[1::2], strict=True)),
        row=line["row"],
        shortened=line["shortened"],
        straddles=line["straddles"],
    )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A tokenized table of usable rows, as the trainer takes them.

    per_row: lines of a row. reference: a reference model's log-prob of every trained token of the table, in its order
    (a file on disk); offsets: [lines + 1], where a line's begin. Both None where the objective has no reference.
    """

    table: Dataset
    per_row: int = 1
    reference: np.ndarray | None = None
    offsets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.table) // self.per_row

    def unit(self, index: int) -> list[Example]:
        """The examples of a row."""
        return [self._example(self.per_row * int(index) + place) for place in range(self.per_row)]

    def _example(self, line: int) -> Example:
        found = example(self.table, line)
        if self.reference is None or self.offsets is None:
            return found
        return replace(found, reference=self.reference[self.offsets[line] : self.offsets[line + 1]].tolist())

    def lengths(self) -> np.ndarray:
        """Tokens of each row [rows]."""
        return lengths(self.table).reshape(-1, self.per_row).sum(axis=1)


def target_offsets(table: Dataset) -> np.ndarray:
    """[lines + 1]: how many trained tokens stand before each line."""
    edges = column(table, "targets").combine_chunks()
    ends = np.asarray(edges.offsets)
    flat = edges.values.to_numpy()
    widths = np.concatenate([[0], np.cumsum(flat[1::2].astype(np.int64) - flat[::2])])
    return widths[ends // 2]
