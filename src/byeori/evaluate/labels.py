"""Answers that are labels: accuracy, macro F1 with an interval, and the table of what is taken for what."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

OTHER = "(other)"
"""Answers that are none of the references' labels."""

_AT_MOST = 30  # labels in a table


def label(text: str) -> str:
    """Return a text as a label: NFC, without case, spaces around it and a full stop at its end."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).strip(" .!\"'“”‘’*")


def same(_row: Mapping[str, Any], reference: str, answer: str) -> bool:
    """Return whether an answer is the label of the reference."""
    return label(reference) == label(answer)


def macro_f1(references: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Return values [rows] whose mean is macro F1, 0 to 100, and whose spread gives its standard error.

    F1 of a label is 2 TP / (2 TP + FP + FN); macro F1 is its mean over the labels of the references. It is no mean over
    rows, so a row's value is that of the jackknife, F1 + (n - 1) (F1 - F1 without the row) (Efron 1982), shifted so
    that the mean is F1 itself.
    """
    wanted, given = ([label(text) for text in texts] for texts in (references, answers))
    labels = sorted(set(wanted))
    hits = Counter(a for a, b in zip(wanted, given, strict=True) if a == b)
    there, said = Counter(wanted), Counter(given)
    rows = len(wanted)

    def score(change: Mapping[str, int], hit: str | None) -> float:
        """F1 with one reference and one answer fewer. change: how many of each label are missing in both sums."""
        kept = [name for name in labels if there[name] - (change.get(f"r{name}", 0)) > 0]
        total = 0.0
        for name in kept:
            positive = hits[name] - (hit == name)
            total += 2 * positive / (there[name] + said[name] - change.get(f"r{name}", 0) - change.get(f"a{name}", 0))
        return 100.0 * total / len(kept) if kept else 0.0

    whole = score({}, None)
    without: dict[tuple[str, str], float] = {}
    for pair in set(zip(wanted, given, strict=True)):
        without[pair] = score({f"r{pair[0]}": 1, f"a{pair[1]}": 1}, pair[0] if pair[0] == pair[1] else None)
    influence = np.array([(rows - 1) * (whole - without[pair]) for pair in zip(wanted, given, strict=True)])
    return whole + influence - influence.mean() if rows else influence


def confusion(references: Sequence[str], answers: Sequence[str]) -> dict[str, Any] | None:
    """Return {"labels": [...], "counts": [[...]]}: a line for each label of the references, a column for each answer.

    The last column counts answers that are no label. None if there are more than 30 labels.
    """
    wanted, given = ([label(text) for text in texts] for texts in (references, answers))
    labels = [name for name, _ in Counter(wanted).most_common()]
    if len(labels) > _AT_MOST:
        return None
    counted = Counter((a, b if b in labels else OTHER) for a, b in zip(wanted, given, strict=True))
    return {"labels": labels, "counts": [[counted[a, b] for b in (*labels, OTHER)] for a in labels]}
