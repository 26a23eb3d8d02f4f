"""Answer the same rows with the base and the tuned model: one loaded model, with the adapter off and on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from byeori.data import audit, near_copies, preference
from byeori.data import template as template_text
from byeori.data.few_shots import encode_with_shots
from byeori.data.row_kinds import RowKind
from byeori.data.sources import ROW, Table
from byeori.data.template import Template
from byeori.data.tokenize import Encoding, Example, encode_prompt
from byeori.errors import DataError, ModelError, TemplateError
from byeori.evaluate import baselines, findings, generate, judge, labels, metrics, preview
from byeori.evaluate.engines.base import Answer, Sampling, Side
from byeori.evaluate.measures import Measure
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
    tokens: tuple[list[list[int]], list[list[Example]], list[list[int]]],
    encoding: Encoding,
    row_kind: RowKind,
    sampling: Sampling,
    *,
    measures: Sequence[Measure],
    named: Callable[[int], str],
    journal: Journal,
    progress: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
) -> list[dict[str, Any]]:
    """Return answers, losses and metrics of both models for every row, in the order of `rows`.

    The first item also has `given`: its prompt as the models read it, with special tokens marked.

    tokens: what `examples_of` returns, and `shot_prompts`. journal: keeps what is computed. progress: shows (rows
    done, total). measures: of the user's own. named: what a message calls the row at a position of the table.

    Raises:
        DataError: if a measure fails on a row, or the loss of a row is not a number.
    """
    asked = [row_kind.asked(row, encoding.template) for row in rows]
    prompts, examples, shot_prompts = tokens
    for side in SIDES:
        with progress(f"Losses of the {side} model") as on_progress:
            _losses(open_engine, examples, side, journal, on_progress, [named(row[ROW]) for row in rows])
        with progress(f"Answers of the {side} model") as on_progress:
            generate.answer_side(open_engine, prompts, sampling, side, journal, on_progress)
    if shot_prompts:
        with progress("Answers of the base model with examples in its prompt") as on_progress:
            generate.answer_side(
                open_engine, shot_prompts, sampling, "base", journal, on_progress, name=baselines.FEW_SHOTS
            )
    items = [texts_of(*pair, encoding.template) for pair in zip(rows, asked, strict=True)]
    if row_kind.sides == preference.SIDES:
        for pair, item in zip(rows, items, strict=True):
            rejected = preference.side_row(pair, "rejected", encoding.template)
            item["rejected"] = reference_of(rejected, encoding.template)
    for side in SIDES:
        for row, item in enumerate(items):
            answer, name = Answer(**journal.items[f"{side} {row}"]), named(rows[row][ROW])
            item[f"{side}_output"] = answer.text
            item[side] = _score(answer, journal.items[f"{side} {row} logprobs"], item["reference"])
            item[side] |= own_scores(measures, item, answer.text, named=name)
            if shot_prompts:
                item[baselines.FEW_SHOTS] = journal.items[f"{baselines.FEW_SHOTS} {row}"]["text"]
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


def shot_prompts(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    shots: Sequence[Mapping[str, Any]],
    encoding: Encoding,
    row_kind: RowKind,
    sampling: Sampling,
) -> list[list[int]]:
    """Return the prompt of each row behind as many `shots` as leave room for an answer to every row; [] if none do."""
    asked = [row_kind.asked(row, encoding.template) for row in rows]
    for count in range(len(shots), 0, -1):
        try:
            found = encode_with_shots(asked, prompts, shots[:count], encoding)
        except TemplateError as error:  # a chat template that allows no further turns
            say(f"The base model is not measured with examples in its prompt: {error}")
            return []
        if all(sampling.new_tokens(prompt) == sampling.max_new_tokens for prompt in found):
            return found
    if shots:
        say("The base model is not measured with examples in its prompt: they do not fit into its maximum length")
    return []


def losses_of(
    open_engine: generate.OpenEngine,
    examples: Sequence[list[Example]],
    names: Sequence[str],
    journal: Journal,
    progress: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
) -> dict[str, Any]:
    """Return the mean losses of both models on other rows, and their difference with its interval (see summarise)."""
    losses: dict[str, list[float | None]] = {}
    for side in SIDES:
        with progress(f"Losses of the {side} model on general rows") as on_progress:
            _losses(open_engine, examples, side, journal, on_progress, names, prefix="retention ")
        found = (journal.items[f"retention {side} {row} logprobs"] for row in range(len(examples)))
        losses[side] = [-answers[0][1] for answers in found]
    return metrics.summarise({"loss": losses["base"]}, {"loss": losses["tuned"]}, names=["loss"])


def row_losses(
    open_engine: generate.OpenEngine,
    examples: Sequence[list[Example]],
    names: Sequence[str],
    journal: Journal,
    progress: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
) -> dict[Side, list[float]]:
    """Return the loss of each row with both models: nats a token of its answer, of a pair -log sigmoid(margin)."""
    for side in SIDES:
        with progress(f"Losses of the {side} model") as on_progress:
            _losses(open_engine, examples, side, journal, on_progress, names)
    found = {side: [journal.items[f"{side} {row} logprobs"] for row in range(len(examples))] for side in SIDES}
    return {side: list(map(_loss, logprobs)) for side, logprobs in found.items()}


def _loss(logprobs: list[list[float]]) -> float:
    if len(logprobs) == 1:
        return -logprobs[0][1]
    margin = logprobs[0][0] - logprobs[1][0]
    return max(0.0, -margin) + math.log1p(math.exp(-abs(margin)))


def _losses(
    open_engine: generate.OpenEngine,
    examples: Sequence[list[Example]],
    side: Side,
    journal: Journal,
    on_progress: Callable[[int, int], None],
    names: Sequence[str],
    *,
    prefix: str = "",
) -> None:
    """Put the sum and the mean of each reference's log-probs into the journal, a few rows at a time.

    names: what a message calls the rows.

    Raises:
        ModelError: if a log-prob is not finite: a mean over the other rows would hide that.
    """
    missing = [row for row in range(len(examples)) if f"{prefix}{side} {row} logprobs" not in journal.items]
    done = len(examples) - len(missing)
    for start in range(0, len(missing), _ROWS):
        rows = missing[start : start + _ROWS]
        values = iter(open_engine().logprobs([example for row in rows for example in examples[row]], side))
        for row in rows:
            found = [next(values) for _ in examples[row]]
            if not all(math.isfinite(sum(item)) for item in found):
                raise ModelError(
                    f"the {side} model gives the reference of {names[row]} a log-prob that is not a finite number; try "
                    "--dtype float32, or look for damaged weights"
                )
            journal.add(f"{prefix}{side} {row} logprobs", [[sum(item), sum(item) / len(item)] for item in found])
        done += len(rows)
        on_progress(done, len(examples))


def texts_of(row: Mapping[str, Any], asked: Mapping[str, Any], template: Template | None) -> dict[str, Any]:
    """Return the columns of a row, its prompt, the texts in it that are the row's own, and its reference.

    asked: the row with the reference as its answer.
    """
    if template is None:
        before = [_text_of(message) for message in asked["messages"][:-1]]
        prompt = "\n\n".join(before)
        inputs = [_text_of(message) for message in asked["messages"][:-1] if message["role"] != "system"]
    else:
        prompt = template.prompt(asked)
        inputs = [str(value) for name in template.prompt_columns if (value := template_text.as_text(asked.get(name)))]
    columns = {name: value for name, value in row.items() if not name.startswith("__")}
    return {"row": columns, "prompt": prompt, "inputs": inputs, "reference": reference_of(asked, template)}


def input_of(item: Mapping[str, Any], template: Template | None) -> str:
    """Return what an item asks, without the template's own text, which is the same in every row."""
    return "\n".join(item["inputs"]) if template else str(item["prompt"])


def reference_of(asked: Mapping[str, Any], template: Template | None) -> str:
    """Return the answer that a row holds. asked: what its kind's `asked` returns."""
    if template is None:
        return _text_of(asked["messages"][-1])
    return str(template_text.as_text(asked[template.answer_column])).strip()


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


def own_scores(measures: Sequence[Measure], item: Mapping[str, Any], answer: str, *, named: str) -> dict[str, float]:
    """Return the user's own measures of an answer to a row, those of single rows."""
    of_rows = [measure for measure in measures if measure.score]
    return {measure.name: measure.of_row(item["row"], item["reference"], answer, named=named) for measure in of_rows}


def row_line(item: dict[str, Any]) -> str:
    """Return a row of a comparison as a line of rows.jsonl."""
    results = {key: item[key] for key in ("base_output", "tuned_output", "base", "tuned")}
    return generate.json_line({**item["row"], **results})


def row_line_of_runs(items: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a row of a comparison of several runs as a line of rows.jsonl. items: by run."""
    first = next(iter(items.values()))
    runs = {run: {"output": item["tuned_output"], "tuned": item["tuned"]} for run, item in items.items()}
    return generate.json_line(
        {**first["row"], "base_output": first["base_output"], "base": first["base"], "runs": runs}
    )


def summarise(
    items: Sequence[Mapping[str, Any]],
    *,
    measures: Sequence[Measure] = (),
    judged: Mapping[str, Any] | None = None,
    trained_answers: Sequence[str] = (),
    trained_rows: Sequence[int] = (),
    near_rows: Sequence[int] = (),
    repeated: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the content of metrics.json: means of both models and their differences with 95% intervals, what the
    baselines score, and findings.

    trained_answers: the answers of the rows that the adapter was trained on, as far as they are known. trained_rows:
    indices of the items among them; near_rows: of those that are near copies of them; repeated: of those that are near
    copies of earlier items (repeated_rows).
    """
    result = paired(items, measures)
    simple = baselines.of_items(items, trained_answers)
    result["baselines"] = baselines.measure(items, simple, measures)
    known = {*trained_rows, *near_rows}
    others = _without(items, known, measures) if known else None
    result["findings"] = findings.find(items, result, trained_rows, others, near_rows, trained_answers)
    if repeated:
        distinct = _without(items, {*repeated}, measures)
        result["findings"].append(findings.repeated(repeated, len(items), distinct))
    if judged:
        result["judge"] = dict(judged)
        said = {"name": "judge", "sentence": judge.sentence(judged, len(items)), "undermines": False}
        result["findings"].insert(0, said)
    if any(measure.name == "label" for measure in measures):
        references = [item["reference"] for item in items]
        result["confusion"] = {
            side: labels.confusion(references, [item[f"{side}_output"] for item in items]) for side in SIDES
        }
    return result


def _without(
    items: Sequence[Mapping[str, Any]], left_out: set[int], measures: Sequence[Measure]
) -> dict[str, Any] | None:
    """Return the numbers without some of the items, None if too few are left to say anything."""
    rest = [item for row, item in enumerate(items) if row not in left_out]
    return paired(rest, measures) if len(rest) >= metrics.FEWEST_ROWS else None


def repeated_rows(items: Sequence[Mapping[str, Any]], on_progress: near_copies.OnProgress) -> list[int]:
    """Return the indices of items whose input is a near copy of an earlier item's and whose reference is the same."""
    asked = ["\n".join(item["inputs"]) for item in items]
    references = [near_copies.key(item["reference"]) for item in items]
    first: dict[tuple[bytes, bytes], int] = {}
    for row, key in enumerate(zip(map(near_copies.key, asked), references, strict=True)):
        first.setdefault(key, row)
    rows = list(first.values())
    near = {
        rows[j]
        for i, j, _ in near_copies.pairs([asked[row] for row in rows], on_progress=on_progress)
        if references[rows[i]] == references[rows[j]] and near_copies.same_numbers(asked[rows[i]], asked[rows[j]])
    }
    return sorted(({*range(len(items))} - {*rows}) | near)


def paired(items: Sequence[Mapping[str, Any]], measures: Sequence[Measure], confidence: float = 0.95) -> dict[str, Any]:
    """Return means and differences (see metrics.summarise), and under `measures` what the user's own are called."""
    base, tuned = (values_of(items, side, measures) for side in SIDES)
    result = metrics.summarise(base, tuned, names=list(base), confidence=confidence)
    about: dict[str, Any] = {
        item.name: {"heading": item.heading, "about": item.about, "digits": item.digits} for item in measures
    }
    if "judge" in items[0]["base"]:
        note = "answers that the judge prefers in both orders, a tie counting half, %"
        about["judge"] = {"heading": "Preferred by the judge", "about": note, "digits": 1}
    return result | ({"measures": about} if about else {})


def values_of(
    items: Sequence[Mapping[str, Any]], side: Side, measures: Sequence[Measure]
) -> dict[str, list[float | None]]:
    """Return the values of the rows by metric, of one model."""
    references, answers = ([item[key] for item in items] for key in ("reference", f"{side}_output"))
    values: dict[str, list[float | None]] = {name: [item[side][name] for item in items] for name in items[0]["base"]}
    for measure in measures:
        if measure.over_all:
            values[measure.name] = measure.over_all(references, answers).tolist()
    return values
