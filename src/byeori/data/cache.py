"""Rows -> tokenized rows, in Arrow files on disk: memory-mapped, and cached by content.

A tokenized table has these columns:

    token_ids   the example's tokens          targets    flattened [start, end) pairs
    row         position in the source        shortened  tokens that the prompt lost
    straddles   tokens over the prompt's end  digest     of the token ids, to find duplicates
    problem     why the row cannot be trained ("" where it can)      too_long   whether length is the reason
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from byeori.data.tokenize import Encoding, Example, encode_row
from byeori.errors import TemplateError, TooLongError

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from pyarrow import ChunkedArray

# Below this the processes take longer to start than they save.
_ROWS_PER_PROCESS = 20_000
_FORMAT = "2"


def encode_table(rows: Dataset, how: Encoding, *, progress: bool = True) -> Dataset:
    """Tokenize every row; rows that cannot be trained keep a line with their `problem`.

    All cores are used on large tables, progress is shown, and the result is taken from the cache when rows,
    tokenizer, template and settings are the same.
    """
    from datasets import Dataset, disable_progress_bars, enable_progress_bars

    (enable_progress_bars if progress else disable_progress_bars)()
    if not len(rows):
        return Dataset.from_dict({name: [] for name in _features()}, features=_features())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(cores, len(rows) // _ROWS_PER_PROCESS)
    return rows.map(
        _encode_batch,
        batched=True,
        batch_size=256,
        fn_kwargs={"how": how},
        remove_columns=rows.column_names,
        features=_features(),
        num_proc=processes if processes > 1 else None,
        new_fingerprint=fingerprint(rows, how),
        desc="Tokenizing",
    )


def _features() -> Features:
    """The columns; named, because a first batch without a usable row would leave their types open."""
    from datasets import Features, List, Value

    kinds = {name: Value("int64") for name in ("row", "shortened", "straddles")}
    lists = {"token_ids": List(Value("int32")), "targets": List(Value("int32"))}
    words = {"digest": Value("string"), "problem": Value("string"), "too_long": Value("bool")}
    return Features({**lists, **kinds, **words})


def fingerprint(rows: Dataset, how: Encoding) -> str:
    """A name for the tokenized table: of the rows' content and everything that tokenizing depends on."""
    template = how.template.text if how.template else how.tokenizer.chat_template
    special = None if how.template else how.tokenizer.special_tokens_map  # a chat template writes them
    settings = [_FORMAT, template, special, how.cutoff_len, how.bos, how.eos, how.train_on_inputs]
    state = [rows._fingerprint, how.core.to_str(), json.dumps(settings, default=str)]
    return hashlib.sha256("\0".join(state).encode()).hexdigest()[:16]


def _encode_batch(batch: dict[str, list[Any]], how: Encoding) -> dict[str, list[Any]]:
    names = ("token_ids", "targets", "row", "shortened", "straddles", "digest", "problem", "too_long")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        problem, too_long = "", False
        try:
            example = encode_row(row, how)
        except TemplateError as error:
            example = Example(token_ids=(), targets=(), row=int(row.get("__row__", 0)))
            problem, too_long = str(error), isinstance(error, TooLongError)
        ids = np.asarray(example.token_ids, dtype=np.int32)
        content = ids.tobytes() + repr(example.targets).encode()
        line = (
            ids,
            [edge for span in example.targets for edge in span],
            example.row,
            example.shortened,
            example.straddles,
            hashlib.blake2b(content, digest_size=8).hexdigest(),
            problem,
            too_long,
        )
        for name, value in zip(names, line, strict=True):
            columns[name].append(value)
    return columns


def usable(table: Dataset) -> Dataset:
    """The rows that can be trained."""
    import pyarrow.compute as pc

    good = np.flatnonzero(pc.equal(column(table, "problem"), ""))
    return table if len(good) == len(table) else table.select(good)


def column(table: Dataset, name: str) -> ChunkedArray:
    """One column as Arrow, hundreds of times faster to go through than as Python values."""
    return table.select_columns(name).with_format("arrow")[:].column(name)


def lengths(table: Dataset) -> np.ndarray:
    """Tokens of each row [rows]."""
    import pyarrow.compute as pc

    parts = table.select_columns("token_ids").with_format("arrow").iter(batch_size=_ROWS_PER_PROCESS)
    counts = [pc.list_value_length(part.column("token_ids")).to_numpy() for part in parts]
    return np.concatenate(counts) if counts else np.zeros(0, dtype=np.int32)


def target_tokens(table: Dataset) -> int:
    """Trained tokens of all rows."""
    edges = column(table, "targets").combine_chunks().flatten().to_numpy()
    return int(edges[1::2].sum(dtype=np.int64) - edges[::2].sum(dtype=np.int64))


def example(table: Dataset, index: int) -> Example:
    """One tokenized row as an Example."""
    line = table[int(index)]
    edges = line["targets"]
    return Example(
        token_ids=line["token_ids"],
        targets=tuple(zip(edges[::2], edges[1::2], strict=True)),
        row=line["row"],
        shortened=line["shortened"],
        straddles=line["straddles"],
    )
