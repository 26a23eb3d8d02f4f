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
from typing import Any, NamedTuple

import numpy as np

from byeori.evaluate import baselines
from byeori.evaluate.intervals import Interval, paired_interval
from byeori.evaluate.metrics import FEWEST_ROWS, difference_of
from byeori.evaluate.verdict import CHRF, primary

Item = Mapping[str, Any]

_SHINGLE = 8  # characters
_SHORT = 16  # shorter answers are copies only if they are the whole input
_COPIED = 0.9  # share of an answer's characters in shingles that stand in the input
_REPEATED = 0.3  # share of distinct shingles below which a text repeats itself
_MOSTLY = 0.5
_PART = 0.1  # share of the answers from which one kind of several is named
_FEW = 4  # times fewer different answers than rows, and than different references
_TRACE = 0.1  # share of letters below which a text is not in a script
_WIDE = 10.0  # points of a measure from 0 to 100


def find(
    items: Sequence[Item],
    metrics: Mapping[str, Any],
    trained_rows: Sequence[int],
    unseen: Mapping[str, Any] | None,
    near_rows: Sequence[int] = (),
    trained_answers: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return what was found, the gravest first, as JSON data.

        [{"name": "copies_input", "sentence": "40 of the 44 ...", "rows": [0, 1, ...], "undermines": true}]

    metrics: of all rows, with `baselines`. trained_rows: indices of the rows that the adapter was trained on;
    near_rows: of near copies of them; unseen: the metrics of the others, None if they are too few. trained_answers: the
    answers of the training rows. rows: indices of the items that a finding is about.
    undermines: whether a gain may then say nothing about the task.
    """
    near = sorted({*near_rows} - {*trained_rows})
    found = [
        _leaked(len(items), trained_rows, "trained_on", unseen, near),
        _leaked(len(items), near, "near_copies", None if trained_rows else unseen, trained_rows),
    ]
    if len(items) >= FEWEST_ROWS:
        found += _kinds(items, trained_answers)
        found += [_same_answer(items), *_as_good(metrics), _length_decides(items, metrics), _wide(metrics)]
    return [finding for finding in found if finding is not None]


def training_unknown() -> dict[str, Any]:
    """Return a finding of a comparison that has no training rows to look for its rows in."""
    sentence = "The training rows are not here, so whether these rows were trained on is not known."
    return {"name": "training_unknown", "sentence": sentence, "undermines": False}


def repeated(rows: Sequence[int], all_rows: int, distinct: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a finding about rows that repeat another row and its reference, which the interval counts as new ones.

    distinct: the metrics without them, None if too few rows are left. It spoils a gain that they do not show.
    """
    one = len(rows) == 1
    sentence = f"{len(rows):,} of the {all_rows:,} rows {'repeats' if one else 'repeat'} another row and its answer."
    gain, said = _gain_over(distinct, "Without " + ("it" if one else "them"))
    undermines = gain is None or gain.low <= 0
    return {"name": "repeated_rows", "sentence": sentence + said, "rows": list(rows), "undermines": undermines}


# ---- what single answers look like -----------------------------------------------------------------------------


def copies_input(answer: str, inputs: Sequence[str]) -> bool:
    """Return whether an answer is one column of the input, or 90% of its characters are in runs of 8 from the input."""
    text, columns = _plain(answer), [_plain(column) for column in inputs]
    if len(text) < _SHORT:
        return bool(text) and text in columns
    there = {piece for column in columns for piece in _shingles(column)}
    copied = np.zeros(len(text), dtype=bool)
    for at, piece in enumerate(_shingles(text)):
        if piece in there:
            copied[at : at + _SHINGLE] = True
    return bool(copied.mean() >= _COPIED)


def repeats_itself(answer: str, inputs: Sequence[str]) -> bool:
    """Return whether fewer than 30% of an answer's runs of 8 characters are different ones, whatever their numbers.

    Loops often count: `question 32 ... question 31 ... question 30`.
    """
    pieces = _shingles(re.sub(r"\d+", "0", _plain(answer)))
    return len(pieces) > 2 * _SHORT and len(set(pieces)) < _REPEATED * len(pieces)


def says_nothing(answer: str) -> bool:
    """Return whether an answer is empty, or has no letter and no digit."""
    return not any(character.isalnum() for character in answer)


def other_script(answer: str, reference: str) -> bool:
    """Return whether less than a tenth of an answer's letters are of the script of the reference.

    Scripts are the first words of Unicode's names: HANGUL, LATIN, CJK. Japanese, which mixes them, has kana.
    """
    wanted, found = _scripts(reference), _scripts(answer)
    if not wanted or not found:
        return False
    japanese = wanted["KANA"] >= _TRACE * wanted.total()
    script = "KANA" if japanese else wanted.most_common(1)[0][0]
    return found[script] < _TRACE * found.total()


def _scripts(text: str) -> Counter[str]:
    letters = (character for character in unicodedata.normalize("NFKC", text) if character.isalpha())
    names = (unicodedata.name(letter, "UNKNOWN").split()[0] for letter in letters)
    return Counter("KANA" if name.startswith(("HIRAGANA", "KATAKANA")) else name for name in names)


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).lower().split())


def _shingles(text: str) -> list[str]:
    return [text[at : at + _SHINGLE] for at in range(len(text) - _SHINGLE + 1)]


# ---- what is found in all of them ------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """Answers that show something. shows: gets an item and a text in place of the tuned model's answer.

    words: with {count} and {all} answers, and {references} that show the same.
    """

    name: str
    words: str
    shows: Callable[[Item, str], bool]
    undermines: bool = True


def _kinds(items: Sequence[Item], trained_answers: Sequence[str]) -> list[dict[str, Any]]:
    """Findings about what answers show that at most half as many references show.

    A kind is named if most answers are of it, or if it is a tenth of them and most are of some kind that undermines.
    """
    known = {_plain(answer) for answer in trained_answers}
    answers = "of the tuned model's {all} answers"
    kinds = [
        _Kind(
            "says_nothing", f"{{count}} {answers} are empty or have no letter or digit.", lambda _, it: says_nothing(it)
        ),
        _Kind(
            "copies_input",
            f"{{count}} {answers} repeat their input, and {{references}} of the references do.",
            lambda item, it: copies_input(it, item["inputs"]),
        ),
        _Kind(
            "repeats_itself",
            f"{{count}} {answers} repeat themselves, and {{references}} of the references do.",
            lambda item, it: repeats_itself(it, item["inputs"]),
        ),
        _Kind(
            "recites",
            f"{{count}} {answers} are answers of training rows, word for word; {{references}} of the references are.",
            lambda _, it: _plain(it) in known and not says_nothing(it),
        ),
        _Kind(
            "other_script",
            f"{{count}} {answers} are in another script than their references.",
            lambda item, it: other_script(it, item["reference"]),
        ),
        _Kind(
            "as_base",
            f"{{count}} {answers} are those of the base model.",
            lambda item, it: _plain(it) == _plain(item["base_output"]),
            False,
        ),
    ]
    counted = []
    for kind in kinds:
        rows = [row for row, item in enumerate(items) if kind.shows(item, item["tuned_output"])]
        references = sum(kind.shows(item, item["reference"]) for item in items)
        if rows and 2 * references <= len(rows):
            counted.append((kind, rows, references))
    spoilt = {row for kind, rows, _ in counted if kind.undermines for row in rows}
    mostly = _MOSTLY * len(items)
    found = []
    for kind, rows, references in counted:
        part = kind.undermines and len(spoilt) > mostly and len(rows) >= _PART * len(items)
        if len(rows) > mostly or part:
            numbers = {"count": f"{len(rows):,}", "all": f"{len(items):,}", "references": f"{references:,}"}
            sentence = kind.words.format(**numbers)
            found.append({"name": kind.name, "sentence": sentence, "rows": rows, "undermines": kind.undermines})
    return [*found, *_limits(items)]


def _limits(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Findings about answers that were cut, and about a base that says nothing."""
    cut = [row for row, item in enumerate(items) if item["tuned"]["stopped"] == 0]
    silent = [row for row, item in enumerate(items) if says_nothing(item["base_output"])]
    wanted = sum(says_nothing(item["reference"]) for item in items)
    found = []
    if len(cut) > _MOSTLY * len(items):
        sentence = f"{len(cut):,} of the tuned model's {len(items):,} answers ran into the length limit."
        found.append({"name": "unfinished", "sentence": sentence, "rows": cut, "undermines": False})
    if len(silent) > _MOSTLY * len(items) and 2 * wanted <= len(silent):
        sentence = (
            f"{len(silent):,} of the base model's {len(items):,} answers are empty or have no letter or digit, so any "
            "answer is a gain."
        )
        found.append({"name": "base_says_nothing", "sentence": sentence, "rows": silent, "undermines": False})
    return found


def _same_answer(items: Sequence[Item]) -> dict[str, Any] | None:
    answers, references = ([_plain(item[key]) for item in items] for key in ("tuned_output", "reference"))
    text, count = Counter(answers).most_common(1)[0]
    common = Counter(references).most_common(1)[0][1]
    if count <= _MOSTLY * len(items) or 2 * common > count:
        return _few_answers(len(items), len(set(answers)), len(set(references)))
    rows = [row for row, answer in enumerate(answers) if answer == text]
    shown = " ".join(str(items[rows[0]]["tuned_output"]).split())
    shown = f"'{shown[:60]}{'...' if len(shown) > 60 else ''}'" if text else "empty"
    sentence = f"{count:,} of the tuned model's {len(items):,} answers are the same: {shown}."
    return {"name": "same_answer", "sentence": sentence, "rows": rows, "references": common, "undermines": True}


def _few_answers(rows: int, answers: int, references: int) -> dict[str, Any] | None:
    if _FEW * answers > min(rows, references):
        return None
    sentence = (
        f"The tuned model gives {answers:,} different answers to {rows:,} rows, whose references are {references:,} "
        "different ones."
    )
    return {"name": "few_answers", "sentence": sentence, "rows": [], "undermines": True}


def _as_good(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Findings about baselines over which the tuned model has no clear lead; of copies and constants about the best."""
    _, name = _of_text(metrics)
    gain = difference_of(metrics, name)
    if gain is None or gain.low <= 0:  # there is no gain to explain
        return []
    measured = [item for item in metrics["baselines"] if item["scores"].get(name) is not None]
    rivals = [item for item in measured if item["lead"][name]["low"] <= 0 and not _of_its_row(item)]
    alone = (baselines.FEW_SHOTS, baselines.BASE_CUT, baselines.OTHER_ROW)
    simple = sorted((item for item in rivals if item["name"] not in alone), key=lambda item: -item["scores"][name])
    return [_rival(item, metrics) for item in [*(item for item in rivals if item["name"] in alone), *simple[:1]]]


def _of_its_row(rival: Mapping[str, Any]) -> bool:
    """Return whether answers fit their own row better than another one, by characters at least.

    Measures such as json_valid do not look at the row.
    """
    return rival["name"] == baselines.OTHER_ROW and any(
        rival["lead"][name]["low"] > 0 for name in ("chrf", "rouge_l_chars")
    )


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


def _length_decides(items: Sequence[Item], metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """A finding if the longer (or shorter) answer of a pair is the chosen one as often as the tuned model says so."""
    gain = difference_of(metrics, "preference_accuracy")
    if gain is None or gain.low <= 0:
        return None
    longer = np.array([len(item["reference"]) - len(item["rejected"]) for item in items])
    by_length = max((50.0 * (1 + np.sign(way * longer)) for way in (1, -1)), key=np.mean)
    tuned = np.array([item["tuned"]["preference_accuracy"] for item in items])
    lead = paired_interval(tuned - by_length)
    if lead.low > 0:
        return None
    word = "longer" if by_length[longer > 0].any() else "shorter"
    verb = "does as well" if lead.mean <= 0 else "is not clearly worse"
    sentence = (
        f"Preferring the {word} answer {verb}: it is the chosen one in {by_length.mean():.0f}% of the pairs, and the "
        f"tuned model prefers that in {tuned.mean():.0f}%."
    )
    return {"name": "length_decides", "sentence": sentence, "undermines": bool(lead.mean <= 0)}


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
    sentence += _gain_over(unseen, f"On the other {unseen['rows'] if unseen else 0:,}")[1]
    undermines = len(leaked) + len(others) > _MOSTLY * rows
    return {"name": name, "sentence": sentence, "rows": list(leaked), "undermines": undermines}


def _gain_over(metrics: Mapping[str, Any] | None, where: str) -> tuple[Interval | None, str]:
    """Return the difference of the measure that decides over some of the rows, and a sentence on it; "" without."""
    heading, measure = primary(metrics or {})
    gain = difference_of(metrics or {}, measure)
    if gain is None:
        return None, ""
    interval = f"95% interval {gain.low:+.1f} to {gain.high:+.1f}"
    return gain, f" {where} the change of {heading} is {gain.mean:+.1f} ({interval})."
