"""Answer the same rows with the base and the tuned model: one loaded model, with the adapter off and on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from byeori.batch import forest as forests
from byeori.data import audit
from byeori.data.row_kinds import RowKind
from byeori.data.sources import ROW, Table
from byeori.data.template import Template
from byeori.data.tokenize import Encoding, Example, encode_prompt
from byeori.errors import DataError, TemplateError
from byeori.evaluate import generate, metrics, preview
from byeori.model import forward
from byeori.support.console import say


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
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    encoding: Encoding,
    row_kind: RowKind,
    sampling: generate.Sampling,
    *,
    batch_size: int,
    rows_file: Path,
    on_progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Return answers, losses and metrics of both models for every row, in the order of `rows`.

    The first item also has `given`: its prompt as the models read it, with special tokens marked.

    model: a PeftModel. rows_file: each batch is appended as it is finished, so that nothing computed is lost; the rows
    are in order at the end. on_progress: called with (rows done, total).
    """
    template = encoding.template
    asked = [row_kind.asked(row, template) for row in rows]
    # of a conversation the last answer is compared, of a pair both
    whole = asked if row_kind.examples == 1 else rows  # a last turn of weight 0 is compared all the same
    examples = [row_kind.encode(row, encoding)[-row_kind.examples :] for row in whole]
    prompts = [encode_prompt(row, encoding) for row in asked]
    suffix = template.suffix if template else ""

    def run(batch_number: int, batch: list[int]) -> list[dict[str, Any]]:
        items = [_inputs(rows[index], asked[index], template) for index in batch]
        inputs = [prompts[index] for index in batch]
        for side in ("base", "tuned"):
            with model.disable_adapter() if side == "base" else nullcontext():
                forward.use_plain_attention(model)
                answers = generate.answer(
                    model, encoding.tokenizer, inputs, sampling, suffix=suffix, batch_number=batch_number
                )
                logprobs = [_logprobs(model, examples[index]) for index in batch]
            for item, answer, row_logprobs in zip(items, answers, logprobs, strict=True):
                item[f"{side}_output"] = answer.text
                item[side] = _score(answer, row_logprobs, item["reference"])
        return items

    items, _ = generate.run_batches(prompts, batch_size, run, _line, output=rows_file, on_progress=on_progress)
    items[0]["given"] = preview.with_special(prompts[0], encoding.tokenizer)
    return items


def _inputs(row: Mapping[str, Any], asked: Mapping[str, Any], template: Template | None) -> dict[str, Any]:
    """Return the columns of a row, its prompt and its reference. asked: the row with the reference as its answer."""
    if template is None:
        *before, reference = [_text_of(message) for message in asked["messages"]]
        prompt = "\n\n".join(before)
    else:
        prompt, reference = template.prompt(asked), str(asked[template.answer_column]).strip()
    columns = {name: value for name, value in row.items() if not name.startswith("__")}
    return {"row": columns, "prompt": prompt, "reference": reference}


def _text_of(message: Mapping[str, Any]) -> str:
    """Return what a message says; of one that only calls tools, the calls as JSON."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return str(message["content"] or (json.dumps(calls, ensure_ascii=False) if calls else ""))


@torch.no_grad()
def _logprobs(model: Any, examples: list[Example]) -> list[torch.Tensor]:
    """Return the log-probs of the answer's tokens, for each example of a row."""
    return [forward.forest_logprobs(model, forests.build([example]), plain=True) for example in examples]


def _score(answer: generate.Answer, logprobs: list[torch.Tensor], reference: str) -> dict[str, float]:
    loss = -float(logprobs[0].mean())
    scores = metrics.score_row(answer.text, reference, stopped=answer.stopped, loss=loss)
    if len(logprobs) == 2:
        scores |= metrics.score_pair(float(logprobs[0].sum()), float(logprobs[1].sum()))
    return scores


def _line(item: dict[str, Any]) -> str:
    results = {key: item[key] for key in ("base_output", "tuned_output", "base", "tuned")}
    return generate.json_line({**item["row"], **results})


def summarise(items: Sequence[Mapping[str, Any]], *, resamples: int, seed: int) -> dict[str, Any]:
    """Return the content of metrics.json: means of both models and their differences with 95% intervals."""
    names = list(items[0]["base"])
    base, tuned = ({name: [item[side][name] for item in items] for name in names} for side in ("base", "tuned"))
    return metrics.summarise(base, tuned, resamples=resamples, seed=seed)
