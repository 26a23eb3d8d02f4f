"""What the losses of base and tuned model say about the rows that were trained: easy ones, hard ones, likely mislabels.

A mislabelled row is one that the tuned model contradicts: it learned to expect another answer from similar rows,
whose loss fell while this one's did not. That shows as long as the model has not learned the rows by heart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from byeori.data import near_copies

KNOWN = 0.2
"""Nats a token up to which the base knows an answer: it gives each token 82% (their geometric mean)."""

_NEIGHBOURS = 10
_FEWEST = 5  # rows beside it against which one can be held
_WANTED = 2_000  # rows that are looked at, those with the highest losses
_AMONG = 20_000  # rows among which similar ones are looked for
_STANDS_OUT = 3.0  # robust standard deviations
_LEAST = 0.5  # nats a token
_FALLS = 0.1  # share of the base's loss from which a loss fell


def sort_rows(base: Sequence[float], tuned: Sequence[float], texts: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return rows by what their losses say, each kind in its order, as JSON data.

        {"contradicted": [{"index": 7, "expected": 0.3}, ...], "hard": [{"index": 2}, ...], "known": [...]}

    contradicted: the losses of the rows with the most similar texts fell, to the median `expected`; this one fell
    less and stands out above them; the furthest first. hard: of the other rows those whose
    loss fell by less than a tenth and is above the median; the highest first. known: the base's loss is at most KNOWN;
    the lowest first. base, tuned: nats a token of each row.
    """
    before, after = np.asarray(base), np.asarray(tuned)
    fall = before - after
    contradicted = _contradicted(before, after, texts)
    known = [int(row) for row in np.argsort(before, kind="stable") if before[row] <= KNOWN]
    others = {item["index"] for item in contradicted} | set(known)
    stays = (fall < _FALLS * before) & (after > np.median(after))
    hard = [int(row) for row in np.argsort(-after, kind="stable") if stays[row] and int(row) not in others]
    return {
        "contradicted": contradicted,
        "hard": [{"index": row} for row in hard],
        "known": [{"index": row} for row in known],
    }


def _contradicted(before: np.ndarray, after: np.ndarray, texts: Sequence[str]) -> list[dict[str, Any]]:
    if len(after) <= _FEWEST:
        return []
    left = after / np.maximum(before, 1e-6)  # share of the loss
    wanted = np.argsort(-after, kind="stable")[:_WANTED]
    wanted = wanted[after[wanted] > _LEAST]
    if not len(wanted):
        return []
    among = np.arange(len(after))
    if len(among) > _AMONG:
        among = np.sort(np.random.default_rng(0).choice(among, _AMONG, replace=False))
    found = []
    for row, similar in zip(
        wanted.tolist(), near_copies.nearest(texts, wanted.tolist(), among.tolist(), _NEIGHBOURS), strict=True
    ):
        learned = np.median(left[similar]) < 1 - _FALLS
        fell_less = left[row] > np.median(left[similar])
        if learned and fell_less and _stands_out(after[row], after[similar]):
            found.append({"index": row, "expected": round(float(np.median(after[similar])), 4)})
    return sorted(found, key=lambda item: item["expected"] - after[item["index"]])


def _stands_out(value: float, others: np.ndarray) -> bool:
    """Return whether a value is far above the median of others, by their median absolute deviation."""
    middle = np.median(others)
    spread = 1.4826 * np.median(np.abs(others - middle))
    return bool(value - middle > max(_LEAST, _STANDS_OUT * spread))
