"""`byeori compare`: answer the same rows with base and tuned model, and report which answers better."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byeori.artifacts import layout
from byeori.commands import _comparison, _several, checks
from byeori.config import CompareSettings
from byeori.evaluate import baselines, gate, several
from byeori.support import console, journal, output_paths
from byeori.support.console import say
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
    """Answer the same rows with base and tuned model; writes report.html, rows.jsonl and metrics.json.

    Several adapters: each with base and with each other; their own reports are folders in that of the comparison.
    """
    output = Path(settings.output_dir)
    output_paths.check_result(output, layout.ROWS, settings.overwrite_output_dir)
    log.check_trackers(settings.report_to)
    conditions = gate.parse(settings.fail_unless, checks.measurable(settings), baselines.NAMES)
    if len(settings.adapter) > 1:
        metrics, verdict = _several.compare(settings)
    else:
        metrics, verdict = _one(settings, output)
    say(verdict)
    say(f"Report: {output / layout.REPORT}")
    gate.check(conditions, several.for_gate(metrics) if "runs" in metrics else metrics)
    return CompareResult(report=output / layout.REPORT, rows=output / layout.ROWS, metrics=metrics, verdict=verdict)


def _one(settings: CompareSettings, output: Path) -> tuple[dict[str, Any], str]:
    run = _comparison.prepare(settings)
    again = None if settings.overwrite_output_dir else "--overwrite_output_dir"
    unfinished = journal.unfinished(output / layout.ROWS, run.depends_on, overwrite=again)
    with output_paths.result(output), unfinished as kept:
        _comparison.say_begun("base and tuned", len(run.rows), kept)
        items, metrics = _comparison.measure(run, kept)
        return metrics, _comparison.write(run, output, items, metrics)
