"""`byeori audit`: what a trained adapter and the texts themselves say about the rows that it was trained on."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from byeori.artifacts import layout, saved_model
from byeori.artifacts.saved_model import SavedModel
from byeori.commands import _engine, _trained
from byeori.commands._rows import load_table, with_template_columns
from byeori.config import AuditSettings
from byeori.data import row_kinds, sources
from byeori.data.row_kinds import RowKind
from byeori.data.sources import ROW, Table
from byeori.data.template import Template
from byeori.data.tokenize import Encoding, Example
from byeori.errors import DataError
from byeori.evaluate import compare as comparison
from byeori.evaluate import generate, row_audit
from byeori.support import atomic_files, console, journal, output_paths
from byeori.support.console import say


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditResult:
    """The files of an audit, and the content of its audit.json."""

    file: Path
    rows: Path
    found: dict[str, Any]


@console.quiet_libraries()
def audit(settings: AuditSettings) -> AuditResult:
    """Audit rows by the losses of base and tuned model and by their near copies; writes audit.json and rows.jsonl."""
    output = Path(settings.output_dir)
    output_paths.check_result(output, layout.ROWS, settings.overwrite_output_dir)
    saved, whole_base = _engine.compared(settings.adapter, settings.base_model)
    table, row_kind, template = _audited(settings, saved)
    cutoff = min(saved.settings.get("cutoff_len", sys.maxsize), saved.max_length or sys.maxsize)
    encoding = saved_model.encoding(saved, template, cutoff_len=cutoff)
    rows, examples, texts = _texts(table, encoding, row_kind)
    test = None
    if settings.test:
        others = sources.load_rows(settings.test, columns=saved.settings.get("columns"), inherited=True)
        _, _, test = _texts(_fitting(others, row_kind, template), encoding, row_kind)
    every = [example for pair in examples for example in pair]
    read = [example.token_ids for example in every]
    open_engine = _engine.losses_opener(saved, settings.dtype, encoding, read)
    depends_on = [_engine.files(saved), settings.dtype, [[list(item.token_ids), item.targets] for item in every]]
    if whole_base is not None:
        base_opener = _engine.losses_opener(whole_base, settings.dtype, encoding, read)
        open_engine = _engine.both(open_engine, base_opener)
        depends_on += _engine.files(whole_base)
    again = None if settings.overwrite_output_dir else "--overwrite_output_dir"
    unfinished = journal.unfinished(output / layout.ROWS, depends_on, overwrite=again)
    with output_paths.result(output), unfinished as kept:
        losses = comparison.row_losses(open_engine, examples, texts.names, kept, console.progress)
        base, tuned = losses["base"], losses["tuned"]
        found = row_audit.audit(texts, base, tuned, test, console.progress)
        columns = [{name: value for name, value in row.items() if not name.startswith("__")} for row in rows]
        lines = row_audit.lines(found, texts, columns, base, tuned)
        contents = {
            layout.AUDIT: json.dumps(found, ensure_ascii=False, indent=1),
            layout.ROWS: "".join(map(generate.json_line, lines)),
        }
        with atomic_files.disk_errors(output), atomic_files.files_into(output) as new:
            for name, content in contents.items():
                (new / name).write_text(content, encoding="utf-8")
    for sentence in row_audit.sentences(found):
        say(sentence)
    say(f"Audit: {output / layout.AUDIT}, {output / layout.ROWS}")
    return AuditResult(file=output / layout.AUDIT, rows=output / layout.ROWS, found=found)


def _audited(settings: AuditSettings, saved: SavedModel) -> tuple[Table, RowKind, Template | None]:
    """Return the rows to audit, and how they are read: those of data_path, or those that the run trained.

    Raises:
        DataError: if they are not here, or have no answers.
    """
    if settings.data_path:
        template = saved_model.template_of(saved, settings.template)
        table = load_table(settings, saved.settings.get("columns"))
        row_kind = row_kinds.of_table(table.rows.column_names, template)
        return _fitting(table, row_kind, template), row_kind, template
    trained = _trained.rows_of(saved)
    if trained is None:
        raise DataError(
            f"the rows that {settings.adapter} was trained on are not here, or it does not record them; name them with "
            "--data_path"
        )
    if trained.row_kind is row_kinds.DOCUMENT:
        raise DataError(
            f"{settings.adapter} was trained on whole texts, which have no answers to audit; give rows with --data_path"
        )
    rows = trained.rows.select(range(min(len(trained.rows), settings.max_rows or sys.maxsize)))
    return replace(trained.table, rows=rows), trained.row_kind, trained.template


def _fitting(table: Table, row_kind: RowKind, template: Template | None) -> Table:
    for note in table.notes:
        say(note)
    table = with_template_columns(table, row_kind, template)
    if template:
        row_kind.check_columns(table.rows.column_names, template)
    return table


def _texts(
    table: Table, encoding: Encoding, row_kind: RowKind
) -> tuple[list[dict[str, Any]], list[list[Example]], row_audit.Texts]:
    """Return the rows with a prompt and an answer, their answers as examples, and their texts."""
    rows = comparison.comparable_rows(table, encoding, row_kind, "drop")
    items = [comparison.texts_of(row, row_kind.asked(row, encoding.template), encoding.template) for row in rows]
    texts = row_audit.Texts(
        names=[table.name(row[ROW]) for row in rows],
        # of a template the columns alone: its own text is the same in every row
        prompts=[comparison.input_of(item, encoding.template) for item in items],
        answers=[item["reference"] for item in items],
    )
    return rows, comparison.examples_of(rows, encoding, row_kind)[1], texts
