"""Answer the same rows with the base and the tuned model: one loaded model, with the adapter off and on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from byeori.batch import forest as forests
from byeori.data import audit
from byeori.data.row_kinds import RowKind
from byeori.data.sources import ROW, Table
from byeori.data.tokenize import Encoding, Example, encode_prompt
from byeori.errors import DataError, TemplateError
from byeori.evaluate import generate, metrics, preview
from byeori.model import forward
from byeori.support import atomic_files
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
    max_length: int | None = None,
    on_progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Return answers, losses and metrics of both models for every row, in the order of `rows`.

    The first item also has `given`: its prompt as the models read it, with special tokens marked.

    model: a PeftModel. rows_file: each batch is appended as it is finished, so that nothing computed is lost; the rows
    are in order at the end. max_length: of prompt and answer, in tokens. on_progress: called with (rows done, total).
    """
    asked = [row_kind.asked(row, encoding.template) for row in rows]
    # of a conversation the last answer is compared, of a pair both
    examples = [row_kind.encode(row, encoding)[-row_kind.examples :] for row in rows]
    prompts = [encode_prompt(row, encoding) for row in asked]
    items: dict[int, dict[str, Any]] = {}
    atomic_files.write(rows_file, "")
    for number, batch in enumerate(generate.batches(prompts, batch_size)):
        inputs = [prompts[index] for index in batch], [examples[index] for index in batch]
        sides = {}
        for side in ("base", "tuned"):
            with model.disable_adapter() if side == "base" else nullcontext():
                sides[side] = _run_side(model, *inputs, encoding, sampling, max_length, number)
        for place, index in enumerate(batch):
            results = {side: results[place] for side, results in sides.items()}
            items[index] = _item(rows[index], asked[index], encoding, results)
        generate.append(rows_file, "".join(_line(items[index]) for index in batch))
        on_progress(len(items), len(rows))
    ordered = [items[index] for index in range(len(rows))]
    ordered[0]["given"] = preview.with_special(prompts[0], encoding.tokenizer)
    atomic_files.write(rows_file, "".join(map(_line, ordered)))
    return ordered


def _run_side(
    model: Any,
    prompts: list[list[int]],
    examples: list[list[Example]],
    encoding: Encoding,
    sampling: generate.Sampling,
    max_length: int | None,
    batch_number: int,
) -> list[tuple[generate.Answer, list[torch.Tensor]]]:
    """Return one model's answers to a batch, with its log-probs of the tokens of each row's references."""
    forward.use_plain_attention(model)
    suffix = encoding.template.suffix if encoding.template else ""
    limits: dict[str, Any] = {"suffix": suffix, "max_length": max_length, "batch_number": batch_number}
    answers = generate.answer(model, encoding.tokenizer, prompts, sampling, **limits)
    with torch.no_grad():
        logprobs = [
            [forward.forest_logprobs(model, forests.build([example]), plain=True) for example in group]
            for group in examples
        ]
    return list(zip(answers, logprobs, strict=True))


def _item(
    row: Mapping[str, Any],
    asked: Mapping[str, Any],
    encoding: Encoding,
    sides: dict[str, tuple[generate.Answer, list[torch.Tensor]]],
) -> dict[str, Any]:
    """Return one row of the report. asked: the row with the reference as its answer."""
    if encoding.template is None:
        turns = asked.get("messages") or asked.get("conversations") or [{}]
        *before, reference = [str(turn.get("content") or turn.get("value") or "") for turn in turns]
        prompt = "\n\n".join(before)
    else:
        reference = str(asked[encoding.template.answer_column]).strip()
        prompt = encoding.template.prompt(asked)
    columns = {name: value for name, value in row.items() if not name.startswith("__")}
    item: dict[str, Any] = {"row": columns, "prompt": prompt, "reference": reference}
    for side, (answer, logprobs) in sides.items():
        loss = -float(logprobs[0].mean())
        item[f"{side}_output"] = answer.text
        item[side] = metrics.score_row(answer.text, reference, stopped=answer.stopped, loss=loss)
        if len(logprobs) == 2:
            item[side] |= metrics.score_pair(float(logprobs[0].sum()), float(logprobs[1].sum()))
    return item


def _line(item: dict[str, Any]) -> str:
    results = {key: item[key] for key in ("base_output", "tuned_output", "base", "tuned")}
    return generate.json_line({**item["row"], **results})


def summarise(items: Sequence[Mapping[str, Any]], *, resamples: int, seed: int) -> dict[str, Any]:
    """Return the content of metrics.json: means of both models and their differences with 95% intervals."""
    names = list(items[0]["base"])
    base, tuned = ({name: [item[side][name] for item in items] for name in names} for side in ("base", "tuned"))
    return metrics.summarise(base, tuned, resamples=resamples, seed=seed)
