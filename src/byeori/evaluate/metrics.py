"""Metrics of answers against references, and confidence intervals for the difference between two models.

    prediction, reference ── chrf, rouge_l, exact ──> one value per row and metric
    base rows, tuned rows ── summarise ──> means, and paired differences with 95% intervals (verdict.py: in sentences)

Every text is normalised to Unicode NFC first: decomposed Hangul (as in macOS file names) looks the same to a reader
and must score the same. Sources: chrF, Popović 2015; ROUGE-L, Lin 2004. Intervals: intervals.py.
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from byeori.evaluate.intervals import Interval, paired_interval

TEXT_METRICS = ("chrf", "rouge_l", "rouge_l_chars", "exact")
"""Those of ROW_METRICS that need an answer and its reference alone."""

ROW_METRICS = (*TEXT_METRICS, "length", "words", "stopped", "loss")

PAIR_METRICS = ("preference_accuracy", "preference_margin")
"""Additional metrics of rows with a chosen and a rejected answer."""

FEWEST_ROWS = 6
"""With fewer rows nothing is claimed: even if all five of five rows improve, a sign test gives p = 2 / 2**5 = 0.06,
while an interval for the mean may already exclude zero."""


def chrf(prediction: str, reference: str) -> float:
    """Return sentence chrF, 0 to 100: F-score (beta 2) over character 1- to 6-grams, ignoring spaces (Popović 2015).

    Computed by sacrebleu with its defaults, so comparable with published numbers. Two empty texts score 100.
    """
    prediction, reference = _normal(prediction), _normal(reference)
    if prediction == reference:
        return 100.0
    return float(_chrf_scorer().sentence_score(prediction, [reference]).score)


def rouge_l(prediction: str, reference: str) -> float:
    """Return the ROUGE-L F-measure, 0 to 100: F1 over the longest common subsequence of words (Lin 2004).

    Words are runs of letters and digits of any script, lowercased (the rouge-score package keeps only a-z0-9, which
    scores every Korean text 0). Text without spaces, such as Japanese, is one word; use chrF for it instead.

        "서울시 예산 안 발표" against "서울시 예산 발표": 3 in common, 3/4 and 3/3, F = 85.7
    """
    return rouge_l_of(_words(prediction), _words(reference), prediction, reference)


def rouge_l_chars(prediction: str, reference: str) -> float:
    """Return ROUGE-L over the letters and digits themselves: 구청이 for 구청 scores 80, where words score 0.

    For Korean, whose particles change words, and for scripts without spaces.
    """
    predicted, expected = ("".join(_words(text)) for text in (prediction, reference))
    return rouge_l_of(predicted, expected, prediction, reference)


def rouge_l_of(predicted: Sequence[str], expected: Sequence[str], prediction: str, reference: str) -> float:
    """Return ROUGE-L, 0 to 100, of two texts that were cut into pieces; without any, whether the texts are equal."""
    if not predicted and not expected:
        return exact(prediction, reference)
    return 200.0 * _common_subsequence(predicted, expected) / (len(predicted) + len(expected))


def exact(prediction: str, reference: str) -> float:
    """Return 100 if the texts are equal after NFC and stripping, else 0."""
    return 100.0 if _normal(prediction) == _normal(reference) else 0.0


def score_text(prediction: str, reference: str) -> dict[str, float]:
    """Return TEXT_METRICS of one answer."""
    return {
        "chrf": chrf(prediction, reference),
        "rouge_l": rouge_l(prediction, reference),
        "rouge_l_chars": rouge_l_chars(prediction, reference),
        "exact": exact(prediction, reference),
    }


def score_row(prediction: str, reference: str, *, stopped: bool, loss: float) -> dict[str, float]:
    """Return ROW_METRICS of one answer.

    stopped: whether the model ended the answer (100), not the token limit (0). loss: mean negative log-likelihood of
    the reference's tokens in nats, measured by the caller; NaN if unknown. length: characters of the stripped answer.
    words: parts of it between spaces.
    """
    return {
        **score_text(prediction, reference),
        "length": float(len(_normal(prediction))),
        "words": float(len(prediction.split())),
        "stopped": 100.0 if stopped else 0.0,
        "loss": float(loss),
    }


def score_pair(chosen: float, rejected: float) -> dict[str, float]:
    """Return PAIR_METRICS of one row, from a model's summed log-probs (nats) of the two answers.

    preference_accuracy: 100 if the chosen answer is more likely, else 0. preference_margin: by how many nats.
    """
    margin = chosen - rejected
    return {"preference_accuracy": 100.0 if margin > 0 else 0.0, "preference_margin": margin}


def summarise(
    base: Mapping[str, Sequence[float | None]],
    tuned: Mapping[str, Sequence[float | None]],
    *,
    names: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Return the means of both models, and tuned - base with its interval, of each metric.

    names: of the metrics; by default ROW_METRICS and measured PAIR_METRICS.

    A row counts for a metric if both models have a finite value, so tuned - base is the difference's mean. A metric
    without such a row is None throughout: the result is written as JSON, which has no NaN.

        {"base": {"chrf": 20.1, ...}, "tuned": {"chrf": 31.4, ...},
         "difference": {"chrf": {"mean": 11.3, "low": 8.0, "high": 14.9}, ...}, "rows": 40}
    """
    names = names or [*ROW_METRICS, *(name for name in PAIR_METRICS if name in base or name in tuned)]
    if missing := [name for name in names if name not in base or name not in tuned]:
        raise ValueError(f"summarise needs every metric from both models; missing: {', '.join(missing)}")
    rows, *others = sorted({len(side[name]) for side in (base, tuned) for name in names})
    if others:
        raise ValueError(f"summarise needs the same rows from both models, not {[rows, *others]} values")
    result: dict[str, Any] = {"base": {}, "tuned": {}, "difference": {}, "rows": rows}
    for name in names:
        before, after = (np.array(side[name], dtype=np.float64) for side in (base, tuned))
        both = np.isfinite(before) & np.isfinite(after)
        interval = paired_interval((after - before)[both], confidence)
        result["base"][name] = float(before[both].mean()) if both.any() else None
        result["tuned"][name] = float(after[both].mean()) if both.any() else None
        result["difference"][name] = {
            key: value if math.isfinite(value) else None for key, value in interval._asdict().items()
        }
    return result


def difference_of(metrics: Mapping[str, Any], name: str) -> Interval | None:
    """Return the difference of one metric from the result of `summarise`, or None if it was not measured."""
    difference = (metrics.get("difference") or {}).get(name) or {}
    values = [float(value) for key in Interval._fields if (value := difference.get(key)) is not None]
    return Interval(*values) if len(values) == 3 and all(map(math.isfinite, values)) else None


def interval_sign(interval: Interval) -> int:
    """Return 1 or -1 if the whole interval lies above or below zero, 0 if it includes zero or is NaN."""
    return int(interval.low > 0) - int(interval.high < 0)


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _words(text: str) -> list[str]:
    """Return the runs of letters and digits, with combining marks (Hindi vowel signs, not letters to isalnum)."""
    lowered = unicodedata.normalize("NFC", text).lower()
    spaced = (c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in lowered)
    return [word for word in "".join(spaced).split() if any(c.isalnum() for c in word)]


@cache
def _chrf_scorer() -> Any:
    from sacrebleu.metrics.chrf import CHRF  # imports much, which no other metric needs

    return CHRF()


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, with a row of the table as the bits of one integer.

    Bit i of `row` is 0 where the table steps up by one at first[i], so the zeros count the length (Hyyrö 2004).
    """
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | (1 << index)
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        step = row & places.get(word, 0)
        row = ((row + step) | (row - step)) & full
    return len(first) - row.bit_count()
