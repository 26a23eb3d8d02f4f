"""The rows of the report: both answers with what they share with the reference marked, and what a row is an example of.

rows ── cards ──> one record per row, ready for the page ── best_and_worst ──> typical wins, worst losses
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any

from byeori.evaluate import findings
from byeori.support.language import tr
from byeori.support.pages import finite, safe_text

Segments = list[tuple[str, bool]]
"""A text in pieces, each with a flag for highlighting (shared with the reference; a special token)."""

SAME = {"chrf": 0.05, "preference_margin": 0.05}
"""Smaller changes of a metric are none: they would not be printed."""

_SHOWN = 3  # typical wins, and worst losses
_BYTES = 1_500  # of a row's texts on average; longer ones are cut, so that a page of 100 rows stays under 300 KB
_LEAST = 160


def cards(
    rows: Sequence[Mapping[str, Any]], shown: Sequence[str], lead: str, leaked: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Return every row ready for the page.

    shown: the columns of the prompt. lead: the metric by which a row is better or worse. leaked: the rows, counted from
    0, that the adapter was trained on, or on near copies of them.
    """
    longest, known = _longest_text(rows, shown), set(leaked)
    return [
        card(item, index, shown, lead, longest) | {"flags": _flags(item, leaked=index - 1 in known)}
        for index, item in enumerate(rows, 1)
    ]


def card(
    item: Mapping[str, Any], index: int, shown: Sequence[str], lead: str = "chrf", longest: int | None = None
) -> dict[str, Any]:
    """Return one row with both answers. index: counted from 1. longest: characters after which a text is cut."""
    reference = str(item["reference"])
    texts = [_fixed("reference", _reference_name(item), reference)]
    if item.get("rejected") is not None:
        texts.append(_fixed("rejected", tr("Rejected"), str(item["rejected"])))
    for side, name in (("base", tr("Base model")), ("tuned", tr("Tuned model"))):
        output, scores = item[f"{side}_output"], item.get(side) or {}
        segments = matching(output, reference) if output.strip() else []
        answer = {"name": name, "segments": segments, "side": side, "score": scores.get("chrf")}
        texts.append(answer | {"cut": finite(scores.get("stopped")) == 0})
    columns = asked_columns(item, shown)
    whole = [reference, item["base_output"], item["tuned_output"], *(value for _, value in columns)]
    change = gain(item, lead)
    for text in texts:
        text["segments"] = _cut(text["segments"], longest) if "".join(t for t, _ in text["segments"]).strip() else []
    return {
        "index": index,
        "columns": [(name, _cut([(value, False)], longest)) for name, value in columns],
        "texts": texts,
        "before": (item.get("base") or {}).get(lead),
        "after": (item.get("tuned") or {}).get(lead),
        "gain": change,
        "kind": kind_of(change, lead),
        "length": sum(map(len, whole)),
    }


def asked_columns(item: Mapping[str, Any], shown: Sequence[str]) -> list[tuple[str, str]]:
    """Return the columns of a row that its prompt has, as text; the prompt itself if it has none."""
    values = [(name, item["row"].get(name)) for name in shown]
    columns = [(name, safe_text(value)) for name, value in values if value is not None and str(value).strip()]
    return columns or [(tr("Prompt"), str(item["prompt"]))]


def gain(item: Mapping[str, Any], lead: str) -> float | None:
    """Return by how much a metric of a row changed, None if it was not measured."""
    before, after = (finite((item.get(key) or {}).get(lead)) for key in ("base", "tuned"))
    return None if before is None or after is None else after - before


def kind_of(change: float | None, lead: str) -> str:
    """Return better, worse or same for a change of the leading metric; "" if it is not known."""
    if change is None:
        return ""
    return "same" if abs(change) < SAME.get(lead, 0.0005) else ("better" if change > 0 else "worse")


def tally(rows: Sequence[Mapping[str, Any]], lead: str = "chrf") -> dict[str, int]:
    """Count the rows in which the leading metric rose, fell or stayed the same to the printed digit."""
    kinds = Counter(kind_of(gain(item, lead), lead) for item in rows)
    return {
        name: kinds[kind] for name, kind in (("rose", "better"), ("fell", "worse"), ("same", "same"), ("unknown", ""))
    }


def best_and_worst(made: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Return three typical wins, whose gains are nearest the median of all wins, and the three worst losses."""
    wins = sorted((item for item in made if item["kind"] == "better"), key=lambda item: item["gain"])
    start = max(0, min(len(wins) // 2 - _SHOWN // 2, len(wins) - _SHOWN))
    losses = sorted((item for item in made if item["kind"] == "worse"), key=lambda item: item["gain"])
    return wins[start : start + _SHOWN][::-1], losses[:_SHOWN]


def bars(made: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the gains of all rows as bars, the largest first, in a box as wide as there are rows and 100 high."""
    known = sorted((item for item in made if item["gain"] is not None), key=lambda item: -item["gain"])
    top = max([0.0, *(item["gain"] for item in known)])
    bottom = min([0.0, *(item["gain"] for item in known)])
    scale = 100 / ((top - bottom) or 1.0)
    zero = round(top * scale, 2)
    drawn = []
    for at, item in enumerate(known):
        height = max(1.0, abs(item["gain"]) * scale)
        y = zero - height if item["gain"] > 0 else zero
        drawn.append(
            {"x": at, "y": round(y, 1), "height": round(height, 1), **{k: item[k] for k in ("index", "kind", "gain")}}
        )
    return {"width": len(known), "zero": zero, "bars": drawn}


def _fixed(side: str, name: str, text: str) -> dict[str, Any]:
    """A text that the data has, beside those that the models wrote."""
    return {"name": name, "segments": [(text, False)], "side": side, "score": None, "cut": False}


def _flags(item: Mapping[str, Any], *, leaked: bool) -> list[str]:
    answer, inputs = item["tuned_output"], item.get("inputs") or []
    there = {
        "unfinished": finite((item.get("tuned") or {}).get("stopped")) == 0,
        "copied": findings.copies_input(answer, inputs),
        "repeated": findings.repeats_itself(answer, inputs),
        "leaked": leaked,
    }
    return [name for name, is_there in there.items() if is_there]


def _reference_name(item: Mapping[str, Any]) -> str:
    return tr("Reference") if item.get("rejected") is None else tr("Chosen")


# ---- texts -----------------------------------------------------------------------------------------------------


def _longest_text(rows: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> int | None:
    """The length at which texts are cut so that all of them together have the characters that the page may have."""
    texts = [
        text
        for item in rows
        for text in (
            *(value for _, value in asked_columns(item, shown)),
            str(item["reference"]), item["base_output"], item["tuned_output"], str(item.get("rejected") or ""),
        )
    ]  # fmt: skip
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    if size <= _BYTES * len(rows):
        return None
    lengths = sorted(map(len, texts))
    left, many = int(_BYTES * len(rows) / size * sum(lengths)), len(lengths)
    for length in lengths:
        if length * many > left:
            break
        left, many = left - length, many - 1
    return max(_LEAST, left // max(1, many))


def _cut(segments: Segments, longest: int | None) -> Segments:
    """Return the pieces of a text up to `longest` characters, and how many more there are."""
    length = sum(len(part) for part, _ in segments)
    if longest is None or length <= longest + 40:
        return list(segments)
    left, out = longest, []
    for part, flag in segments:
        out.append((part[:left], flag))
        left -= len(part)
        if left <= 0:
            break
    return [*out, (" " + tr("… ({count:,} more characters)", count=length - longest), False)]


def matching(answer: str, reference: str) -> Segments:
    """Return the answer in pieces, marking text that the reference has in the same order.

    Words are matched first, then characters inside the rest: Korean particles change the end of a word, and "예산안을"
    for "예산안" is mostly right.

        matching("서울시 예산을 확정", "서울시 예산안 확정")
        == [("서울시 예산", True), ("을 ", False), ("확정", True)]
    """
    answer, reference = (unicodedata.normalize("NFC", text) for text in (answer, reference))
    spans, others = ([m.span() for m in re.finditer(r"\w+|[^\w\s]", text)] for text in (answer, reference))
    words, expected = [answer[a:b] for a, b in spans], [reference[a:b] for a, b in others]
    same = bytearray(len(answer))
    # untrained models repeat themselves, for which difflib needs minutes unless autojunk ignores the frequent words
    counts = Counter(expected)
    repetitive = sum(counts[word] for word in words) > 100_000
    matcher = SequenceMatcher(None, expected, words, autojunk=repetitive)
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        if kind == "equal":
            start, end = spans[j][0], spans[j_end - 1][1]
            same[start:end] = b"\1" * (end - start)
        elif kind == "replace":
            start, end = spans[j][0], spans[j_end - 1][1]
            _match_characters(answer[start:end], reference[others[i][0] : others[i_end - 1][1]], same, start)
    for gap in re.finditer(r"(?<=\S)\s+(?=\S)", answer):  # join the marks of neighbours
        if same[gap.start() - 1] and same[gap.end()]:
            same[gap.start() : gap.end()] = b"\1" * (gap.end() - gap.start())
    edges = [0, *(k for k in range(1, len(same)) if same[k] != same[k - 1]), len(same)]
    return [(answer[a:b], bool(same[a])) for a, b in pairwise(edges) if b > a]


def _match_characters(part: str, expected: str, same: bytearray, offset: int) -> None:
    """Mark common runs of characters: at least two of Hangul and the like, which carry meaning, or four letters."""
    if len(part) * len(expected) > 20_000:  # slow, and texts that differ so much only share runs by chance
        return
    for block in SequenceMatcher(None, expected, part, autojunk=False).get_matching_blocks():
        run = part[block.b : block.b + block.size]
        core = run.strip()
        if len(core) >= (2 if any(ord(c) >= 0x2E80 for c in core) else 4):
            start = offset + block.b + run.index(core)
            same[start : start + len(core)] = b"\1" * len(core)
