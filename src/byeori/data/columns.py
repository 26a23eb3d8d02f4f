"""The columns of tables: plain names, labels as text, nested columns, and several tables below each other."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from byeori.data.files import Part
from byeori.data.readers.text import check_unique
from byeori.errors import DataError

if TYPE_CHECKING:  # importing it takes half a second, which `byeori --help` must not
    from datasets import Dataset, Features

ROW = "__row__"
"""The column that load_rows adds: the 0-based position of the row in the source."""


def plain_name(column: str) -> str:
    """Return a column's name as a template writes it: composed letters (NFC), on one line, no space around it."""
    lines = (line.strip() for line in unicodedata.normalize("NFC", column).splitlines())
    return " ".join(line for line in lines if line) or column


def renamed(columns: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Return a table's columns with the names that the user gives them. names: new name -> column."""
    old = {plain_name(column) for column in names.values()}
    kept = [column for column in columns if column not in old and column not in names]
    return [*kept, *(new for new, column in names.items() if has(columns, plain_name(column)))]


def plain(part: Part, names: Mapping[str, str]) -> Part:
    """Return a table with plain names, with the names that the user gives its columns, and without what is no text.

    names: new name -> column, which may be inside another (`translation.ko`). The names of a label's classes replace
    their numbers.

    Raises:
        DataError: if two columns get one name, or one has none.
    """
    from datasets import ClassLabel

    rows = part.rows.with_format(None)
    rows = rows.remove_columns(ROW) if ROW in rows.column_names else rows
    media = {
        name: "it holds images, video or sound, and byeori trains text alone"
        for name, feature in rows.features.items()
        if _is_media(feature)
    }
    rows = rows.remove_columns(list(media))
    plain_names = {name: plain_name(name) for name in rows.column_names}
    if "" in plain_names:
        raise DataError(f"{part.name} has a column without a name; give it one.")
    check_unique(part.name, list(plain_names.values()))
    rows = rows.rename_columns(plain_names)
    wanted = {plain_name(old): new for new, old in names.items()}
    rows = with_nested(rows, list(wanted))
    wanted = {old: new for old, new in wanted.items() if old in rows.column_names}  # another file may have it
    replaced = [new for new in wanted.values() if new in rows.column_names and new not in wanted]
    rows = rows.remove_columns(replaced)
    notes = [f"columns puts {names[new]!r} in the place of the column {new!r} of {part.name}" for new in replaced]
    rows = rows.rename_columns({name: wanted.get(name, name) for name in rows.column_names})
    for name, feature in rows.features.items():
        if isinstance(feature, ClassLabel):
            rows = _with_labels(rows, name, feature.names)
    left_out = {plain_name(name): why for name, why in (part.left_out | media).items()}
    return replace(part, rows=rows, left_out=left_out, notes=(*part.notes, *notes))


def _is_media(feature: Any) -> bool:
    """Return whether a column holds images, sounds and the like, which need packages of their own to be opened."""
    from datasets import Audio, Image, Video

    if isinstance(feature, dict):
        return any(map(_is_media, feature.values()))
    inside = getattr(feature, "feature", None)
    return _is_media(inside) if inside is not None else isinstance(feature, (Audio, Image, Video))


def _with_labels(rows: Dataset, name: str, labels: list[str]) -> Dataset:
    """Return the rows with the names of the classes of a label; a class of -1 is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers = rows.select_columns([name]).with_format("arrow")[:][name].combine_chunks()
    known = pc.if_else(pc.less(numbers, 0), None, numbers)
    text = pc.take(pa.array(labels, pa.string()), known)
    order = rows.column_names
    return rows.remove_columns([name]).add_column(name, text).select_columns(order)


# ---- nested columns -----------------------------------------------------------------------------------------------


def with_nested(rows: Dataset, names: Sequence[str]) -> Dataset:
    """Return the rows with a column for each of the names that stands inside another, such as `translation.ko`."""
    from datasets import Features, concatenate_datasets

    from byeori.data.json_values import JsonValue

    for name in dict.fromkeys(names):
        head = name.partition(".")[0]
        if name in rows.column_names or head not in rows.column_names or head == name:
            continue
        with _no_progress_bar():
            inside = rows.select_columns([head]).map(
                _look_inside,
                batched=True,
                fn_kwargs={"name": name},
                remove_columns=[head],
                features=Features({name: JsonValue()}),
            )
        rows = concatenate_datasets([rows, inside], axis=1)
    return rows


def _look_inside(batch: dict[str, list[Any]], name: str) -> dict[str, list[str | None]]:
    head, *keys = name.split(".")
    found = []
    for value in batch[head]:
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        found.append(value)
    return _texts(found, name)


def has(columns: Sequence[str], name: str) -> bool:
    """Return whether a table has a column, or one that may hold it inside."""
    return name in columns or name.partition(".")[0] in columns


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


# ---- several tables -----------------------------------------------------------------------------------------------


def concatenate(parts: Sequence[Part]) -> Dataset:
    """Return the rows of all parts; what a part lacks is null there.

    Numbers become fractions next to fractions. Where types differ otherwise, every value keeps its own (JsonValue).
    """
    import datasets

    tables = [part.rows for part in parts]
    for name in dict.fromkeys(name for table in tables for name in table.column_names):
        having = [at for at, table in enumerate(tables) if name in table.column_names]
        features = [tables[at].features[name] for at in having]
        if all(feature == features[0] for feature in features):
            continue
        converted = _same_type([tables[at] for at in having], name)
        for at, table in zip(having, converted, strict=True):
            tables[at] = table
    return datasets.concatenate_datasets(tables)


def _same_type(tables: list[Dataset], name: str) -> list[Dataset]:
    """Return tables whose types of one column differ, with one type that holds the values of all."""
    import pyarrow as pa
    from datasets import Features, Value

    from byeori.data.json_values import JsonValue

    types = [table.features.arrow_schema.field(name).type for table in tables]
    plain_values = all(type(table.features[name]) is Value for table in tables)
    text = all(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind) for kind in types)
    numbers = all(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind) for kind in types)
    try:
        if plain_values and text:
            return [table.cast_column(name, Value("string")) for table in tables]
        if plain_values and numbers:
            schemas = [pa.schema([pa.field(name, kind)]) for kind in types]
            common = Features.from_arrow_schema(pa.unify_schemas(schemas, promote_options="permissive"))
            return [table.cast_column(name, common[name]) for table in tables]
    except pa.ArrowInvalid:  # a number that no fraction holds exactly
        pass
    return [
        table if isinstance(table.features[name], JsonValue) else _as_json(table, name, table.features)
        for table in tables
    ]


def _as_json(table: Dataset, name: str, features: Features) -> Dataset:
    from byeori.data.json_values import JsonValue

    changed = features.copy()
    changed[name] = JsonValue()
    with _no_progress_bar():
        return table.map(_texts, batched=True, input_columns=[name], fn_kwargs={"name": name}, features=changed)


def _texts(values: list[Any], name: str) -> dict[str, list[str | None]]:
    """Return a column of values as JSON text, which a batch of JsonValue is written as."""
    from byeori.data.json_values import dumps

    return {name: [None if value is None else dumps(value) for value in values]}
