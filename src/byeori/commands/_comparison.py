"""What `compare` does for one adapter: read everything that can be wrong, compute, write. Several runs use it as well.

settings ── prepare ──> Prepared ── measure (journal) ──> items, metrics ── write ──> report.html, rows.jsonl, ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from byeori.artifacts import layout, saved_model
from byeori.artifacts.model_card import public_name
from byeori.artifacts.saved_model import SavedModel
from byeori.artifacts.starting_model import check_cutoff
from byeori.commands import _engine, _retention, _tracked, _trained
from byeori.commands._page import run_facts, settings_of_page, title_of
from byeori.commands._rows import with_template_columns
from byeori.commands._trained import Trained
from byeori.commands.generate import load_and_note
from byeori.config import CompareSettings
from byeori.data import row_kinds
from byeori.data.row_kinds import RowKind
from byeori.data.sources import Table
from byeori.data.tokenize import Encoding, Example
from byeori.errors import CheckpointError
from byeori.evaluate import chart, findings, judge, measures, report
from byeori.evaluate import compare as comparison
from byeori.evaluate import verdict as evaluation
from byeori.evaluate.engines.base import Sampling, check_prompts
from byeori.evaluate.generate import OpenEngine
from byeori.evaluate.report_numbers import rows_of
from byeori.support import atomic_files, console
from byeori.support.cache_folder import cache_folder
from byeori.support.console import say
from byeori.support.journal import Journal
from byeori.support.language import tr, translated
from byeori.train import log


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """An adapter and the rows that it is compared on: everything is checked, and no weights are loaded.

    whole_base: what a model that was trained in full began from. prompts, examples, shot_prompts: token ids of each
    row. depends_on: everything that the results depend on, as JSON data.
    """

    settings: CompareSettings
    saved: SavedModel
    whole_base: SavedModel | None
    encoding: Encoding
    row_kind: RowKind
    table: Table
    rows: list[dict[str, Any]]
    prompts: list[list[int]]
    examples: list[list[Example]]
    shot_prompts: list[list[int]]
    general: _retention.GeneralRows
    trained: Trained | None
    sampling: Sampling
    open_engine: OpenEngine
    depends_on: list[Any]

    @property
    def base(self) -> SavedModel:
        """The model under the adapter."""
        return self.whole_base or self.saved


def prepare(settings: CompareSettings, shared: _engine.SharedBase | None = None) -> Prepared:
    """Read the first adapter of the settings and the rows. shared: lets several adapters use one loaded base.

    Raises:
        ByeoriError: if anything is wrong that can be known before weights are loaded.
    """
    saved, whole_base = _engine.compared(settings.adapter[0], settings.base_model)
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
    shot_prompts = comparison.shot_prompts(rows, prompts, shots, encoding, row_kind, sampling)
    general = _retention.general_rows(settings.retention, saved, settings.on_bad_rows)
    every = [*examples, *general.examples]
    tokens = [prompts, token_ids(every)]
    tokens += [shot_prompts] if shot_prompts else []
    read = [*prompts, *shot_prompts, *(example.token_ids for pair in every for example in pair)]
    suffix = template.suffix if template else ""
    open_engine = _engine.opener(settings, saved, encoding, read, suffix=suffix, shared=shared)
    if whole_base is not None:
        open_engine = _engine.both(open_engine, _engine.opener(settings, whole_base, encoding, read, suffix=suffix))
        tokens += _engine.files(whole_base)
    return Prepared(
        settings=settings,
        saved=saved,
        whole_base=whole_base,
        encoding=encoding,
        row_kind=row_kind,
        table=table,
        rows=rows,
        prompts=prompts,
        examples=examples,
        shot_prompts=shot_prompts,
        general=general,
        trained=trained,
        sampling=sampling,
        open_engine=open_engine,
        depends_on=_engine.depends_on(settings, saved, sampling, tokens),
    )


def token_ids(examples: list[list[Example]]) -> list[Any]:
    """Return the tokens and targets of examples as JSON data."""
    return [[[list(example.token_ids), example.targets] for example in pair] for pair in examples]


def say_begun(what: str, rows: int, kept: Journal) -> None:
    """Say what is compared, and whether an earlier, stopped comparison is continued."""
    say(f"Comparing {what} on {rows} rows")
    if kept.items:
        say("A part of this was computed before; continuing with the rest")


def measure(
    run: Prepared, kept: Journal, parts: Sequence[Mapping[str, Any]] = ()
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the items of a comparison and the content of its metrics.json. kept: keeps what is computed.

    parts: the numbers of the runs that this one combines.
    """
    own = measures.parse(run.settings.metric)
    items = comparison.compare_rows(
        run.open_engine,
        run.rows,
        (run.prompts, run.examples, run.shot_prompts),
        run.encoding,
        run.row_kind,
        run.sampling,
        measures=own,
        named=run.table.name,
        journal=kept,
        progress=console.progress,
    )
    near: list[int] = []
    if run.trained:
        with console.progress("Looking for near copies of training rows") as on_progress:
            near = run.trained.near(items, run.encoding.template, on_progress)
    with console.progress("Looking for rows that repeat each other") as on_progress:
        repeated = comparison.repeated_rows(items, on_progress)
    metrics = comparison.summarise(
        items,
        measures=own,
        judged=_judged(run.settings, items),
        trained_answers=run.trained.answers() if run.trained else (),
        trained_rows=_seen("trained_on", parts, _trained.indices(run.trained, run.table, run.rows)),
        near_rows=_seen("near_copies", parts, near),
        repeated=repeated,
    )
    if run.trained is None and not (parts and all(_known(part) for part in parts)):
        metrics["findings"].append(findings.training_unknown())
    return items, run.general.measure(run.open_engine, kept, metrics)


def _seen(finding: str, parts: Sequence[Mapping[str, Any]], own: list[int]) -> list[int]:
    """Return the rows that a run or one of its parts has seen in training."""
    return sorted({*own, *(row for part in parts for row in rows_of(part, finding))})


def _known(metrics: Mapping[str, Any]) -> bool:
    return not any(finding["name"] == "training_unknown" for finding in metrics["findings"])


def _judged(settings: CompareSettings, items: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Let the judge of the settings compare the answers; None without one."""
    if settings.judge is None or settings.judge_model is None:
        return None
    asked = judge.Judge(
        url=settings.judge,
        model=settings.judge_model,
        prompt=judge.read_prompt(settings.judge_prompt),
        cache=cache_folder() / "judge",
        price=(float(prices[0]), float(prices[2]))
        if (prices := (settings.judge_price or "").partition(","))[1]
        else None,
    )
    with console.progress(f"Asking {settings.judge_model}") as on_progress:
        return judge.judge_items(items, asked, on_progress)


def _cutoff_len(settings: CompareSettings, saved: SavedModel) -> int:
    """Return cutoff_len as given, or that of the run within the model's maximum length."""
    if "cutoff_len" in settings.model_fields_set:
        check_cutoff(settings.cutoff_len, saved.max_length, saved.base)
        return settings.cutoff_len
    return min(saved.settings.get("cutoff_len", settings.cutoff_len), saved.max_length or sys.maxsize)


def write(run: Prepared, output: Path, items: list[dict[str, Any]], metrics: dict[str, Any]) -> str:
    """Write the three files of a comparison into a folder, and its numbers for the model card; return the verdict."""
    settings, encoding = run.settings, run.encoding
    saved = replace(run.saved, base=run.whole_base.base) if run.whole_base else run.saved
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
            tr("Adapter"): public_name(saved.name),
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
    if Path(saved.name).is_dir():  # for the model card
        try:
            atomic_files.write(Path(saved.name) / layout.METRICS, text)
        except CheckpointError as error:
            say(f"The adapter's model card will not have these numbers: {error}")
    _tracked.report(settings.report_to, run.saved, metrics)
    return verdict
