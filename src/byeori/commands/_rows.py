"""Rows -> tokenized tables and their audit: the first steps of training and preview. Settings objects stop here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from byeori.artifacts import layout, saved_model, starting_model
from byeori.artifacts.starting_model import StartingModel
from byeori.batch import loader
from byeori.commands._fits import check_embedding
from byeori.config import AuditSettings, DataSettings, GenerateSettings, PreviewSettings, TrainSettings
from byeori.data import (
    audit,
    chat,
    chat_columns,
    documents,
    mix,
    row_kinds,
    sources,
    template,
    tokenize,
    tokenized,
    unpaired,
)
from byeori.data.row_kinds import RowKind
from byeori.data.sources import ROW, Table
from byeori.data.template import Template
from byeori.data.tokenize import Encoding
from byeori.distributed.processes import Processes, barrier
from byeori.errors import TemplateError
from byeori.evaluate import preview as previews
from byeori.support import console
from byeori.support.console import say

if TYPE_CHECKING:
    from datasets import Dataset

S = TypeVar("S", TrainSettings, PreviewSettings)

_LONG_TABLE = 20_000  # fewer rows are tokenized in a moment, and need no line in a log file
_TURNS = {"all": "every assistant turn", "last": "the last assistant turn of each row"}
_PREFIX_ROWS = 1000  # shared prefixes are counted in the first rows: all of them would take long


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Rows ready to train: tokenized tables of usable rows, the table they come from, and the audit."""

    table: Table
    train: Dataset
    held_out: Dataset | None
    audit: dict[str, Any]
    notes: list[str]


def begin(settings: S) -> tuple[S, StartingModel]:
    """Find the model of a run, and resolve the settings that it decides; see starting_model.begin."""
    start, decided = starting_model.begin(settings.model_dump(), settings.model_fields_set)
    note = chat.set_template(start.tokenizer, settings.chat_template, settings.chat_template_kwargs)
    start.notes.extend([note] if note else [])
    return settings.model_copy(update=decided), start


def load_table(
    settings: DataSettings | GenerateSettings | AuditSettings,
    columns: Mapping[str, str] | None = None,
    paths: Sequence[str] | None = None,
) -> Table:
    """Read the rows that the settings name. columns: the names that a run gave to columns (new -> old).

    paths: other files than data_path.
    """
    own = settings.columns if isinstance(settings, DataSettings) else None
    return sources.load_rows(
        list(paths or settings.data_path or []),
        config=settings.dataset_config,
        split=settings.dataset_split,
        revision=getattr(settings, "dataset_revision", None),
        max_rows=settings.max_rows,
        columns=own or columns,
        inherited=not own,
        query=settings.query if isinstance(settings, DataSettings) else None,
    )


def prepare(
    settings: TrainSettings | PreviewSettings,
    start: StartingModel,
    *,
    row_kind: RowKind,
    processes: Processes,
    day: datetime | None = None,
) -> tuple[Prepared, Encoding]:
    """Tokenize the rows; returns them with their audit, and the encoding that made them. No weights are loaded.

    day: what a chat template writes as today; today by default.
    """
    if not processes.first_here:
        barrier(processes)  # the first process of a machine fills the cache, the others read it
    table, chosen, note = _template(settings, start, load_table(settings), row_kind)
    rows = table.rows
    encoding = tokenize.make_encoding(
        start.tokenizer,
        chosen,
        cutoff_len=settings.cutoff_len,
        add_eos_token=settings.add_eos_token,
        train_on_inputs=settings.train_on_inputs,
        train_turns=settings.train_turns,
        special_tokens_in_text=settings.special_tokens_in_text,
        day=day,
    )
    read = row_kind.columns_read(rows.column_names, chosen)
    unread = {name: "" for name in rows.column_names if name not in (*read, ROW)} | dict(table.left_out)
    rows = rows.select_columns([name for name in rows.column_names if name in (*read, *chat_columns.CARRYING, ROW)])
    if settings.validation_path:
        table, held_out_rows = _validation_rows(settings, table, row_kind, chosen)
        train_rows, fewer = rows, []
    else:
        train_rows, held_out_rows = sources.split_rows(rows, settings.val_set_size, settings.seed, read)
        fewer = _fewer_held_out(len(held_out_rows or []), sources.held_out_count(len(rows), settings.val_set_size))
    bar = processes.main and console.moving()
    if processes.main and not bar and len(rows) > _LONG_TABLE:
        say(f"Tokenizing {len(rows):,} rows")
    train = tokenized.encode_table(train_rows, encoding, row_kind, progress=bar)
    held_out = tokenized.encode_table(held_out_rows, encoding, row_kind, progress=bar) if held_out_rows else None
    shares: list[dict[str, Any]] = []
    if any(weight for _, _, weight in table.sources):
        train, shares = mix.mixed(train, table, by=settings.mix_by, seed=settings.seed)
    report = audit.audit(train, held_out, table.name)
    train, held_out = tokenized.usable(train), tokenized.usable(held_out) if held_out is not None else None
    unfit: list[str] = []
    if len(train):
        starts = tokenized.row_starts(train)
        first = min(len(starts) - 1, _PREFIX_ROWS)
        sample = [tokenized.example(train, line) for line in range(starts[first])]
        report |= {"shared_prefix": round(previews.shared_prefix(sample), 4), "shared_prefix_rows": first}
        unfit = check_embedding(settings, start, [part for part in (train, held_out) if part is not None], sample)
    report |= ({"unread_columns": unread} if unread else {}) | ({"mix": shares} if shares else {})
    fewer += [mix.sentence(settings.mix_by, shares)] if shares else []
    report["template"] = chosen.name if chosen else template.CHAT
    report["special_tokens_in_text"] = settings.special_tokens_in_text
    if processes.first_here:
        barrier(processes)
    notes = [*start.notes, *table.notes, note, *fewer, *unfit]
    return Prepared(table=table, train=train, held_out=held_out, audit=report, notes=notes), encoding


def _validation_rows(
    settings: TrainSettings | PreviewSettings, table: Table, row_kind: RowKind, chosen: Template | None
) -> tuple[Table, Dataset]:
    """The table with the names of the rows of validation_path, and these rows.

    Raises:
        TemplateError: if they lack a column of the template.
    """
    held_out = load_table(settings, paths=settings.validation_path).after(table)
    held_out = with_template_columns(held_out, row_kind, chosen)
    try:
        row_kind.check_columns(held_out.rows.column_names, chosen)
    except TemplateError as error:
        raise TemplateError(f"validation_path: {error}") from None
    read = [*row_kind.columns_read(held_out.rows.column_names, chosen), *chat_columns.CARRYING, ROW]
    rows = held_out.rows.select_columns([name for name in held_out.rows.column_names if name in read])
    return replace(table, parts=held_out.parts, notes=(*table.notes, *held_out.notes)), rows


def _fewer_held_out(count: int, wanted: int) -> list[str]:
    if count == wanted:
        return []
    return [f"{count:,} of the {wanted:,} rows that val_set_size asks for are held out: copies of a row stay together"]


def _template(
    settings: TrainSettings | PreviewSettings, start: StartingModel, table: Table, row_kind: RowKind
) -> tuple[Table, Template | None, str]:
    """The table with the columns of its template, the template, and a note about it."""
    chosen, unused = _choose(settings, start, table.rows, row_kind)
    table = with_template_columns(table, row_kind, chosen)
    rows = table.rows
    row_kind.check_columns(rows.column_names, chosen)
    if row_kind is row_kinds.ANSWER:
        unpaired.check_labels(rows, row_kind.columns_read(rows.column_names, chosen))
    if row_kind is row_kinds.PREFERENCE:
        about = ["prefers 'chosen' to 'rejected'"]
    elif row_kind.answer_columns:
        about = [f"trains {', '.join(map(repr, row_kind.answer_columns))}"]
    else:
        about = [f"trains the column {chosen.answer_column!r}" if chosen else f"trains {_TURNS[settings.train_turns]}"]
    if chosen and chosen.literal_blocks:
        about.append(f"{chosen.literal_blocks[0]} names no column, so it stays as text")
    about += _turn_end_notes(start.tokenizer, settings.add_eos_token) if chosen is None else []
    if unused:
        about.append(f"{unused}, the template that the base was trained with, names columns that the rows do not have")
    return table, chosen, f"Template {chosen.name if chosen else template.CHAT}: {'; '.join(about)}"


def with_template_columns(table: Table, row_kind: RowKind, chosen: Template | None) -> Table:
    """Return a table with the columns of a template that stand inside others.

    Raises:
        DataError: if one of the columns cannot be read, or a file lacks one.
    """
    wanted = row_kind.columns_wanted([*table.rows.column_names, *table.left_out], chosen)
    optional = chosen.optional_columns if chosen else wanted
    if chosen is None or chosen.name in template.shipped():
        wanted = {*wanted, *chat_columns.CARRYING}
        optional = {*optional, *chat_columns.CARRYING}
    return table.with_columns(wanted, optional)


def _choose(
    settings: TrainSettings | PreviewSettings, start: StartingModel, rows: Dataset, row_kind: RowKind
) -> tuple[Template | None, Path | None]:
    """The template that is named, or that the weights were trained with, or that fits the rows.

    The second is the template file of a merged model, if the rows lack its columns.
    """
    if settings.text_column:
        return documents.template_of(settings.text_column), None
    if settings.template is not None:
        return template.resolve(settings.template), None
    if start.adapter is not None:
        return saved_model.template_of(start.adapter, None), None
    sidecar = Path(start.base) / layout.TEMPLATE
    if sidecar.is_file() and not row_kind.lacking(rows.column_names, saved := saved_model.read_template(sidecar)):
        return saved, None
    return template.resolve(row_kind.choose_template(rows)), sidecar if sidecar.is_file() else None


def _turn_end_notes(tokenizer: Any, add_eos_token: bool) -> list[str]:
    """Notes about the token with which the chat template ends an answer."""
    end, eos = chat.turn_end(tokenizer), tokenizer.eos_token_id
    if eos is None:  # there is a note about that already
        return []
    if add_eos_token and chat.leaves_turns_open(tokenizer):
        return [f"it ends a turn with no token, so {tokenizer.eos_token} is added after the last answer"]
    if end in (None, eos):
        return []
    words = [tokenizer.convert_ids_to_tokens(token) for token in (end, eos)]
    return ["an answer ends with {}, not with {}, which generate, compare and merge take into account".format(*words)]


def schedule(settings: TrainSettings, count: int, rows: tokenized.Rows | None = None) -> loader.Schedule:
    """Return the steps of a run over `count` rows. rows: for their lengths, if there are any yet."""
    return loader.schedule(
        count,
        batch_size=settings.batch_size,
        num_epochs=settings.num_epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
        lengths=rows.lengths() if rows is not None and settings.group_by_length else None,
    )
