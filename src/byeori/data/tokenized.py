"""Rows -> tokenized rows, in Arrow files on disk: memory-mapped, and cached by content.

A tokenized table has a line for each example (a preference row makes two, chosen and rejected; a conversation one for
each trained turn) and these columns:

    token_ids   the example's tokens                      targets    flattened [start, end) pairs
    row         position in the source                    shortened  tokens cut from the prompt
    joins       whether one text of prompt and answer has other tokens
    special     the first control token in the text       digest     of the token ids, to find duplicates
    problem     why the row cannot be trained, or ""      too_long   whether its length is the reason
    no_prompt   whether the columns of the prompt are empty
    composed    whether Hangul letters were made syllables
    turn        the trained message, 1-based              turns_left_out  trained turns that are too long
    piece       the piece of a document, 1-based; pieces are trained apart from each other
    highest     the highest token id, -1 without any
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from byeori.data.row_kinds import RowKind
from byeori.data.text_values import is_decomposed
from byeori.data.tokenize import Encoding, Example
from byeori.errors import DataError, TemplateError, TooLongError
from byeori.support import cgroups
from byeori.support.atomic_files import disk_errors, is_as_noted, note_hash

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from pyarrow import ChunkedArray

# With fewer rows, processes take longer to start than they save.
_ROWS_PER_PROCESS = 20_000
# Rows of a column that are in memory at once when it is read to the end.
_ROWS_AT_ONCE = 20_000
# Increase it when rows are tokenized differently than before, or their problems are worded differently.
_FORMAT = "10"


def encode_table(rows: Dataset, encoding: Encoding, row_kind: RowKind, *, progress: bool = True) -> Dataset:
    """Tokenize every row into the lines of its examples; rows that cannot be trained get lines with a `problem`.

    Large tables are tokenized on all cores. The table comes from the cache if rows, tokenizer, template and settings
    are the same as before.

    Raises:
        DataError: if the cache cannot be written.
    """
    from datasets import Dataset, config

    if not len(rows):
        return Dataset.from_dict({name: [] for name in _features()}, features=_features())
    processes = min(cgroups.cores(), len(rows) // _ROWS_PER_PROCESS)
    cache = f"the cache of tokenized rows in {config.HF_DATASETS_CACHE}"
    advice = "free space there, or set HF_DATASETS_CACHE to another folder"
    with _progress_bars(progress), _environment(), disk_errors(cache, advice=advice, error=DataError):
        if processes > 1:  # a copy of this process has none of its threads
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        name = fingerprint(rows, encoding, row_kind)
        for path in _cached(rows, name):
            if not is_as_noted(path):  # damaged, or left by a killed run
                path.unlink(missing_ok=True)
        table = rows.map(
            _encode_batch,
            batched=True,
            batch_size=256,
            fn_kwargs={"encoding": encoding, "row_kind": row_kind},
            remove_columns=rows.column_names,
            features=_features(),
            num_proc=processes if processes > 1 else None,
            new_fingerprint=name,
            desc="Tokenizing",
        )
        for path in _cached(rows, name):
            if not is_as_noted(path):
                with suppress(FileNotFoundError):  # another run takes it for damaged until its hash is noted
                    note_hash(path)
        return table


def _cached(rows: Dataset, name: str) -> list[Path]:
    """Return the files of a tokenized table: `datasets` puts them beside the first file of the rows."""
    folders = {Path(file["filename"]).parent for file in rows.cache_files[:1]}
    return [path for folder in folders for path in folder.glob(f"cache-{name}*.arrow")]


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Show or hide the progress bars of `datasets`, as long as the body runs."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = are_progress_bars_disabled()
    (enable_progress_bars if shown else disable_progress_bars)()
    try:
        yield
    finally:
        (disable_progress_bars if hidden else enable_progress_bars)()


@contextmanager
def _environment() -> Iterator[None]:
    """Put os.environ back: on several processes `datasets` leaves a copy in its place, which others do not see."""
    environment, values = os.environ, dict(os.environ)
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003  (the very object that was there)
        for name in environment.keys() - values.keys():
            del environment[name]
        environment.update(values)


def _features() -> Features:
    """Return the types of the columns, which a first batch without a usable row would leave unknown."""
    from datasets import Features, List, Value

    lists = {name: List(Value("int32")) for name in ("token_ids", "targets")}
    numbers = {name: Value("int64") for name in ("row", "shortened", "turn", "turns_left_out", "piece", "highest")}
    texts = {name: Value("string") for name in ("special", "digest", "problem")}
    flags = {name: Value("bool") for name in ("joins", "too_long", "no_prompt", "composed")}
    return Features({**lists, **numbers, **texts, **flags})


def fingerprint(rows: Dataset, encoding: Encoding, row_kind: RowKind) -> str:
    """Return a name for the tokenized table: a hash of the rows and of everything that tokenizing depends on."""
    template = encoding.template.text if encoding.template else encoding.tokenizer.chat_template
    special = None if encoding.template else encoding.tokenizer.special_tokens_map  # a chat template may write them
    numbers = [encoding.cutoff_len, encoding.prefix, encoding.eos, encoding.train_on_inputs]
    settings = [
        _FORMAT,
        template,
        special,
        *numbers,
        row_kind.name,
        encoding.train_turns,
        encoding.special_tokens_in_text,
        encoding.encoder.splits,
        *([encoding.day] if encoding.day else []),
    ]
    state = [rows._fingerprint, encoding.encoder.digest, json.dumps(settings, default=str)]
    return hashlib.sha256("\0".join(state).encode()).hexdigest()[:16]


def _encode_batch(batch: dict[str, list[Any]], encoding: Encoding, row_kind: RowKind) -> dict[str, list[Any]]:
    lines = []
    read = row_kind.columns_read(list(batch), encoding.template)
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        problem, too_long = "", False
        try:
            examples = row_kind.encode(row, encoding)
        except TemplateError as error:
            examples = [Example(token_ids=(), targets=(), row=int(row.get("__row__", 0)))]
            problem, too_long = str(error), isinstance(error, TooLongError)
        no_prompt = encoding.template is not None and encoding.template.has_empty_prompt(row)
        composed = not problem and any(is_decomposed(row[name]) for name in read)
        facts = (too_long, no_prompt, composed)
        for unit in [[example] for example in examples] if examples[0].piece else [examples]:
            content = "".join(f"{example.token_ids}{example.targets}" for example in unit)
            digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
            lines += [(*_line(example), digest, problem, example.joins, *facts) for example in unit]
    return {name: list(values) for name, values in zip(_features(), zip(*lines, strict=True), strict=True)}


def _line(example: Example) -> tuple[Any, ...]:
    ids = np.asarray(example.token_ids, dtype=np.int32)
    edges = [edge for span in example.targets for edge in span]
    numbers = (example.row, example.shortened, example.turn, example.turns_left_out, example.piece)
    return ids, edges, *numbers, int(ids.max(initial=-1)), example.special


def usable(table: Dataset) -> Dataset:
    """Return the rows that can be trained."""
    import pyarrow.compute as pc

    good = np.flatnonzero(pc.equal(column(table, "problem"), ""))
    return table if len(good) == len(table) else table.select(good)


def column(table: Dataset, name: str) -> ChunkedArray:
    """Return one column as Arrow, hundreds of times faster to go through than as Python values.

    Lines that were selected are taken by Arrow: `datasets` makes a table of each line on the way, some 1 kB of memory.
    """
    whole = table.data.column(name)
    return whole if table._indices is None else whole.take(table._indices.column(0))


def lengths(table: Dataset) -> np.ndarray:
    """Return the number of tokens of each line [lines]."""
    import pyarrow.compute as pc

    counts = pc.list_value_length(table.data.column("token_ids"))
    return (counts if table._indices is None else counts.take(table._indices.column(0))).to_numpy()


def content(table: Dataset) -> str:
    """Return a hash of all tokens and targets of a table, in their order."""
    digest = hashlib.sha256()
    digests = column(table, "digest")
    for start in range(0, len(digests), _ROWS_AT_ONCE):
        digest.update("".join(digests.slice(start, _ROWS_AT_ONCE).to_pylist()).encode())
    return digest.hexdigest()


def highest_token(table: Dataset) -> int:
    """Return the highest token id of all rows, -1 without any."""
    import pyarrow.compute as pc

    highest = pc.max(column(table, "highest")).as_py()
    return -1 if highest is None else int(highest)


def target_tokens(table: Dataset) -> int:
    """Return the number of trained tokens of all rows."""
    edges = column(table, "targets").combine_chunks().flatten().to_numpy()
    return int(edges[1::2].sum(dtype=np.int64) - edges[::2].sum(dtype=np.int64))


def example(table: Dataset, index: int) -> Example:
    """Return one line as an Example."""
    line = table[int(index)]
    edges = line["targets"]
    return Example(
        token_ids=line["token_ids"],
        targets=tuple(zip(edges[::2], edges[1::2], strict=True)),
        row=line["row"],
        shortened=line["shortened"],
        joins=line["joins"],
        special=line["special"],
        turn=line["turn"],
        turns_left_out=line["turns_left_out"],
        piece=line["piece"],
    )


def row_starts(table: Dataset) -> np.ndarray:
    """Return [rows + 1]: the line that each row of the source begins at; a row has a line for each of its examples.

    A piece of a document is a row of its own.
    """
    if not len(table):
        return np.zeros(1, dtype=np.int64)
    rows, pieces = (column(table, name).to_numpy() for name in ("row", "piece"))
    begins = (np.diff(rows) != 0) | (np.diff(pieces) != 0)
    return np.concatenate([[0], np.flatnonzero(begins) + 1, [len(rows)]])


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A tokenized table of usable rows, ready for the trainer.

    reference: a reference model's log-prob of every trained token of the table, in order (a file on disk); offsets:
    [lines + 1], where the log-probs of each line begin. Both None without a reference model.
    """

    table: Dataset
    reference: np.ndarray | None = None
    offsets: np.ndarray | None = None

    @cached_property
    def starts(self) -> np.ndarray:
        """[rows + 1]: the line that each row begins at."""
        return row_starts(self.table)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def unit(self, index: int) -> list[Example]:
        """Return the examples of a row."""
        return [self._example(line) for line in range(self.starts[index], self.starts[index + 1])]

    def _example(self, line: int) -> Example:
        tokens = example(self.table, line)
        if self.reference is None or self.offsets is None:
            return tokens
        return replace(tokens, reference=self.reference[self.offsets[line] : self.offsets[line + 1]].tolist())

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row's examples together [rows]."""
        return np.add.reduceat(lengths(self.table), self.starts[:-1]) if len(self) else np.zeros(0, dtype=np.int64)


def target_offsets(table: Dataset) -> np.ndarray:
    """Return [lines + 1]: the number of trained tokens before each line."""
    edges = column(table, "targets").combine_chunks()
    ends = np.asarray(edges.offsets)
    flat = edges.values.to_numpy()
    widths = np.concatenate([[0], np.cumsum(flat[1::2].astype(np.int64) - flat[::2])])
    return widths[ends // 2]
