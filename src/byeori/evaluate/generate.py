"""Answers from a model: batched with left padding, greedy or sampled, stopped where an answer ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from byeori.data import sources, tokenize
from byeori.data.tokenize import Encoding
from byeori.errors import ConfigError, DataError, TemplateError
from byeori.evaluate import stop_tokens
from byeori.support.text_files import read_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How answers are made; the settings of the same names."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """text: without special tokens. stopped: whether the model ended it by itself. tokens: how many it wrote."""

    text: str
    stopped: bool
    tokens: int


def batches(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Indices of prompts that are answered together: of similar length, longest first, so that padding is short."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    *,
    suffix: str = "",
    positions: int | None = None,
    number: int = 0,
    stream: Callable[[str], None] | None = None,
) -> list[Answer]:
    """Answer one batch of prompts (token ids). number: of the batch; each draws other samples.

    suffix: the template's words after the answer; the answer ends there too.
    positions: answers end where the model's positions do.
    stream: is given the text as it grows (one prompt only).

    Raises:
        TemplateError: a prompt is empty, or fills all positions.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    room = how.max_new_tokens if positions is None else min(how.max_new_tokens, positions - width)
    if not all(prompts):
        raise TemplateError("the prompt is empty, and a model cannot answer nothing; give it some text")
    if room < 1:
        raise TemplateError(
            f"a prompt of {width} tokens leaves no room for an answer in {positions} positions; shorten it"
        )
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    ends = stop_tokens.stop_ids(tokenizer, getattr(model.generation_config, "eos_token_id", None))
    torch.manual_seed(how.seed * 1_000_003 + number)
    sampled = {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k} if how.temperature else {}
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=bool(how.temperature),
        max_new_tokens=room,
        repetition_penalty=1.0,
        logits_processor=_penalty(how.repetition_penalty, mask),
        eos_token_id=ends or None,
        pad_token_id=pad,
        streamer=_streamer(tokenizer, stream) if stream else None,
        **({"stop_strings": [suffix], "tokenizer": tokenizer} if suffix.strip() else {}),
        **sampled,
    )
    return [_answer(tokenizer, row[width:].tolist(), ends, suffix) for row in output]


def _penalty(penalty: float, mask: torch.Tensor) -> list[Any]:
    """transformers' repetition penalty, blind to the padding: its token often is the end-of-text token as well."""
    if penalty == 1.0:
        return []
    from transformers import RepetitionPenaltyLogitsProcessor

    inner = RepetitionPenaltyLogitsProcessor(penalty)

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        real = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1).bool()
        return inner(torch.where(real, ids, ids[:, mask.shape[1] - 1 :][:, :1]), scores)

    return [process]


def _answer(tokenizer: Any, ids: list[int], ends: list[int], suffix: str) -> Answer:
    stop = next((index for index, token in enumerate(ids) if token in ends), None)
    kept = ids if stop is None else ids[:stop]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    stopped = stop is not None
    if suffix.strip() and suffix.strip() in text:
        text, stopped = text.split(suffix.strip())[0], True
    return Answer(text=text.strip(), stopped=stopped, tokens=len(kept))


def _streamer(tokenizer: Any, emit: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """transformers' streamer, with its text given to `emit`."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            emit(text + ("\n" if stream_end else ""))

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


# ---- tables, and text from the command line ----------------------------------------------------------------------


def encode_prompts(rows: Sequence[Mapping[str, Any]], how: Encoding, name: Callable[[int], str]) -> list[list[int]]:
    """The prompt of every row.

    name: how the user finds a row, from its position.

    Raises:
        DataError: a row has no text where the prompt needs it.
    """
    prompts = []
    for row in rows:
        try:
            prompts.append(tokenize.encode_prompt(row, how))
        except TemplateError as error:
            raise DataError(f"{name(int(row[sources.ROW]))}: {error}; mend the row or take it out") from None
    return prompts


def answer_rows(
    model: Any,
    how: Encoding,
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    column: str,
    batch_size: int,
    positions: int | None,
    on_batch: Callable[[str], None],
    on_progress: Callable[[int, int], None],
) -> tuple[list[str], str]:
    """Answer every row: the answers, and a jsonl text of the rows with a `column` of answers, both in the rows' order.

    on_batch: is given the lines of every finished batch (longest prompts first), so that nothing computed is lost.
    on_progress: called with rows done and rows in all.
    """
    suffix = how.template.suffix if how.template else ""
    answers: dict[int, str] = {}

    def line(index: int) -> str:
        row = {name: value for name, value in rows[index].items() if name != sources.ROW}
        return json.dumps({**row, column: answers[index]}, ensure_ascii=False, default=str) + "\n"

    where: dict[str, Any] = {"suffix": suffix, "positions": positions}
    for number, batch in enumerate(batches(prompts, batch_size)):
        found = answer(model, how.tokenizer, [prompts[i] for i in batch], sampling, number=number, **where)
        answers.update({index: item.text for index, item in zip(batch, found, strict=True)})
        on_batch("".join(map(line, batch)))
        on_progress(len(answers), len(rows))
    return [answers[index] for index in range(len(rows))], "".join(map(line, range(len(rows))))


def answer_column(columns: Sequence[str]) -> str:
    """`output`, or the next free name where the rows have such a column (Alpaca's answers are one)."""
    names = ("output", *(f"output_{number}" for number in range(2, len(columns) + 3)))
    return next(name for name in names if name not in columns)


def text_or_file(value: str) -> str:
    """A flag's text; `@file` is the file's text.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not value.startswith("@"):
        return value
    try:
        return read_text(Path(value[1:]), ConfigError)
    except OSError as error:
        raise ConfigError(f"cannot read {value[1:]}: {error.strerror}; check the path behind the @") from None


def standard_input(what: str) -> str:
    """What stands on standard input; asked for where a person sits there.

    Raises:
        ConfigError: nothing stands there.
    """
    missing = f"{what} is missing: give it as a flag or on standard input"
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigError(missing)
    if sys.stdin.isatty():
        print(f"Type {what}, then Ctrl-D:", file=sys.stderr)
    try:
        text = sys.stdin.read().strip("\n")
    except UnicodeDecodeError:
        raise ConfigError(f"{what} on standard input is not UTF-8; convert it, for instance with iconv") from None
    if not text.strip():
        raise ConfigError(missing)
    return text
