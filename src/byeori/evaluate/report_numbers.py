"""The numbers of the report: the one that leads, the table of metrics, the baselines, and what is said about pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import correlation
from typing import Any

from byeori.evaluate import verdict
from byeori.evaluate.intervals import Interval
from byeori.evaluate.metrics import FEWEST_ROWS, PAIR_METRICS, difference_of, interval_sign
from byeori.support.language import counted, later, tr, translated
from byeori.support.pages import finite, number

# name: (heading, description, decimals, 1 if higher is better / -1 if lower is better / 0 if neither)
_METRICS: dict[str, tuple[str, str, int, int]] = {
    "preference_accuracy": (later("Preference"), later("pairs in which the chosen answer is more likely, %"), 1, 1),
    "preference_margin": (later("Margin"), later("of the chosen over the rejected answer, nats"), 1, 1),
    "chrf": (later("chrF"), later("characters shared with the reference, 0 to 100"), 1, 1),
    "rouge_l": (later("ROUGE-L"), later("words shared in the same order, 0 to 100"), 1, 1),
    "rouge_l_chars": (later("ROUGE-L, characters"), later("characters shared in the same order, 0 to 100"), 1, 1),
    "exact": (later("Exact match"), later("answers equal to the reference, %"), 1, 1),
    "stopped": (later("Finished"), later("answers that the model ended itself, %"), 1, 1),
    "length": (later("Length"), later("characters per answer"), 1, 0),
    "words": (later("Words"), later("words per answer"), 1, 0),
    "loss": (later("Loss"), later("of the reference, nats per token; lower is better"), 3, -1),
}


def lead_of(metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return heading and name of the metric by which a row is better or worse.

    The margin of pairs, else the first measure of the user's own that single rows have, else chrF.
    """
    if difference_of(metrics, "preference_margin") is not None:
        return tr("margin"), "preference_margin"
    heading, name = verdict.primary(metrics)
    return (heading, name) if all(name in (row.get("tuned") or {}) for row in rows) else verdict.CHRF


def hero(metrics: Mapping[str, Any], counts: Mapping[str, int], *, pairs: bool) -> dict[str, str]:
    """Return the number that leads the page, with its interval, and in how many rows the tuned model is better."""
    heading, name = (tr("points of preference accuracy"), "preference_accuracy") if pairs else verdict.primary(metrics)
    interval, rows = difference_of(metrics, name), sum(counts.values())
    better = tr("{better} of {rows} better", better=counts["rose"], rows=rows_counted(rows))
    if interval is None:
        return {"figure": number(None, 1), "unit": "", "range": "", "better": better, "tone": ""}
    bounds = ""
    if int(metrics.get("rows") or 0) >= FEWEST_ROWS:
        low, high = (number(value, 1, signed=True) for value in (interval.low, interval.high))
        bounds = tr("95% interval {low} to {high}", low=low, high=high)
    sign = interval_sign(interval) if bounds else 0
    undermined = any(finding.get("undermines") for finding in metrics.get("findings") or ())
    tone = "" if undermined and sign > 0 else ("", "up", "down")[sign]
    figure = number(interval.mean, 1, signed=True)
    if pairs:
        figures = (number(metrics[side][name], 0) for side in ("base", "tuned"))
        better = tr(
            "chosen answer preferred in {before}% before, {after}% now", before=next(figures), after=next(figures)
        )
        better += "; " + tr("margin larger in {better} of {rows} pairs", better=counts["rose"], rows=rows)
    return {"figure": figure, "unit": heading, "range": bounds, "better": better, "tone": tone}


def metric_rows(metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of the metric table: formatted numbers, the interval's bar, and the change in a word."""
    lengths = [len(str(item["reference"]).strip()) for item in rows]
    count = int(finite(metrics.get("rows")) or 0)
    base, tuned = (metrics.get(side) or {} for side in ("base", "tuned"))
    measured = metrics.get("difference") or {}
    lines = []
    own = {name: (it["heading"], it["about"], it["digits"], 1) for name, it in (metrics.get("measures") or {}).items()}
    for name, (heading, note, digits, better) in (own | _METRICS).items():
        if name in PAIR_METRICS and name not in measured:
            continue
        interval = difference_of(metrics, name)
        word, tone = _change(interval, better, count)
        shown = interval if count > 1 else None  # the interval of one row is a point, which would look like certainty
        bounds = [number(value, digits, signed=True) for value in (shown.low, shown.high)] if shown else []
        about = translated(note)
        if name == "loss" and PAIR_METRICS[0] in measured:
            about = tr("of the chosen answer, nats per token; lower is better")
        if name == "length" and lengths:
            about += "; " + tr("reference {mean}", mean=f"{sum(lengths) / len(lengths):.1f}")
        lines.append(
            {
                "heading": translated(heading),
                "note": about,
                "base": number(base.get(name), digits),
                "tuned": number(tuned.get(name), digits),
                "difference": number(interval and interval.mean, digits, signed=True),
                "interval": tr("{low} to {high}", low=bounds[0], high=bounds[1]) if bounds else "",
                "word": word,
                "tone": tone,
                "bar": shown and _bar(shown),
            }
        )
    return lines


def baseline_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return what needs no training, its chrF, and the lead of the tuned model over it with the interval."""
    lines = []
    for item in metrics.get("baselines") or ():
        lead = (item.get("lead") or {}).get("chrf") or {}
        low, mean, high = (number(lead.get(name), 1, signed=True) for name in ("low", "mean", "high"))
        lines.append(
            (
                translated(item["about"]),
                number(item["scores"].get("chrf"), 1),
                tr("{mean} ({low} to {high})", mean=mean, low=low, high=high),
            )
        )
    return lines


def rows_of(metrics: Mapping[str, Any], *names: str) -> list[int]:
    """Return the rows, counted from 0, that findings of these names are about."""
    return [row for finding in metrics.get("findings") or () if finding["name"] in names for row in finding["rows"]]


def _change(interval: Interval | None, better: int, rows: int) -> tuple[str, str]:
    """Return the change in a word and the tone of its colour ("up", "down", ""); claims only what the interval does."""
    if interval is None:
        return tr("not measured"), ""
    if interval.low == interval.high == 0:
        return tr("the same"), ""
    if rows < FEWEST_ROWS:
        return tr("too few rows"), ""
    sign = interval_sign(interval)
    if sign == 0:
        return tr("unclear"), ""
    if better == 0:
        return (tr("longer") if sign > 0 else tr("shorter")), ""
    return (tr("better"), "up") if sign == better else (tr("worse"), "down")


def _bar(interval: Interval) -> dict[str, float]:
    """Return where the interval is drawn in a box 200 wide with zero at 100; each metric has its own scale."""
    reach = max(abs(interval.low), abs(interval.high)) or 1.0
    return {name: round(100 + 90 * value / reach, 1) for name, value in interval._asdict().items()}


# ---- pairs -----------------------------------------------------------------------------------------------------


def length_bias(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return sentences on whether training simply prefers the longer answer of a pair.

    Training rewards an answer by how much more likely it became. A pair's reward margin is that of its chosen over its
    rejected answer, so it is the tuned model's margin minus the base's; it is held against the difference in length.
    """
    pairs = []
    for item in rows:
        base, tuned = (finite((item.get(side) or {}).get("preference_margin")) for side in ("base", "tuned"))
        longer = len(str(item["reference"])) - len(str(item.get("rejected") or ""))
        if base is not None and tuned is not None and item.get("rejected") is not None and longer:
            pairs.append((longer, tuned - base))
    if len(pairs) < FEWEST_ROWS:
        return []
    chosen = sum(longer > 0 for longer, _ in pairs)
    preferred = sum((longer > 0) == (reward > 0) for longer, reward in pairs)
    said = tr(
        "Training favoured the longer answer in {preferred} of {count} pairs; it is the chosen one in {chosen}.",
        preferred=preferred,
        count=len(pairs),
        chosen=chosen,
    )
    lengths, rewards = zip(*pairs, strict=True)
    if len(set(lengths)) == 1 or len(set(rewards)) == 1:
        return [said]
    related = correlation(lengths, rewards)
    strong = abs(related) >= 0.5
    kind = (
        tr("a strong length bias")
        if strong and preferred > chosen
        else tr("length explains part of it")
        if strong
        else tr("no strong length bias")
    )
    return [
        said,
        tr("Correlation of reward margin and length difference: {value} ({kind}).", value=f"{related:.2f}", kind=kind),
    ]


def kl_said(log: Sequence[Mapping[str, Any]]) -> str:
    """Return the last KL to the reference model that a run logged, in a sentence; "" if it logged none."""
    for key, where in (("eval_kl", tr("held-out rows")), ("kl", tr("training rows"))):
        values = [(line["step"], value) for line in log if (value := finite(line.get(key))) is not None]
        if values:
            step, value = values[-1]
            return tr(
                "KL to the reference model: {value} nats per token on {where}, at step {step}.",
                value=f"{value:.3f}",
                where=where,
                step=step,
            )
    return ""


def rows_counted(count: int) -> str:
    """Return "44 rows" in the language of the page."""
    return counted(count, "1 row", "{count:,} rows")
