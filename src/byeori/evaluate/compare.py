"""Answer the same rows with the base and the tuned model: one loaded model, with the adapter off and on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from byeori.data import audit
from byeori.data import template as template_text
from byeori.data.row_kinds import RowKind
from byeori.data.sources import ROW, Table
from byeori.data.template import Template
from byeori.data.tokenize import Encoding, Example, encode_prompt
from byeori.errors import DataError, TemplateError
from byeori.evaluate import generate, metrics, preview
from byeori.evaluate.engines.base import Answer, Sampling, Side
from byeori.support.console import say
from byeori.support.journal import Journal

SIDES: tuple[Side, Side] = ("base", "tuned")
_ROWS = 32  # whose losses are computed, and kept, together


def comparable_rows(table: Table, encoding: Encoding, row_kind: RowKind, policy: str) -> list[dict[str, Any]]:
    """Return the rows that have a prompt and an answer. policy: `stop` or `drop`, for the other rows.

    Raises:
        DataError: if a row lacks one of them and the policy is `stop`, or if no row is left.
    """
    rows, bad = [], []
    for row in table.rows:
        try:
            row_kind.encode(row, encoding)
        except TemplateError as error:
            bad.append({"row": table.name(row[ROW]), "reason": str(error)})
        else:
            rows.append(dict(row))
    if bad and policy == "stop":
        raise DataError(f"{audit.named(bad)}; fix the data, or drop such rows with --on_bad_rows drop")
    if not rows:
        files = ", ".join(path for path, _ in table.parts)
        raise DataError(f"no row of {files} can be compared: every row lacks a prompt or an answer")
    if bad:
        say(f"{len(bad):,} row{'' if len(bad) == 1 else 's'} dropped: {audit.named(bad)}")
    return rows


def compare_rows(
    open_engine: generate.OpenEngine,
    rows: Sequence[Mapping[str, Any]],
    tokens: tuple[list[list[int]], list[list[Example]]],
    encoding: Encoding,
    row_kind: RowKind,
    sampling: Sampling,
    *,
    journal: Journal,
    progress: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
) -> list[dict[str, Any]]:
    """Return answers, losses and metrics of both models for every row, in the order of `rows`.

    The first item also has `given`: its prompt as the models read it, with special tokens marked.

    tokens: what `examples_of` returns. journal: keeps what is computed. progress: shows (rows done, total).
    """
    asked = [row_kind.asked(row, encoding.template) for row in rows]
    prompts, examples = tokens
    for side in SIDES:
        with progress(f"Losses of the {side} model") as on_progress:
            _losses(open_engine, examples, side, journal, on_progress)
        with progress(f"Answers of the {side} model") as on_progress:
            generate.answer_side(open_engine, prompts, sampling, side, journal, on_progress)
    items = [_inputs(*pair, encoding.template) for pair in zip(rows, asked, strict=True)]
    for side in SIDES:
        for row, item in enumerate(items):
            answer = Answer(**journal.items[f"{side} {row}"])
            item[f"{side}_output"] = answer.text
            item[side] = _score(answer, journal.items[f"{side} {row} logprobs"], item["reference"])
    items[0]["given"] = preview.with_special(prompts[0], encoding.tokenizer)
    return items


def examples_of(
    rows: Sequence[Mapping[str, Any]], encoding: Encoding, row_kind: RowKind
) -> tuple[list[list[int]], list[list[Example]]]:
    """Return the prompt of each row, and its reference answer as an example: of a pair both answers."""
    asked = [row_kind.asked(row, encoding.template) for row in rows]
    # of a conversation the last answer is compared, of a pair both
    whole = asked if row_kind.examples == 1 else rows  # a last turn of weight 0 is compared all the same
    examples = [row_kind.encode(row, encoding)[-row_kind.examples :] for row in whole]
    return [encode_prompt(row, encoding) for row in asked], examples


def _losses(
    open_engine: generate.OpenEngine,
    examples: list[list[Example]],
    side: Side,
    journal: Journal,
    on_progress: Callable[[int, int], None],
) -> None:
    """Put the sum and the mean of each reference's log-probs into the journal, a few rows at a time."""
    missing = [row for row in range(len(examples)) if f"{side} {row} logprobs" not in journal.items]
    done = len(examples) - len(missing)
    for start in range(0, len(missing), _ROWS):
        rows = missing[start : start + _ROWS]
        values = iter(open_engine().logprobs([example for row in rows for example in examples[row]], side))
        for row in rows:
            found = [next(values) for _ in examples[row]]
            journal.add(f"{side} {row} logprobs", [[sum(item), sum(item) / len(item)] for item in found])
        done += len(rows)
        on_progress(done, len(examples))


def _inputs(row: Mapping[str, Any], asked: Mapping[str, Any], template: Template | None) -> dict[str, Any]:
    """Return the columns of a row, its prompt and its reference. asked: the row with the reference as its answer."""
    if template is None:
        *before, reference = [_text_of(message) for message in asked["messages"]]
        prompt = "\n\n".join(before)
    else:
        prompt, reference = template.prompt(asked), str(template_text.as_text(asked[template.answer_column])).strip()
    columns = {name: value for name, value in row.items() if not name.startswith("__")}
    return {"row": columns, "prompt": prompt, "reference": reference}


def _text_of(message: Mapping[str, Any]) -> str:
    """Return what a message says; of one that only calls tools, the calls as JSON."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return str(message["content"] or (json.dumps(calls, ensure_ascii=False) if calls else ""))


def _score(answer: Answer, logprobs: list[list[float]], reference: str) -> dict[str, float]:
    """Return the metrics of a row. logprobs: sum and mean of each reference's."""
    scores = metrics.score_row(answer.text, reference, stopped=answer.stopped, loss=-logprobs[0][1])
    if len(logprobs) == 2:
        scores |= metrics.score_pair(logprobs[0][0], logprobs[1][0])
    return scores


def row_line(item: dict[str, Any]) -> str:
    """Return a row of a comparison as a line of rows.jsonl."""
    results = {key: item[key] for key in ("base_output", "tuned_output", "base", "tuned")}
    return generate.json_line({**item["row"], **results})


def summarise(items: Sequence[Mapping[str, Any]], *, resamples: int, seed: int) -> dict[str, Any]:
    """Return the content of metrics.json: means of both models and their differences with 95% intervals."""
    names = list(items[0]["base"])
    base, tuned = ({name: [item[side][name] for item in items] for name in names} for side in ("base", "tuned"))
    return metrics.summarise(base, tuned, resamples=resamples, seed=seed)
