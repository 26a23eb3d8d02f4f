"""Base and tuned answer the same rows, from one loaded model with the adapter off and on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from byeori.batch import forest as forests
from byeori.data import audit, preference, tokenize
from byeori.data.chat import until_last_answer
from byeori.data.preference import encode_pair, side_row
from byeori.data.sources import ROW, Table
from byeori.data.tokenize import Encoding, Example, encode_prompt, encode_row
from byeori.errors import DataError, TemplateError
from byeori.evaluate import generate, preview
from byeori.evaluate import metrics as scores
from byeori.model import forward
from byeori.support import atomic_files

ROWS = "rows.jsonl"


def compare_rows(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    how: Encoding,
    sampling: generate.Sampling,
    *,
    batch_size: int,
    rows_file: Path,
    positions: int | None = None,
    on_progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Answers, losses and scores of both models for every row, in the order of `rows`; the first has its prompt's text
    as it was `given`, special tokens apart.

    model: a PeftModel. rows_file: every finished batch is appended to it at once, so nothing computed is lost; at the
    end it holds the rows in their order. positions: the model's, where it has a limit.
    on_progress: called with rows done and rows in all.
    """
    examples = [encode_pair(row, how) if how.group == 2 else [encode_row(row, how)] for row in rows]
    answered = [side_row(row, "chosen", how.template) if how.group == 2 else until_last_answer(row) for row in rows]
    prompts = [encode_prompt(row, how) for row in answered]
    done: dict[int, dict[str, Any]] = {}
    atomic_files.write(rows_file, "")
    for number, batch in enumerate(generate.batches(prompts, batch_size)):
        sides = {}
        for side, off in (("base", True), ("tuned", False)):
            with model.disable_adapter() if off else nullcontext():
                asked = [prompts[i] for i in batch], [examples[i] for i in batch]
                sides[side] = _side(model, *asked, how, sampling, positions, number)
        with atomic_files.disk_errors(rows_file), rows_file.open("a", encoding="utf-8") as file:
            for place, index in enumerate(batch):
                found = {side: found[place] for side, found in sides.items()}
                done[index] = _item(rows[index], answered[index], how, found)
                file.write(_line(done[index]))
        on_progress(len(done), len(rows))
    items = [done[index] for index in range(len(rows))]
    items[0]["given"] = preview.with_special(prompts[0], how.tokenizer)
    atomic_files.write(rows_file, "".join(map(_line, items)))
    return items


def _side(
    model: Any,
    prompts: list[list[int]],
    examples: list[list[Example]],
    how: Encoding,
    sampling: generate.Sampling,
    positions: int | None,
    number: int,
) -> list[tuple[generate.Answer, list[torch.Tensor]]]:
    """One model's answers to a batch, and its log-probs of each reference's tokens (and of a rejected answer's)."""
    suffix = how.template.suffix if how.template else ""
    forward.use_plain_attention(model)
    where: dict[str, Any] = {"suffix": suffix, "positions": positions, "number": number}
    answers = generate.answer(model, how.tokenizer, prompts, sampling, **where)
    with torch.no_grad():
        logprobs = [
            [forward.forest_logprobs(model, forests.build([example]), plain=True) for example in group]
            for group in examples
        ]
    return list(zip(answers, logprobs, strict=True))


def _item(
    shown: Mapping[str, Any],
    row: Mapping[str, Any],
    how: Encoding,
    sides: dict[str, tuple[generate.Answer, list[torch.Tensor]]],
) -> dict[str, Any]:
    shown = {name: value for name, value in shown.items() if not name.startswith("__")}
    if how.template is None:
        turns = row.get("messages") or row.get("conversations") or [{}]
        reference = str(turns[-1].get("content") or turns[-1].get("value") or "")
        prompt = "\n\n".join(str(turn.get("content") or turn.get("value")) for turn in turns[:-1])
    else:
        reference, prompt = str(row[how.template.answer_column]).strip(), how.template.prompt(row)
    item: dict[str, Any] = {"row": shown, "prompt": prompt, "reference": reference}
    for side, (answer, logprobs) in sides.items():
        item[f"{side}_output"] = answer.text
        loss = -float(logprobs[0].mean())
        item[side] = scores.score_row(answer.text, reference, stopped=answer.stopped, loss=loss)
        if len(logprobs) == 2:
            item[side] |= scores.score_pair(float(logprobs[0].sum()), float(logprobs[1].sum()))
    return item


def _line(item: dict[str, Any]) -> str:
    kept = {**item["row"], **{key: item[key] for key in ("base_output", "tuned_output", "base", "tuned")}}
    return json.dumps(kept, ensure_ascii=False, default=str) + "\n"


def metrics(items: Sequence[Mapping[str, Any]], *, resamples: int, seed: int) -> dict[str, Any]:
    """metrics.json: means of both models and their difference with paired-bootstrap 95% intervals."""
    names = list(items[0]["base"])
    base, tuned = ({name: [item[side][name] for item in items] for name in names} for side in ("base", "tuned"))
    return scores.summarise(base, tuned, resamples=resamples, seed=seed)


def comparable(table: Table, how: Encoding, policy: str, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows that can be compared: with a prompt and an answer.

    Raises:
        DataError: a row has none and nobody asked to drop such rows, or no row is left.
    """
    kept, bad = [], []
    for row in table.rows:
        try:
            preference.encode_pair(row, how) if how.group == 2 else tokenize.encode_row(row, how)
        except TemplateError as error:
            bad.append({"row": table.name(row[ROW]), "reason": str(error)})
        else:
            kept.append(dict(row))
    if bad and policy == "stop":
        raise DataError(f"{audit.named(bad)}; mend the data, or drop such rows with --on_bad_rows drop")
    if not kept:
        raise DataError(
            f"no row of {', '.join(path for path, _ in table.parts)} can be compared: each lacks a text or an answer"
        )
    if bad:
        tell(f"{len(bad):,} row{'' if len(bad) == 1 else 's'} dropped: {audit.named(bad)}")
    return kept
