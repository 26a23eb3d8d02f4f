"""`byeori compare run1 run2 ...`: every run on the same rows, against base and against each other.

adapters (+ their combination) ── prepare each ── same base? same rows, references? ── measure each, base once ──>
report/RUN/ (as of one comparison), and report/ with report.html, metrics.json and rows.jsonl over all of them
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from byeori.artifacts import combined, layout
from byeori.artifacts.model_card import public_name
from byeori.artifacts.saved_model import SavedModel
from byeori.commands import _comparison, _engine
from byeori.commands._comparison import Prepared
from byeori.config import CompareSettings
from byeori.data.sources import ROW
from byeori.distributed.processes import init_processes
from byeori.errors import ConfigError, DataError
from byeori.evaluate import baselines, measures, several
from byeori.evaluate import compare as comparison
from byeori.evaluate.report_numbers import rows_counted
from byeori.model import load
from byeori.model.fingerprint import base_fingerprint
from byeori.support import atomic_files, journal, output_paths
from byeori.support.console import say
from byeori.support.journal import Journal
from byeori.support.language import tr, translated


def compare(settings: CompareSettings) -> tuple[dict[str, Any], str]:
    """Compare several adapters; returns the content of metrics.json and the verdict.

    Raises:
        ConfigError, DataError: if they are not on one base, do not answer the same rows, or cannot be combined.
    """
    output, shared = Path(settings.output_dir), _engine.SharedBase()
    names = several.names(settings.adapter, settings.combine)
    runs = {name: _prepare(settings, adapter, shared) for name, adapter in zip(names, settings.adapter, strict=False)}
    _check_comparable(runs)
    with output_paths.result(output):
        if settings.combine:
            folder = output / f"{names[-1]}-adapter"
            _combine([run.saved for run in runs.values()], settings, folder)
            runs[names[-1]] = _prepare(settings, str(folder), shared)
        again = None if settings.overwrite_output_dir else "--overwrite_output_dir"
        depends_on = [run.depends_on for run in runs.values()]
        with journal.unfinished(output / layout.ROWS, depends_on, overwrite=again) as kept:
            rows = len(next(iter(runs.values())).rows)
            _comparison.say_begun(f"base and {len(runs)} runs", rows, kept)
            measured = _measure(runs, kept, names[-1] if settings.combine else None)
            result = _summary(runs, measured, settings)
            verdict = several.sentence(result)
            _write(settings, runs, measured, result, verdict)
    return result, verdict


def _prepare(settings: CompareSettings, adapter: str, shared: _engine.SharedBase) -> Prepared:
    changes = {"adapter": [adapter], "combine": None}
    return _comparison.prepare(settings.model_copy(update=changes), shared)


def _check_comparable(runs: dict[str, Prepared]) -> None:
    """Raise unless all runs have one base, and read the same answers from the same rows.

    Raises:
        ConfigError, DataError: if they do not.
    """
    (name, first), *others = runs.items()
    for other, run in others:
        folders = [load.local_folder(it.base.base, it.base.revision).resolve() for it in (first, run)]
        if folders[0] != folders[1] and base_fingerprint(folders[0]) != base_fingerprint(folders[1]):
            raise ConfigError(
                f"{name} was trained on {first.base.base} and {other} on {run.base.base}: runs are compared on one "
                "base; compare each of them alone"
            )
        if first.row_kind is not run.row_kind or [it[ROW] for it in first.rows] != [it[ROW] for it in run.rows]:
            raise DataError(
                f"{name} and {other} do not read the same rows, because their templates differ; give rows that both "
                "can read, or a --template for all runs"
            )
        for row, one, two in zip(first.rows, _references(first), _references(run), strict=True):
            if one != two:
                raise DataError(
                    f"{first.table.name(row[ROW])}: the templates of {name} and {other} read different answers; give a "
                    "--template for all runs, or compare each of them alone"
                )


def _references(run: Prepared) -> list[str]:
    template = run.encoding.template
    return [comparison.reference_of(run.row_kind.asked(row, template), template) for row in run.rows]


def _combine(runs: Sequence[SavedModel], settings: CompareSettings, folder: Path) -> None:
    """Write the combination of the adapters into a folder, as an adapter that every command can use."""
    assert settings.combine is not None
    combined.check(runs, settings.combine)
    device = init_processes().device
    dtype = load.resolve_dtype(settings.dtype, device)
    model = load.load_model(runs[0].base, dtype=dtype, device=device, revision=runs[0].revision)
    with atomic_files.disk_errors(folder), atomic_files.files_into(folder) as new:
        combined.write(model, runs, settings.combine, new)
    say(f"Combination of {len(runs)} adapters: {folder}")


def _measure(
    runs: dict[str, Prepared], kept: Journal, combination: str | None
) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Return items and numbers of every run. What the base answers to equal prompts is computed once.

    combination: the last run, if it is one of the others: it has seen what they have.
    """
    measured: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {}
    done = list[tuple[Prepared, Journal]]()
    for name, run in runs.items():
        say(f"{name}:")
        own = kept.part(f"{name} ")
        for other, journaled in done:
            shared = tuple(prefix for prefix, equal in _equal_questions(run, other) if equal)
            found = {key: item for key, item in journaled.items.items() if key.startswith(shared)}
            own.items |= found
        parts = [numbers for _, numbers in measured.values()] if name == combination else []
        measured[name] = _comparison.measure(run, own, parts)
        done.append((run, own))
    return measured


def _equal_questions(one: Prepared, two: Prepared) -> list[tuple[str, bool]]:
    """Return names that answers of the base begin with, and whether it reads and ends the same in both runs."""
    template = one.encoding.template == two.encoding.template
    tokens = _comparison.token_ids
    return [
        ("base ", template and one.prompts == two.prompts and tokens(one.examples) == tokens(two.examples)),
        (f"{baselines.FEW_SHOTS} ", template and one.shot_prompts == two.shot_prompts),
        ("retention base ", tokens(list(one.general.examples)) == tokens(list(two.general.examples))),
    ]


def _summary(
    runs: dict[str, Prepared],
    measured: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]],
    settings: CompareSettings,
) -> dict[str, Any]:
    """Return the content of metrics.json: `runs` as of comparisons of one, and `pairs` (see several.pairs_of)."""
    own = measures.parse(settings.metric)
    base, tuned = (
        {name: comparison.values_of(items, side, own) for name, (items, _) in measured.items()}
        for side in comparison.SIDES
    )
    numbers = {
        name: {"adapter": public_name(runs[name].saved.name), **of_run} for name, (_, of_run) in measured.items()
    }
    heading, measure = several.lead_of(next(iter(numbers.values())))
    pairs = several.pairs_of(base, tuned)
    correction = {"p_values": "Holm", "intervals": "Bonferroni", "comparisons": len(pairs), "level": several.LEVEL}
    rows = len(next(iter(runs.values())).rows)
    return {
        "rows": rows, "measure": measure, "heading": heading, "correction": correction, "runs": numbers, "pairs": pairs,
    }  # fmt: skip


def _write(
    settings: CompareSettings,
    runs: dict[str, Prepared],
    measured: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]],
    result: dict[str, Any],
    verdict: str,
) -> None:
    """Write the report of every run into its folder, and the page, numbers and rows over all of them."""
    output = Path(settings.output_dir)
    for name, (items, numbers) in measured.items():
        with output_paths.result(output / name):
            _comparison.write(runs[name], output / name, items, numbers)
    facts = {
        tr("Base model"): public_name(next(iter(runs.values())).base.base),
        tr("Rows"): ", ".join(public_name(path) for path in settings.data_path),
        tr("Date"): f"{datetime.now():%Y-%m-%d}",
    }
    page = several.page(result, said=translated(verdict), rows=rows_counted(result["rows"]), facts=facts)
    text = json.dumps(result, ensure_ascii=False, indent=1)
    every = zip(*(items for items, _ in measured.values()), strict=True)
    lines = "".join(comparison.row_line_of_runs(dict(zip(measured, row, strict=True))) for row in every)
    with atomic_files.disk_errors(output), atomic_files.files_into(output) as new:
        for name, content in ((layout.REPORT, page), (layout.METRICS, text), (layout.ROWS, lines)):
            (new / name).write_text(content, encoding="utf-8")
    for line in several.printed(result):
        say(line)
