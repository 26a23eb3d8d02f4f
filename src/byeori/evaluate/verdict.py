"""The conclusion that the numbers of a comparison support, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from byeori.evaluate.intervals import Interval
from byeori.evaluate.metrics import FEWEST_ROWS, difference_of, interval_sign

SMALL_SAMPLE = 20
"""With fewer rows the verdict says that the interval is rough."""


CHRF = ("chrF", "chrf")


def primary(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """Return heading and name of the measure of answers that decides: the first of one's own, else chrF."""
    own = metrics.get("measures") or {}
    return next(((about["heading"], name) for name, about in own.items()), CHRF)


def verdict(metrics: Mapping[str, Any]) -> str:
    """Return the conclusion that the numbers of `summarise` and the findings beside them support.

    "Closer" and "further" need a 95% interval of chrF that excludes zero, "better" and "worse" one of the first measure
    of the user's own; the loss is mentioned if its own interval does. Of pairs the preference is said first. A gain
    that a finding undermines is not called closer. With fewer than SMALL_SAMPLE rows a caveat follows, with fewer than
    FEWEST_ROWS nothing is claimed.

    metrics: with `findings` (findings.find), if there are any.
    """
    findings = metrics.get("findings") or ()
    undermined = any(finding["undermines"] for finding in findings)
    return " ".join([_head(metrics, undermined), *(finding["sentence"] for finding in findings)])


def _head(metrics: Mapping[str, Any], undermined: bool) -> str:
    rows = int(metrics.get("rows") or 0)
    over = "over 1 row" if rows == 1 else f"over {rows:,} rows"
    heading, name = primary(metrics)
    change = difference_of(metrics, name)
    if rows == 0 or change is None:
        return f"There is nothing to compare: no row has a {heading} score from both models."
    if rows < FEWEST_ROWS:
        moved = f"{heading} went from {metrics['base'][name]:.1f} to {metrics['tuned'][name]:.1f}"
        return f"Too few rows to tell: {moved} {over}, which may be chance. Compare at least {SMALL_SAMPLE} rows."
    pairs = difference_of(metrics, "preference_accuracy")
    parts = [_preference(metrics, pairs, over)] if pairs else []
    if pairs and interval_sign(pairs) > 0 and undermined:
        parts.append("More answers are preferred as they should be, but that is no proof that the task was learned")
    direction = interval_sign(change)
    if direction == 0:
        said = (
            f"No clear difference in {heading}: {_signed(change.mean)} {over}, "
            f"and the 95% interval ({_signed(change.low)} to {_signed(change.high)}) includes zero"
        )
    else:
        words = ("closer to the references", "further from the references") if name == "chrf" else ("better", "worse")
        start = f"{'Its answers are' if pairs else 'The tuned model is'} {words[direction < 0]}:"
        if direction > 0 and undermined:
            start = "A higher score, but no proof that the task was learned:"
        said = f"{start} {heading} {_moved(change, 1)} {over}"
    likelihood = difference_of(metrics, "loss")
    if likelihood is not None and (sign := interval_sign(likelihood)):
        # a falling loss agrees with a rising chrF; anything else is a contrast
        link = ", and" if sign == -direction else ", but"
        said += f"{link} the loss on the references {_moved(likelihood, 3)}"
    parts.append(said)
    if rows < SMALL_SAMPLE:
        parts.append(f"With fewer than {SMALL_SAMPLE} rows the interval is rough; treat this as a hint")
    return ". ".join(parts) + "."


def _preference(metrics: Mapping[str, Any], accuracy: Interval, over: str) -> str:
    """Return a sentence on pairs: the shares of the chosen answers, and a change of them that its interval supports."""
    before, after = (metrics[side]["preference_accuracy"] for side in ("base", "tuned"))
    words = f"The tuned model prefers the chosen answer in {after:.0f}% of the pairs (the base in {before:.0f}%)"
    sign = interval_sign(accuracy)
    change = f"{'more' if sign > 0 else 'less'} often than the base" if sign else "no clear difference"
    words += f" {over}: {change}, {_signed(accuracy.mean)} points (95% interval {_signed(accuracy.low)} to "
    words += f"{_signed(accuracy.high)})"
    margin = difference_of(metrics, "preference_margin")
    if margin and interval_sign(margin):
        return f"{words}; the margin between chosen and rejected {_moved(margin, 1)} nats"
    return f"{words}; the margin between chosen and rejected did not clearly change"


def retention_sentence(retention: Mapping[str, Any]) -> str:
    """Return what general rows say about forgetting. retention: of compare.losses_of."""
    rows, change = int(retention["rows"]), difference_of(retention, "loss")
    over = f"On {rows:,} general row{'' if rows == 1 else 's'}"
    if change is None or rows < FEWEST_ROWS:
        return f"{over} nothing can be said about forgetting; give at least {SMALL_SAMPLE}."
    sign = interval_sign(change)
    if sign == 0:
        return f"{over} the loss did not clearly change (95% interval {change.low:+.3f} to {change.high:+.3f})."
    forgot = ": the tuned model forgot some of what the base knew" if sign > 0 else ""
    return f"{over} the loss {_moved(change, 3)}{forgot}."


def _moved(interval: Interval, digits: int) -> str:
    """Return "rose by 12.3 (95% interval 9.1 to 15.4)"; a fall is given in positive numbers, smaller bound first."""
    if interval.mean >= 0:
        verb, low, high = "rose", interval.low, interval.high
    else:
        verb, low, high = "fell", -interval.high, -interval.low
    while digits < 6 and round(low, digits) == 0:  # an interval that excludes zero must not read 0.0
        digits += 1
    return f"{verb} by {abs(interval.mean):.{digits}f} (95% interval {low:.{digits}f} to {high:.{digits}f})"


def _signed(value: float) -> str:
    return f"{value + 0.0:+.1f}" if round(value, 1) else "0.0"
