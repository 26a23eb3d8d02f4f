"""The report of a comparison as one HTML page: what leads, what was won and lost, the metrics, the curve, every answer.

metrics, rows, log, settings ── plain records of text and coordinates ── report.html.j2 ──> one HTML string
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from byeori.evaluate import report_numbers, report_rows
from byeori.evaluate.chart import fit_in_words, histogram, loss_chart
from byeori.evaluate.report_rows import Segments
from byeori.support import pages
from byeori.support.language import tr


def render_report(
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    verdict: str,
    settings: Mapping[str, object],
    defaults: Mapping[str, object] | None = None,
    prompt: str,
    given: Segments,
    log: Sequence[Mapping[str, Any]],
    kept: int | None = None,
    facts: Mapping[str, object] | None = None,
    run: Mapping[str, tuple[str, str]] | None = None,
) -> str:
    """Return the report as one HTML string, to be written as UTF-8. Values that are None or NaN are shown as a dash.

    rows: each {"row": {column: value}, "prompt", "reference", "base_output", "tuned_output", "base": {metric: value},
    "tuned": {metric: value}}, of pairs also "rejected". metrics: from metrics.summarise. settings: those that are not
    at their default, which `defaults` has. prompt: the template, whose last `{column}` is the trained answer. given:
    the first row's prompt as the models read it, with special tokens flagged. log: lines of train_log.jsonl, {"step",
    "loss", ...} and {"step", "eval_loss"}; may be empty. kept: the step of the adapter. facts: what stands under the
    title. run: what training took, each with what is said beside it in
    small letters.
    """
    shown, answer = template_columns(prompt)
    metric, lead = report_numbers.lead_of(metrics, rows)
    pairs, counts = lead == "preference_margin", report_rows.tally(rows, lead)
    cards = report_rows.cards(rows, shown, lead, report_numbers.rows_of(metrics, "trained_on", "near_copies"))
    (wins, losses), passed = report_rows.best_and_worst(cards), filters(cards)
    return pages.render(
        "evaluate/report.html.j2",
        script="evaluate/report.js",
        title=title,
        facts=facts or {},
        verdict=verdict,
        hero=report_numbers.hero(metrics, counts, pairs=pairs),
        metric=metric,
        pairs=pairs,
        tally=counts,
        bars=report_rows.bars(cards),
        cards=cards,
        wins=wins,
        losses=losses,
        filters=passed,
        labels={name: label for name, label, _ in passed},
        metrics=report_numbers.metric_rows(metrics, rows),
        baselines=report_numbers.baseline_rows(metrics),
        row_count=report_numbers.rows_counted(len(rows)),
        **_histograms(rows, pairs=pairs),
        said_of_pairs=[*report_numbers.length_bias(rows), report_numbers.kl_said(log)] if pairs else [],
        chart=loss_chart(log, kept),
        fit=fit_in_words(log, kept),
        run=run or {},
        settings=settings,
        defaults=defaults or {},
        prompt=prompt_pieces(prompt),
        given=given,
        answer=answer,
    )


def filters(cards: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, int]]:
    """Return the filters of the rows as (name, label, rows); those that no row passes are left out."""
    labels = {
        "better": tr("better"),
        "worse": tr("worse"),
        "same": tr("the same"),
        "unfinished": tr("unfinished"),
        "copied": tr("copied from the input"),
        "repeated": tr("repeats itself"),
        "leaked": tr("leaked from training"),
    }
    counts = {name: sum(name == card["kind"] or name in card["flags"] for card in cards) for name in labels}
    return [(name, label, counts[name]) for name, label in labels.items() if counts[name]]


def _histograms(rows: Sequence[Mapping[str, Any]], *, pairs: bool) -> dict[str, Any]:
    texts = {"of-reference": "reference", "of-base": "base_output", "of-tuned": "tuned_output"}
    lengths = histogram({line: [len(str(item[key]).strip()) for item in rows] for line, key in texts.items()})
    sides = {"of-base": "base", "of-tuned": "tuned"}
    margins = {line: [(item.get(side) or {}).get("preference_margin") for item in rows] for line, side in sides.items()}
    return {"lengths": lengths, "margins": histogram(margins, zero=True) if pairs else None}


# ---- the prompt ------------------------------------------------------------------------------------------------

# As in the template language: {{ and }} are literal braces, {column} is a column.
_COLUMN = re.compile(r"\{\{|\}\}|\{([^{}\n]+)\}")


def template_columns(prompt: str) -> tuple[list[str], str]:
    """Return the columns of the prompt in order, and the answer's column ("" if the prompt names none)."""
    names = [match[1] for match in _columns(prompt)]
    if not names:
        return [], ""
    return [name for name in dict.fromkeys(names) if name != names[-1]], names[-1]


def prompt_pieces(prompt: str) -> list[tuple[str, bool]]:
    """Return the prompt split around its last `{column}`, which is flagged: the answer, the only trained part."""
    columns = _columns(prompt)
    if not columns:
        return [(prompt, False)]
    start, end = columns[-1].span()
    return [(prompt[:start], False), (prompt[start:end], True), (prompt[end:], False)]


def _columns(prompt: str) -> list[re.Match[str]]:
    """Return every `{column}`; none for a tokenizer's chat template, whose braces are jinja's."""
    if "{%" in prompt:
        return []
    return [match for match in _COLUMN.finditer(prompt) if match[1]]
