"""What spoils a comparison: reasons why a better score may not mean that the model learned its task.

    items, baselines, rows that were trained on ── find ──> records for metrics.json, each with its sentence

A finding counts answers by plain definitions that a reader can check, and is reported only if the references do not
show the same: titles that stand in the text as they are, are no copies.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from byeori.evaluate import baselines
from byeori.evaluate.metrics import FEWEST_ROWS, difference_of
from byeori.evaluate.verdict import CHRF, primary

Item = Mapping[str, Any]

_SHINGLE = 8  # characters
_SHORT = 16  # shorter answers are copies only if they are the whole input
_COPIED = 0.9  # share of an answer's shingles that stand in the input
_REPEATED = 0.3  # share of distinct shingles below which a text repeats itself
_MOSTLY = 0.5
_WIDE = 10.0  # points of a measure from 0 to 100


def find(
    items: Sequence[Item],
    metrics: Mapping[str, Any],
    trained_rows: Sequence[int],
    unseen: Mapping[str, Any] | None,
    near_rows: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Return what was found, the gravest first, as JSON data.

        [{"name": "copies_input", "sentence": "40 of the 44 ...", "rows": [0, 1, ...], "undermines": true}]

    metrics: of all rows, with `baselines`. trained_rows: indices of the rows that the adapter was trained on;
    near_rows: of near copies of them; unseen: the metrics of the others, None if they are too few. rows: indices of the
    items that a finding is about.
    undermines: whether a gain may then say nothing about the task.
    """
    near = sorted({*near_rows} - {*trained_rows})
    found = [
        _leaked(len(items), trained_rows, "trained_on", unseen, near),
        _leaked(len(items), near, "near_copies", None if trained_rows else unseen, trained_rows),
    ]
    if len(items) >= FEWEST_ROWS:
        kinds = (
            ("copies_input", copies_input, "of the tuned model's {} answers repeat their input"),
            ("repeats_itself", repeats_itself, "of the tuned model's {} answers repeat themselves"),
        )
        found += [_counted(items, *kind) for kind in kinds]
        found += [_same_answer(items), *_as_good(metrics), _wide(metrics)]
    return [finding for finding in found if finding is not None]


# ---- what single answers look like -----------------------------------------------------------------------------


def copies_input(answer: str, inputs: Sequence[str]) -> bool:
    """Return whether an answer is one column of the input, or 90% of its runs of 8 characters stand in the input."""
    text, columns = _plain(answer), [_plain(column) for column in inputs]
    if len(text) < _SHORT:
        return bool(text) and text in columns
    there = {piece for column in columns for piece in _shingles(column)}
    pieces = _shingles(text)
    return sum(piece in there for piece in pieces) >= _COPIED * len(pieces)


def repeats_itself(answer: str, inputs: Sequence[str]) -> bool:
    """Return whether fewer than 30% of an answer's runs of 8 characters are different ones, whatever their numbers.

    Loops often count: `question 32 ... question 31 ... question 30`.
    """
    pieces = _shingles(re.sub(r"\d+", "0", _plain(answer)))
    return len(pieces) > 2 * _SHORT and len(set(pieces)) < _REPEATED * len(pieces)


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).lower().split())


def _shingles(text: str) -> list[str]:
    return [text[at : at + _SHINGLE] for at in range(len(text) - _SHINGLE + 1)]


# ---- what is found in all of them ------------------------------------------------------------------------------


def _counted(
    items: Sequence[Item], name: str, shows: Callable[[str, Sequence[str]], bool], words: str
) -> dict[str, Any] | None:
    """A finding if most answers show something that at most half as many references show."""
    rows = [row for row, item in enumerate(items) if shows(item["tuned_output"], item["inputs"])]
    references = sum(shows(item["reference"], item["inputs"]) for item in items)
    if len(rows) <= _MOSTLY * len(items) or 2 * references > len(rows):
        return None
    sentence = f"{len(rows):,} {words.format(f'{len(items):,}')}, and {references:,} of the references do."
    return {"name": name, "sentence": sentence, "rows": rows, "references": references, "undermines": True}


def _same_answer(items: Sequence[Item]) -> dict[str, Any] | None:
    answers, references = ([_plain(item[key]) for item in items] for key in ("tuned_output", "reference"))
    text, count = Counter(answers).most_common(1)[0]
    common = Counter(references).most_common(1)[0][1]
    if count <= _MOSTLY * len(items) or 2 * common > count:
        return None
    rows = [row for row, answer in enumerate(answers) if answer == text]
    shown = " ".join(str(items[rows[0]]["tuned_output"]).split())
    shown = f"'{shown[:60]}{'...' if len(shown) > 60 else ''}'" if text else "empty"
    sentence = f"{count:,} of the tuned model's {len(items):,} answers are the same: {shown}."
    return {"name": "same_answer", "sentence": sentence, "rows": rows, "references": common, "undermines": True}


def _as_good(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Findings about baselines over which the tuned model has no clear lead; of copies and constants about the best."""
    _, name = _of_text(metrics)
    gain = difference_of(metrics, name)
    if gain is None or gain.low <= 0:  # there is no gain to explain
        return []
    measured = [item for item in metrics["baselines"] if item["scores"].get(name) is not None]
    rivals = [item for item in measured if item["lead"][name]["low"] <= 0]
    alone = (baselines.FEW_SHOTS, baselines.BASE_CUT)
    simple = sorted((item for item in rivals if item["name"] not in alone), key=lambda item: -item["scores"][name])
    return [_rival(item, metrics) for item in [*(item for item in rivals if item["name"] in alone), *simple[:1]]]


def _of_text(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """Return the measure that decides, or chrF where that is a judge, who is not asked about baselines."""
    found = primary(metrics)
    return CHRF if found[1] == "judge" else found


def _rival(rival: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A finding about one baseline. It spoils a gain of chrF only if ROUGE-L shows no lead either: chrF counts what an
    answer has of the reference far more than what else it has, which favours long copies."""
    heading, name = _of_text(metrics)
    lead, score, tuned = rival["lead"][name], rival["scores"][name], metrics["tuned"][name]
    if lead["mean"] <= 0:
        words = f"{rival['about']} does as well: {heading} {score:.1f}, the tuned model {tuned:.1f}"
    else:
        words = (
            f"{rival['about']} is not clearly worse: {heading} {score:.1f}, the tuned model {tuned:.1f} (95% interval "
            f"of the lead {lead['low']:.1f} to {lead['high']:.1f})"
        )
    finding = {"name": "baseline_as_good", "baseline": rival["name"], "undermines": True}
    if name == "chrf" and rival["lead"]["rouge_l"]["low"] > 0:
        words += f"; by ROUGE-L it is: {rival['scores']['rouge_l']:.1f} and {metrics['tuned']['rouge_l']:.1f}"
        finding["undermines"] = False
    elif rival["name"] == baselines.BASE_CUT:
        words = f"The gain may be only that answers end. {words}"
        finding["name"] = "only_ends"
    if rival["name"] == baselines.FEW_SHOTS:  # the task was learned, though training was not needed for it
        finding["undermines"] = False
    return finding | {"sentence": f"{words}."}


def _wide(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    heading, name = primary(metrics)
    interval = difference_of(metrics, name)
    width = interval.high - interval.low if interval else 0.0
    if interval is None or width <= max(_WIDE, abs(interval.mean) / 2):
        return None
    rows = int(metrics["rows"])
    enough = round(rows * (width / (_WIDE / 2)) ** 2, -1)
    sentence = (
        f"The interval is wide, {width:.1f} points of {heading}; an interval of {_WIDE / 2:.0f} would need about "
        f"{enough:,.0f} rows."
    )
    return {"name": "wide_interval", "sentence": sentence, "width": width, "undermines": False}


_LEAKED = {
    "trained_on": ("was trained on", "were trained on", "so the model may have memorised them"),
    "near_copies": (
        "is a near copy of a training row",
        "are near copies of training rows",
        "which may give answers away",
    ),
}


def _leaked(
    rows: int, leaked: Sequence[int], name: str, unseen: Mapping[str, Any] | None, others: Sequence[int]
) -> dict[str, Any] | None:
    """A finding about rows that training saw. others: rows of the other kind; unseen: the metrics without both."""
    if not leaked:
        return None
    one, many, so = _LEAKED[name]
    sentence = f"{len(leaked):,} of the {rows:,} rows {one if len(leaked) == 1 else many}, {so}."
    heading, measure = primary(unseen or {})
    gain = difference_of(unseen or {}, measure)
    if unseen and gain:
        sentence += (
            f" On the other {unseen['rows']:,} the change of {heading} is {gain.mean:+.1f} (95% interval "
            f"{gain.low:+.1f} to {gain.high:+.1f})."
        )
    undermines = len(leaked) + len(others) > _MOSTLY * rows
    return {"name": name, "sentence": sentence, "rows": list(leaked), "undermines": undermines}
