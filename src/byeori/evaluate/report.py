"""The report of a comparison as one HTML page: verdict, metrics, loss curve, answers side by side.

    metrics, rows, log, settings ── plain records of text and coordinates ── report.html.j2 ──> one HTML string

The page is self-contained: no network, no fonts, no libraries. Text from data and models is autoescaped by jinja2, and
should an escape ever be missed, a content security policy lets the browser run only the script with the page's hash.
"""

import base64
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from byeori.evaluate.chart import finite, loss_chart
from byeori.evaluate.metrics import FEWEST_ROWS, PAIR_METRICS, Interval, difference_of, interval_sign

# name: (heading, description, decimals, 1 if higher is better / -1 if lower is better / 0 if neither)
_METRICS: dict[str, tuple[str, str, int, int]] = {
    "chrf": ("chrF", "characters shared with the reference, 0 to 100", 1, 1),
    "rouge_l": ("ROUGE-L", "words shared in the same order, 0 to 100", 1, 1),
    "rouge_l_chars": ("ROUGE-L, characters", "characters shared in the same order, 0 to 100", 1, 1),
    "exact": ("Exact match", "answers equal to the reference, %", 1, 1),
    "stopped": ("Finished", "answers that the model ended itself, %", 1, 1),
    "length": ("Length", "characters per answer", 1, 0),
    "words": ("Words", "words per answer", 1, 0),
    "loss": ("Loss", "of the reference, nats per token; lower is better", 3, -1),
    "preference_accuracy": ("Preference", "pairs in which the chosen answer is more likely, %", 1, 1),
    "preference_margin": ("Margin", "of the chosen over the rejected answer, nats", 1, 1),
}

_MINUS = "\N{MINUS SIGN}"
_DASH = "\N{EN DASH}"

Segments = list[tuple[str, bool]]
"""A text in pieces, each with a flag for highlighting (shared with the reference; a special token)."""


def render_report(
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    verdict: str,
    settings: Mapping[str, object],
    prompt: str,
    given: Segments,
    log: Sequence[Mapping[str, Any]],
    models: Mapping[str, str],
    extra: Mapping[str, Mapping[str, object]] | None = None,
) -> str:
    """Return the report as one HTML string, to be written as UTF-8. Values that are None or NaN are shown as a dash.

    rows: each {"row": {column: value}, "prompt", "reference", "base_output", "tuned_output", "base": {metric: value},
    "tuned": {metric: value}}. metrics: from metrics.summarise. prompt: the template, whose last `{column}` is the
    trained answer. given: the first row's prompt as the models read it, with special tokens flagged. log: lines of
    train_log.jsonl, {"step", "loss", ...} and {"step", "eval_loss"}; may be empty. extra: {heading: {name: value}}.
    """
    shown, answer = template_columns(prompt)
    return _template().render(
        title=title,
        verdict=verdict,
        models=models,
        row_count=len(rows),
        metrics=metric_rows(metrics, rows),
        tally=tally(rows),
        chart=loss_chart(log),
        cards=[card(item, index, shown) for index, item in enumerate(rows, 1)],
        tables={"Settings": settings, **(extra or {})},
        prompt=prompt_pieces(prompt),
        given=given,
        answer=answer,
    )


# ---- numbers ---------------------------------------------------------------------------------------------------


def metric_rows(metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of the metric table: formatted numbers, the interval's bar, and the change in a word."""
    lengths = [len(str(item["reference"]).strip()) for item in rows]
    count = int(finite(metrics.get("rows")) or 0)
    base, tuned = (metrics.get(side) or {} for side in ("base", "tuned"))
    lines = []
    own = {name: (it["heading"], it["about"], it["digits"], 1) for name, it in (metrics.get("measures") or {}).items()}
    for name, (heading, note, digits, better) in (own | _METRICS).items():
        if name in PAIR_METRICS and name not in (metrics.get("difference") or {}):
            continue
        interval = difference_of(metrics, name)
        word, tone = _change(interval, better, count)
        shown = interval if count > 1 else None  # the interval of one row is a point, which would look like certainty
        bounds = [_number(value, digits, signed=True) for value in (shown.low, shown.high)] if shown else []
        if name == "length" and lengths:
            note += f"; reference {sum(lengths) / len(lengths):.1f}"
        lines.append(
            {
                "heading": heading,
                "note": note,
                "base": _number(base.get(name), digits),
                "tuned": _number(tuned.get(name), digits),
                "difference": _number(interval and interval.mean, digits, signed=True),
                "interval": " to ".join(bounds),
                "word": word,
                "tone": tone,
                "bar": shown and _bar(shown),
            }
        )
    return lines


def _change(interval: Interval | None, better: int, rows: int) -> tuple[str, str]:
    """Return the change in a word and the tone of its colour ("up", "down", ""); claims only what the interval does."""
    if interval is None:
        return "not measured", ""
    if interval.low == interval.high == 0:
        return "the same", ""
    if rows < FEWEST_ROWS:
        return "too few rows", ""
    sign = interval_sign(interval)
    if sign == 0:
        return "unclear", ""
    if better == 0:
        return ("longer" if sign > 0 else "shorter"), ""
    return ("better", "up") if sign == better else ("worse", "down")


def _bar(interval: Interval) -> dict[str, float]:
    """Return where the interval is drawn in a box 200 wide with zero at 100; each metric has its own scale."""
    reach = max(abs(interval.low), abs(interval.high)) or 1.0
    return {name: round(100 + 90 * value / reach, 1) for name, value in interval._asdict().items()}


def tally(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count the rows in which chrF rose, fell or stayed the same to the printed digit (0.05)."""
    gains = [gain for item in rows if (gain := _gain(item)) is not None]
    rose, fell = sum(gain >= 0.05 for gain in gains), sum(gain <= -0.05 for gain in gains)
    return {"rose": rose, "fell": fell, "same": len(gains) - rose - fell, "unknown": len(rows) - len(gains)}


# ---- answers ---------------------------------------------------------------------------------------------------


def card(item: Mapping[str, Any], index: int, shown: Sequence[str]) -> dict[str, Any]:
    """Return one row with both answers, ready for the page. index: counted from 1. shown: the columns of the prompt."""
    reference = str(item["reference"])
    values = [(name, item["row"].get(name)) for name in shown]
    columns = [(name, _text(value)) for name, value in values if value is not None and str(value).strip()]
    columns = columns or [("Prompt", str(item["prompt"]))]
    answers = []
    for side in ("base", "tuned"):
        output, scores = item[f"{side}_output"], item.get(side) or {}
        segments = matching(output, reference) if output.strip() else []
        cut = finite(scores.get("stopped")) == 0
        answers.append({"side": side, "segments": segments, "chrf": scores.get("chrf"), "cut": cut})
    gain = _gain(item)
    texts = [reference, item["base_output"], item["tuned_output"], *(value for _, value in columns)]
    return {
        "index": index,
        "columns": columns,
        "reference": reference,
        "answers": answers,
        "gain": gain,
        "tone": "" if gain is None or abs(gain) < 0.05 else ("up" if gain > 0 else "down"),
        "length": sum(map(len, texts)),
    }


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


def _gain(item: Mapping[str, Any]) -> float | None:
    before, after = (finite((item.get(key) or {}).get("chrf")) for key in ("base", "tuned"))
    return None if before is None or after is None else after - before


# ---- the prompt, and text in general ---------------------------------------------------------------------------

# As in the template language: {{ and }} are literal braces, {column} is a column.
_COLUMN = re.compile(r"\{\{|\}\}|\{([^{}\n]+)\}")


def template_columns(prompt: str) -> tuple[list[str], str]:
    """Return the columns of the prompt in order, and the answer's column ("" if the prompt names none)."""
    names = [match[1] for match in _columns(prompt)]
    if not names:
        return [], ""
    return [name for name in dict.fromkeys(names) if name != names[-1]], names[-1]


def prompt_pieces(prompt: str) -> list[tuple[str, bool]]:
    """Return the prompt split around its last `{column}`, which is flagged: the answer, the only trained part."""
    columns = _columns(prompt)
    if not columns:
        return [(prompt, False)]
    start, end = columns[-1].span()
    return [(prompt[:start], False), (prompt[start:end], True), (prompt[end:], False)]


def _columns(prompt: str) -> list[re.Match[str]]:
    """Return every `{column}`; none for a tokenizer's chat template, whose braces are jinja's."""
    if "{%" in prompt:
        return []
    return [match for match in _COLUMN.finditer(prompt) if match[1]]


def _text(value: object) -> str:
    """Return text that UTF-8 and HTML can hold: lone surrogates and control characters become U+FFFD."""
    if isinstance(value, Markup):  # the page's own
        return value
    if value is None:
        return _DASH
    if isinstance(value, (list, tuple)):
        value = ", ".join(str(part) for part in value)
    return re.sub(r"[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(value))


def _number(value: object, digits: int, *, signed: bool = False) -> str:
    number = finite(value)
    if number is None:
        return _DASH
    rounded = round(number, digits) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{rounded:{'+' if signed and rounded else ''},.{digits}f}".replace("-", _MINUS)


def _is_longer(segments: Segments, lines: int, columns: int) -> bool:
    """Whether a text fills more lines of so many columns; wide characters (Hangul, Hanzi, kana) take two."""
    text = "".join(part for part, _ in segments)
    widths = (sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in line) for line in text.split("\n"))
    return sum(max(1, -(-width // columns)) for width in widths) > lines


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, finalize=_text, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"is_longer": _is_longer, "number": _number}
    environment.filters["csp_hash"] = lambda script: (
        "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()
    )
    source = files("byeori.evaluate").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
