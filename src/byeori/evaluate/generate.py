"""Generate answers: batches with left padding, greedy or sampled, ending at a stop token or the template's suffix."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from byeori.data import sources, tokenize
from byeori.data.tokenize import Encoding
from byeori.errors import DataError, TemplateError
from byeori.evaluate import stop_tokens
from byeori.model.forward import accelerated
from byeori.model.streamer import text_streamer
from byeori.support import atomic_files


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Sampling parameters, under the names of their settings, and the model's limit. temperature 0: greedy decoding.

    max_length: of prompt and answer in tokens; None for no limit.
    """

    max_new_tokens: int
    max_length: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer. text: without special tokens. stopped: ended by the model, not by a limit. tokens: generated."""

    text: str
    stopped: bool
    tokens: int


def batches(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Group the indices of prompts of similar length, longest first, to keep the padding short."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    suffix: str = "",
    batch_number: int = 0,
    stream: Callable[[str], None] | None = None,
) -> list[Answer]:
    """Answer one batch of prompts (token ids).

    suffix: the template's text after the answer, which ends the answer too. batch_number: enters the seed, so that each
    batch draws its own samples. stream: called with each new piece of text (one prompt only).

    Raises:
        TemplateError: if a prompt is empty or leaves no room for an answer.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    limit = sampling.max_length
    new_tokens = sampling.max_new_tokens if limit is None else min(sampling.max_new_tokens, limit - width)
    if not all(prompts):
        raise TemplateError("the prompt is empty; give it some text")
    if new_tokens < 1:
        raise TemplateError(
            f"a prompt of {width} tokens leaves no room for an answer within the model's maximum length of {limit}; "
            "shorten it"
        )
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    stop_ids = stop_tokens.stop_ids(tokenizer, getattr(model.generation_config, "eos_token_id", None))
    torch.manual_seed(sampling.seed * 1_000_003 + batch_number)
    names = ("temperature", "top_p", "top_k") if sampling.temperature else ()
    with accelerated(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=bool(sampling.temperature),
            max_new_tokens=new_tokens,
            repetition_penalty=1.0,
            logits_processor=_repetition_penalty(sampling.repetition_penalty, mask),
            eos_token_id=stop_ids or None,
            pad_token_id=pad,
            streamer=text_streamer(tokenizer, stream) if stream else None,
            **({"stop_strings": [suffix], "tokenizer": tokenizer} if suffix.strip() else {}),
            **{name: getattr(sampling, name) for name in names},
        )
    return [_answer(tokenizer, row[width:].tolist(), stop_ids, suffix) for row in output]


def _repetition_penalty(penalty: float, mask: torch.Tensor) -> list[Any]:
    """Return transformers' repetition penalty, applied to real tokens only (Keskar et al. 2019, CTRL).

    The padding is often the end-of-text token as well, which must not be penalised because a prompt was padded.
    """

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        real = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1).bool()
        ids = torch.where(real, ids, ids[:, mask.shape[1] - 1 :][:, :1])
        seen = scores.gather(1, ids)
        return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))

    return [] if penalty == 1.0 else [process]


def _answer(tokenizer: Any, ids: list[int], stop_ids: list[int], suffix: str) -> Answer:
    stop = next((index for index, token in enumerate(ids) if token in stop_ids), None)
    text = tokenizer.decode(ids[:stop], skip_special_tokens=True)
    stopped = stop is not None
    if suffix.strip() and suffix.strip() in text:
        text, stopped = text.split(suffix.strip())[0], True
    return Answer(text=text.strip(), stopped=stopped, tokens=len(ids[:stop]))


# ---- tables ------------------------------------------------------------------------------------------------------


def encode_prompts(
    rows: Sequence[Mapping[str, Any]], encoding: Encoding, row_name: Callable[[int], str]
) -> list[list[int]]:
    """Return the token ids of every row's prompt. row_name: file and line of a row, given its position.

    Raises:
        DataError: if a row has no text for a column of the prompt.
    """
    prompts = []
    for row in rows:
        try:
            prompts.append(tokenize.encode_prompt(row, encoding))
        except TemplateError as error:
            raise DataError(f"{row_name(int(row[sources.ROW]))}: {error}; fix or remove the row") from None
    return prompts


def answer_rows(
    model: Any,
    encoding: Encoding,
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    column: str,
    batch_size: int,
    output: Path | None,
    on_progress: Callable[[int, int], None],
) -> tuple[list[str], str]:
    """Answer every row; returns the answers, and the rows as jsonl text with the answers in `column`.

    output: the file for the jsonl text, see `run_batches`. on_progress: called with (rows done, total).
    """
    suffix = encoding.template.suffix if encoding.template else ""

    def run(batch_number: int, batch: list[int]) -> list[dict[str, Any]]:
        inputs = [prompts[index] for index in batch]
        answers = answer(model, encoding.tokenizer, inputs, sampling, suffix=suffix, batch_number=batch_number)
        columns = [{name: rows[index][name] for name in rows[index] if name != sources.ROW} for index in batch]
        return [{**row, column: item.text} for row, item in zip(columns, answers, strict=True)]

    answered, text = run_batches(prompts, batch_size, run, json_line, output=output, on_progress=on_progress)
    return [row[column] for row in answered], text


def run_batches(
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    run: Callable[[int, list[int]], list[dict[str, Any]]],
    line: Callable[[dict[str, Any]], str],
    *,
    output: Path | None,
    on_progress: Callable[[int, int], None],
) -> tuple[list[dict[str, Any]], str]:
    """Return the results of all prompts in order, and their lines. run: (batch number, indices) -> results.

    output: a file for the lines; each batch is appended when it is finished (longest prompts first), so that nothing
    computed is lost, and the lines are in order at the end.
    """
    results: dict[int, dict[str, Any]] = {}
    if output:
        atomic_files.write(output, "")
    for number, batch in enumerate(batches(prompts, batch_size)):
        results.update(zip(batch, run(number, batch), strict=True))
        if output:
            with atomic_files.disk_errors(output), output.open("a", encoding="utf-8") as file:
                file.writelines(line(results[index]) for index in batch)
        on_progress(len(results), len(prompts))
    ordered = [results[index] for index in range(len(prompts))]
    text = "".join(map(line, ordered))
    if output:
        atomic_files.write(output, text)
    return ordered, text


def json_line(item: Mapping[str, Any]) -> str:
    """Return one line of a jsonl file; dates and other types that JSON lacks become text."""
    return json.dumps(item, ensure_ascii=False, default=str) + "\n"


def answer_column(columns: Sequence[str]) -> str:
    """Return `output`, or `output_2`, ... if the rows already have such a column, as Alpaca's do."""
    names = ("output", *(f"output_{number}" for number in range(2, len(columns) + 3)))
    return next(name for name in names if name not in columns)
