"""The conclusion that the numbers of a comparison support, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from byeori.evaluate.metrics import FEWEST_ROWS, Interval, difference_of, interval_sign

SMALL_SAMPLE = 20
"""With fewer rows the verdict says that the interval is rough."""


def verdict(metrics: Mapping[str, Any]) -> str:
    """Return the conclusion that the numbers of `summarise` and the findings beside them support.

    "Closer" and "further" need a 95% interval of chrF that excludes zero; the loss is mentioned if its own interval
    does. A gain that a finding undermines is not called closer. With fewer than SMALL_SAMPLE rows a caveat follows,
    with fewer than FEWEST_ROWS nothing is claimed.

    metrics: with `findings` (findings.find), if there are any.
    """
    findings = metrics.get("findings") or ()
    undermined = any(finding["undermines"] for finding in findings)
    return " ".join([_head(metrics, undermined), *(finding["sentence"] for finding in findings)])


def _head(metrics: Mapping[str, Any], undermined: bool) -> str:
    rows = int(metrics.get("rows") or 0)
    over = "over 1 row" if rows == 1 else f"over {rows:,} rows"
    closeness = difference_of(metrics, "chrf")
    if rows == 0 or closeness is None:
        return "There is nothing to compare: no row has a chrF score from both models."
    if rows < FEWEST_ROWS:
        moved = f"chrF went from {metrics['base']['chrf']:.1f} to {metrics['tuned']['chrf']:.1f}"
        return f"Too few rows to tell: {moved} {over}, which may be chance. Compare at least {SMALL_SAMPLE} rows."
    direction = interval_sign(closeness)
    if direction == 0:
        words = (
            f"No clear difference in chrF: {_signed(closeness.mean)} {over}, "
            f"and the 95% interval ({_signed(closeness.low)} to {_signed(closeness.high)}) includes zero"
        )
    else:
        start = f"The tuned model is {'closer to' if direction > 0 else 'further from'} the references:"
        if direction > 0 and undermined:
            start = "A higher score, but no proof that the task was learned:"
        words = f"{start} chrF {_moved(closeness, 1)} {over}"
    likelihood = difference_of(metrics, "loss")
    if likelihood is not None and (sign := interval_sign(likelihood)):
        # a falling loss agrees with a rising chrF; anything else is a contrast
        link = ", and" if sign == -direction else ", but"
        words += f"{link} the loss on the references {_moved(likelihood, 3)}"
    words += _preference(metrics)
    if rows < SMALL_SAMPLE:
        words += f". With fewer than {SMALL_SAMPLE} rows the interval is rough; treat this as a hint"
    return words + "."


def _preference(metrics: Mapping[str, Any]) -> str:
    """Return a sentence on pairs, if measured: the shares, and a change of the margin if its interval supports it."""
    margin = difference_of(metrics, "preference_margin")
    if margin is None:
        return ""
    before, after = (metrics[side]["preference_accuracy"] for side in ("base", "tuned"))
    words = f". It prefers the chosen answer in {after:.0f}% of the pairs (the base in {before:.0f}%)"
    if interval_sign(margin):
        return f"{words}; the margin between chosen and rejected {_moved(margin, 1)} nats"
    return f"{words}; the margin between chosen and rejected did not clearly change"


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
