"""The audit of rows: what losses and near copies say, as the content of audit.json, as rows.jsonl, as sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from byeori.data import near_copies
from byeori.evaluate import row_losses

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

_SHOWN = 3  # examples of a kind that are printed
_CHARACTERS = 40  # of an answer that is printed
_LITTLE = 0.1  # share by which losses fell in a run that says little


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Rows as texts: what messages call each, its own part of the prompt, and its answer."""

    names: Sequence[str]
    prompts: Sequence[str]
    answers: Sequence[str]


def audit(
    rows: Texts, base: Sequence[float], tuned: Sequence[float], test: Texts | None, progress: Progress
) -> dict[str, Any]:
    """Return the content of audit.json.

    base, tuned: the loss of each row, in nats a token (see compare.row_losses). test: rows that should be others.
    """

    def described(item: Mapping[str, Any]) -> dict[str, Any]:
        row = item["index"]
        numbers = {"base_loss": round(base[row], 4), "tuned_loss": round(tuned[row], 4)}
        return {"row": rows.names[row], **item, **numbers, "answer": rows.answers[row]}

    kinds = row_losses.sort_rows(base, tuned, rows.prompts)
    with progress("Looking for near copies") as on_progress:
        different = near_copies.different_answers(rows.prompts, rows.answers, on_progress)
    found: dict[str, Any] = {
        "rows": len(rows.names),
        "base_loss": round(float(np.mean(base)), 4),
        "tuned_loss": round(float(np.mean(tuned)), 4),
        "copies": len(rows.names) - len(set(map(near_copies.key, rows.prompts, rows.answers))),
        **{kind: list(map(described, items)) for kind, items in kinds.items()},
        "different_answers": [
            {
                "rows": [rows.names[row] for row in pair],
                "indices": list(pair),
                "similarity": round(share, 3),
                "answers": [rows.answers[row] for row in pair],
            }
            for *pair, share in different
        ],
    }
    if test is not None:
        with progress("Looking for test rows among them") as on_progress:
            found |= {"test_rows": len(test.names), "leaked": leaked(rows, test, on_progress)}
    return found


def leaked(rows: Texts, test: Texts, on_progress: near_copies.OnProgress) -> list[dict[str, Any]]:
    """Return the test rows whose text is a near copy of a row's, each with the most similar one, that one first."""
    best: dict[int, tuple[float, bool, int]] = {}
    for row, other, share in near_copies.pairs(rows.prompts, test.prompts, on_progress):
        same = near_copies.plain(rows.answers[row]) == near_copies.plain(test.answers[other])
        best[other] = max(best.get(other, (0.0, False, 0)), (share, same, -row))
    items = [
        {
            "test_row": test.names[other],
            "row": rows.names[-row],
            "index": -row,
            "similarity": round(share, 3),
            "same_answer": same,
        }
        for other, (share, same, row) in best.items()
    ]
    return sorted(items, key=lambda item: (-item["similarity"], not item["same_answer"]))


def lines(
    found: Mapping[str, Any], rows: Texts, columns: Sequence[Any], base: Sequence[float], tuned: Sequence[float]
) -> list[dict[str, Any]]:
    """Return a line of rows.jsonl for each row: its name, losses, what was found about it, and its columns."""
    about: list[list[str]] = [[] for _ in rows.names]
    for kind in ("contradicted", "hard", "known", "leaked"):
        for item in found.get(kind, ()):
            if kind not in about[item["index"]]:
                about[item["index"]].append(kind)
    others: list[list[str]] = [[] for _ in rows.names]
    for pair in found["different_answers"]:
        for here, there in (pair["indices"], pair["indices"][::-1]):
            others[here].append(rows.names[there])
    return [
        {
            "row": name,
            "base_loss": round(base[row], 4),
            "tuned_loss": round(tuned[row], 4),
            "found": about[row] + ["different_answers"] * bool(others[row]),
            "near_copies": others[row],
            "columns": columns[row],
        }
        for row, name in enumerate(rows.names)
    ]


def sentences(found: Mapping[str, Any]) -> list[str]:
    """Return the audit in at most 15 lines: of each kind how many, and the first ones."""
    before, after = found["base_loss"], found["tuned_loss"]
    out = [f"{found['rows']:,} rows; the mean loss of their answers is {before:.2f} with the base, {after:.2f} tuned"]
    if after > (1 - _LITTLE) * before:
        out.append("training hardly changed these losses, so they say little about single rows")
    if items := found["contradicted"]:
        out.append(f"{_rows(items)} with an answer that the tuned model contradicts, perhaps a wrong one:")
        out += [
            f"  {item['row']}: loss {item['tuned_loss']:.2f}, similar rows {item['expected']:.2f}: {_short(item)}"
            for item in items[:_SHOWN]
        ]
    if items := found["different_answers"]:
        out.append(f"{_number(len(items), 'pair')} of near copies with different answers:")
        out += [
            f"  {item['rows'][0]}: {_short(item, 0)}; {item['rows'][1]}: {_short(item, 1)}" for item in items[:_SHOWN]
        ]
    if items := found["hard"]:
        first = ", ".join(f"{item['row']} ({item['tuned_loss']:.2f})" for item in items[:_SHOWN])
        out.append(f"{_rows(items)} hard after training (the loss fell by less than a tenth): {first}")
    if items := found["known"]:
        first = ", ".join(item["row"] for item in items[:_SHOWN])
        out.append(f"{_rows(items)} known to the base (loss at most {row_losses.KNOWN}), which teach little: {first}")
    if count := found["copies"]:
        out.append(f"{_number(count, 'row')} equal to an earlier one")
    if items := found.get("leaked"):
        first = ", ".join(f"{item['test_row']} ({item['row']})" for item in items[:_SHOWN])
        out.append(f"{len(items):,} of {found['test_rows']:,} test rows near copies of these rows: {first}")
    elif "leaked" in found:
        out.append(f"none of the {found['test_rows']:,} test rows is a near copy of these rows")
    return out


def _short(item: Mapping[str, Any], which: int | None = None) -> str:
    text = " ".join(str(item["answer"] if which is None else item["answers"][which]).split())
    return f"'{text[:_CHARACTERS]}...'" if len(text) > _CHARACTERS else f"'{text}'"


def _rows(items: Sequence[Any]) -> str:
    return _number(len(items), "row")


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
