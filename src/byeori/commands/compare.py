"""`byeori compare`: base and tuned answer the same rows, and a report shows who answers better."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byeori.artifacts import layout, saved_model
from byeori.artifacts.starting_model import check_cutoff
from byeori.commands.generate import load_and_note, sampling_of
from byeori.config import CompareSettings
from byeori.data import row_kinds, sources
from byeori.data.sources import ROW, Table
from byeori.data.tokenize import Encoding
from byeori.distributed.processes import init_processes
from byeori.errors import ByeoriError, CheckpointError, ModelError
from byeori.evaluate import compare as comparison
from byeori.evaluate import metrics as scores
from byeori.evaluate import report
from byeori.support import atomic_files, console, output_paths
from byeori.support.console import say
from byeori.train import log


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareResult:
    """The files of a comparison, its metrics.json as a dict, and the verdict in words."""

    report: Path
    rows: Path
    metrics: dict[str, Any]
    verdict: str


@console.quiet_libraries()
def compare(settings: CompareSettings) -> CompareResult:
    """Base and tuned answer the same rows; writes report.html, rows.jsonl and metrics.json."""
    output = Path(settings.output_dir)
    output_paths.check_result(output, layout.ROWS, settings.overwrite_output_dir)
    table = load_and_note(settings)
    found = saved_model.find(settings.adapter, settings.base_model)
    if not found.is_adapter:
        raise ModelError(f"{settings.adapter} is not an adapter; compare takes the folder that `byeori sft` wrote")
    chosen = saved_model.template_of(found, settings.template)
    row_kind = row_kinds.of_table(table.rows.column_names, chosen)
    if chosen:
        row_kind.check_columns(table.rows.column_names, chosen)
    how = saved_model.encoding(found, chosen, cutoff_len=_compare_cutoff(settings, found))
    rows = comparison.comparable_rows(table, how, row_kind, settings.on_bad_rows)
    model = saved_model.load_weights(found, settings.dtype, init_processes().device)
    say(f"Comparing base and tuned on {len(rows)} rows")
    output_paths.make_result(output, [layout.ROWS, layout.METRICS, layout.REPORT])
    with console.progress("Answering") as on_progress:
        items = comparison.compare_rows(
            model,
            rows,
            how,
            row_kind,
            sampling_of(settings),
            batch_size=settings.generation_batch_size,
            rows_file=output / layout.ROWS,
            max_length=found.max_length,
            on_progress=on_progress,
        )
    seen = trained_on(found, table)
    known = 0 if seen is None else int(seen[[row[ROW] for row in rows]].sum())
    return _write_comparison(settings, found, how, items, known)


def trained_on(found: saved_model.SavedModel, table: Table) -> np.ndarray | None:
    """Which rows of a table an adapter's run has trained [rows], by what they hold in the columns that it read.

    None where its tables are not here (any more), or cannot be split as they were then.
    """
    run = found.settings
    paths = run.get("data_path") or []
    if not sources.are_local(paths):
        return None
    try:
        chosen = saved_model.template_of(found, None)
        there = sources.load_rows(paths, split=run["dataset_split"], max_rows=run["max_rows"])
        read = row_kinds.recorded(run).columns_read(there.rows.column_names, chosen)
        seen, _ = sources.split_rows(there.rows, run["val_set_size"], run["seed"], read)
    except (ByeoriError, KeyError):
        return None
    common = [name for name in read if name in table.rows.column_names]
    return np.isin(sources.hashes(table.rows, common), sources.hashes(seen, common)) if common else None


def _compare_cutoff(settings: CompareSettings, found: saved_model.SavedModel) -> int:
    """cutoff_len as given, else the one of the run, within the model's positions."""
    if "cutoff_len" in settings.model_fields_set:
        check_cutoff(settings.cutoff_len, found.max_length, found.base)
        return settings.cutoff_len
    return min(found.settings.get("cutoff_len", settings.cutoff_len), found.max_length or sys.maxsize)


def _write_comparison(
    settings: CompareSettings, found: saved_model.SavedModel, how: Encoding, items: list[dict[str, Any]], known: int
) -> CompareResult:
    """known: how many of the rows the adapter was trained on."""
    output = Path(settings.output_dir)
    metrics = comparison.summarise(items, resamples=settings.bootstrap, seed=settings.seed)
    words = scores.verdict(metrics) + scores.caution(known, len(items))
    page = report.render_report(
        title=f"{Path(settings.adapter).name}: base and tuned side by side",
        rows=items,
        metrics=metrics,
        verdict=words,
        settings=found.settings,
        prompt=how.template.text if how.template else str(how.tokenizer.chat_template),
        given=items[0]["given"],
        log=log.read(found.folder),
        models={"Base": found.base, "Tuned": settings.adapter, "Rows": ", ".join(settings.data_path)},
    )
    atomic_files.write(output / layout.REPORT, page)
    text = json.dumps(metrics, ensure_ascii=False, indent=1)
    atomic_files.write(output / layout.METRICS, text)
    if Path(settings.adapter).is_dir():  # for the model card
        try:
            atomic_files.write(Path(settings.adapter) / layout.METRICS, text)
        except CheckpointError as error:
            say(f"The adapter's model card will not have these numbers: {error}")
    say(words)
    say(f"Report: {output / 'report.html'}")
    return CompareResult(report=output / layout.REPORT, rows=output / layout.ROWS, metrics=metrics, verdict=words)
