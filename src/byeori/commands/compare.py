"""`byeori compare`: answer the same rows with base and tuned model, and report which answers better."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from byeori.artifacts import layout, saved_model
from byeori.artifacts.model_card import public_name
from byeori.artifacts.saved_model import SavedModel
from byeori.artifacts.starting_model import check_cutoff
from byeori.commands import _engine, _retention, _trained, checks
from byeori.commands._page import run_facts, settings_of_page, title_of
from byeori.commands._rows import with_template_columns
from byeori.commands.generate import load_and_note
from byeori.config import CompareSettings
from byeori.data import row_kinds
from byeori.data.tokenize import Encoding
from byeori.errors import CheckpointError
from byeori.evaluate import baselines, chart, gate, judge, measures, report
from byeori.evaluate import compare as comparison
from byeori.evaluate import verdict as evaluation
from byeori.evaluate.engines.base import check_prompts
from byeori.support import atomic_files, console, journal, output_paths
from byeori.support.cache_folder import cache_folder
from byeori.support.console import say
from byeori.support.language import tr, translated
from byeori.train import log


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareResult:
    """The files of a comparison, the content of its metrics.json, and the verdict as a sentence."""

    report: Path
    rows: Path
    metrics: dict[str, Any]
    verdict: str


@console.quiet_libraries()
def compare(settings: CompareSettings) -> CompareResult:
    """Answer the same rows with base and tuned model; writes report.html, rows.jsonl and metrics.json."""
    output = Path(settings.output_dir)
    output_paths.check_result(output, layout.ROWS, settings.overwrite_output_dir)
    own = measures.parse(settings.metric)
    conditions = gate.parse(settings.fail_unless, checks.measurable(settings), baselines.NAMES)
    saved, whole_base = _engine.compared(settings.adapter, settings.base_model)
    template = saved_model.template_of(saved, settings.template)
    table = load_and_note(settings, saved)
    row_kind = row_kinds.of_table(table.rows.column_names, template)
    table = with_template_columns(table, row_kind, template)
    if template:
        row_kind.check_columns(table.rows.column_names, template)
    encoding = saved_model.encoding(saved, template, cutoff_len=_cutoff_len(settings, saved))
    rows = comparison.comparable_rows(table, encoding, row_kind, settings.on_bad_rows)
    sampling = _engine.sampling_of(settings, saved)
    prompts, examples = comparison.examples_of(rows, encoding, row_kind)
    check_prompts(prompts, sampling)
    trained = _trained.rows_of(saved)
    shots = trained.shots(table, settings.few_shots, settings.seed) if trained else []
    shot_prompts = comparison.shot_prompts(rows, shots, encoding, row_kind, sampling)
    general = _retention.general_rows(settings.retention, saved, settings.on_bad_rows)
    every = [*examples, *general.examples]
    tokens = [prompts, [[[list(example.token_ids), example.targets] for example in pair] for pair in every]]
    tokens += [shot_prompts] if shot_prompts else []
    read = [*prompts, *shot_prompts, *(example.token_ids for pair in every for example in pair)]
    suffix = template.suffix if template else ""
    open_engine = _engine.opener(settings, saved, encoding, read, suffix=suffix)
    if whole_base is not None:
        open_engine = _engine.both(open_engine, _engine.opener(settings, whole_base, encoding, read, suffix=suffix))
        tokens += _engine.files(whole_base)
    say(f"Comparing base and tuned on {len(rows)} rows")
    again = None if settings.overwrite_output_dir else "--overwrite_output_dir"
    depends_on = _engine.depends_on(settings, saved, sampling, tokens)
    unfinished = journal.unfinished(output / layout.ROWS, depends_on, overwrite=again)
    with output_paths.result(output), unfinished as kept:
        items = comparison.compare_rows(
            open_engine,
            rows,
            (prompts, examples, shot_prompts),
            encoding,
            row_kind,
            sampling,
            measures=own,
            named=table.name,
            journal=kept,
            progress=console.progress,
        )
        metrics = comparison.summarise(
            items,
            measures=own,
            judged=_judged(settings, items),
            trained_answers=trained.answers() if trained else (),
            trained_rows=_trained.indices(trained, table, rows),
        )
        metrics = general.measure(open_engine, kept, metrics)
        shown = replace(saved, base=whole_base.base) if whole_base else saved
        result = _write_results(settings, shown, encoding, items, metrics)
    gate.check(conditions, result.metrics)
    return result


def _judged(settings: CompareSettings, items: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Let the judge of the settings compare the answers; None without one."""
    if settings.judge is None or settings.judge_model is None:
        return None
    asked = judge.Judge(
        url=settings.judge,
        model=settings.judge_model,
        prompt=judge.read_prompt(settings.judge_prompt),
        cache=cache_folder() / "judge",
    )
    with console.progress(f"Asking {settings.judge_model}") as on_progress:
        return judge.judge_items(items, asked, on_progress)


def _cutoff_len(settings: CompareSettings, saved: SavedModel) -> int:
    """Return cutoff_len as given, or that of the run within the model's maximum length."""
    if "cutoff_len" in settings.model_fields_set:
        check_cutoff(settings.cutoff_len, saved.max_length, saved.base)
        return settings.cutoff_len
    return min(saved.settings.get("cutoff_len", settings.cutoff_len), saved.max_length or sys.maxsize)


def _write_results(
    settings: CompareSettings,
    saved: SavedModel,
    encoding: Encoding,
    items: list[dict[str, Any]],
    metrics: dict[str, Any],
) -> CompareResult:
    output = Path(settings.output_dir)
    verdict = evaluation.verdict(metrics)
    changed, defaults = settings_of_page(saved.settings)
    training = log.read(saved.folder)
    page = report.render_report(
        title=title_of(encoding.template, len(items)),
        rows=items,
        metrics=metrics,
        verdict=translated(verdict),
        settings=changed,
        defaults=defaults,
        prompt=encoding.template.text if encoding.template else str(encoding.tokenizer.chat_template),
        given=items[0]["given"],
        log=training,
        kept=chart.kept_step(training, saved.settings.get("keep", "auto")),
        facts={
            tr("Base model"): public_name(saved.base),
            tr("Adapter"): public_name(settings.adapter),
            tr("Rows"): ", ".join(public_name(path) for path in settings.data_path),
            tr("Date"): f"{datetime.now():%Y-%m-%d}",
        },
        run=run_facts(saved.folder, training),
    )
    text = json.dumps(metrics, ensure_ascii=False, indent=1)
    lines = "".join(map(comparison.row_line, items))
    with atomic_files.disk_errors(output), atomic_files.files_into(output) as new:
        for name, content in ((layout.REPORT, page), (layout.METRICS, text), (layout.ROWS, lines)):
            (new / name).write_text(content, encoding="utf-8")
    if Path(settings.adapter).is_dir():  # for the model card
        try:
            atomic_files.write(Path(settings.adapter) / layout.METRICS, text)
        except CheckpointError as error:
            say(f"The adapter's model card will not have these numbers: {error}")
    say(verdict)
    say(f"Report: {output / layout.REPORT}")
    return CompareResult(report=output / layout.REPORT, rows=output / layout.ROWS, metrics=metrics, verdict=verdict)
