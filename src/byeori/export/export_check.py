"""Does the export answer as the original? The same rows through both: ids of the prompts, greedy answers.

    rows ──> prompt ids as trained ─┬─> transformers, float32 ──> answers ─┐
      └────> chat request ──────────┴─> the engine ──> prompt ids, answers ─┴─> equal, or the first difference

Prompt ids must be equal. Answers may part where the original itself all but tosses a coin: at the first difference its
log-probs of both tokens may be no further apart than the rounding of the export's weights explains (`LIMITS`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from byeori.artifacts import saved_model
from byeori.artifacts.saved_model import SavedModel
from byeori.data import places, row_kinds, served_template, sources, tokenize
from byeori.data.conversation import conversation
from byeori.data.template import Template
from byeori.errors import ByeoriError, TemplateError
from byeori.evaluate import stop_tokens

LIMITS = {"f32": 0.1, "bf16": 0.5, "f16": 0.5, "q8_0": 1.0, "q6_k": 1.5, "q5_k_m": 2.0, "q4_k_m": 3.0}
"""How much likelier, in nats, the original may find its own token where the answers part, by the export's weights."""

_LONGEST = 1024
_TEXT = "Write a title for this text: There is no traffic light at the crossing in front of the village library."


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One prompt. ids: as trained. request: the chat request that makes a server send it."""

    ids: list[int]
    request: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What an engine made of one row. prompt: ids. answer: ids without the token that ends it; None: not asked."""

    prompt: list[int]
    answer: list[int] | None


def rows_of(saved: SavedModel, data_path: Sequence[str], count: int, new_tokens: int) -> tuple[list[Row], str]:
    """Return the first rows of the table that fit the model, or of those it was trained on, and their origin.

    Raises:
        ByeoriError: if the table that is given cannot be read.
    """
    template = _template(saved)
    # servers make tokens of text that looks like control tokens, whatever the training did
    encoding = replace(saved_model.encoding(saved, template), special_tokens_in_text="keep")
    longest = min(_LONGEST, (saved.max_length or sys.maxsize) - new_tokens)
    for table, origin in ((_table(saved, data_path, count), "rows"), ([_made_up(template)], "made-up text")):
        found = (_row(row, saved, template, encoding) for row in table)
        if fitting := list(islice((row for row in found if row and len(row.ids) <= longest), count)):
            return fitting, origin
    return [], "no row"


def _template(saved: SavedModel) -> Template | None:
    try:
        return saved_model.template_of(saved, None)
    except TemplateError:
        raise TemplateError(
            f"{saved.name} has neither a saved template nor a chat template, so no server can build its prompt; train "
            "it with one, or pass --check off"
        ) from None


def _table(saved: SavedModel, data_path: Sequence[str], count: int) -> Iterator[Mapping[str, Any]]:
    paths = list(data_path) or saved.settings.get("data_path") or []
    if not data_path and not places.are_local(paths):
        return
    kind = row_kinds.recorded(saved.settings)
    template = _template(saved)
    columns = template.columns if template else []
    settings = {"dataset_split": "train"} | saved.settings | {"data_path": paths}
    try:
        table = sources.load_recorded(settings, max_rows=4 * count).with_columns(columns, optional=columns).rows
    except ByeoriError:
        if data_path:
            raise
        return  # the training rows are no longer where they were
    for row in table:
        plain = set(kind.answer_columns) <= set(row)
        yield (kind if plain else row_kinds.ANSWER).asked(row, template) if plain else row


def _made_up(template: Template | None) -> dict[str, Any]:
    if template:
        return dict.fromkeys(template.prompt_columns, _TEXT)
    return {"messages": [{"role": "user", "content": _TEXT}]}


def _row(row: Mapping[str, Any], saved: SavedModel, template: Template | None, encoding: Any) -> Row | None:
    """Return a row as prompt and request; None for one that cannot be used."""
    try:
        if template:
            request = served_template.request(template, row)
            bare = {name: value for name, value in row.items() if name in template.prompt_columns}
            return Row(ids=tokenize.encode_prompt(bare, encoding), request=request)
        read = conversation(row)
        messages = list(read.messages[:-1] if read.messages[-1]["role"] == "assistant" else read.messages)
        request = {"messages": messages} | ({"tools": list(read.tools)} if read.tools else {})
        return Row(ids=tokenize.encode_prompt({**row, "messages": messages}, encoding), request=request)
    except TemplateError:
        return None


# ---- comparing -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def compare(
    saved: SavedModel, rows: Sequence[Row], served: Mapping[str, Sequence[Served | None]], limit: float, new_tokens: int
) -> tuple[dict[str, Any], str]:
    """Compare what engines made of the rows with the original, which is loaded here.

    served: engine -> what it made of each row, None for a row that it cannot be asked.

    Returns the report, and what is wrong in one sentence ("" if nothing).
    """
    tokenizer = saved.tokenizer
    engines: dict[str, Any] = {}
    wrong: list[str] = []
    for engine, items in served.items():
        asked = [(row, item) for row, item in zip(rows, items, strict=True) if item]
        unequal = [(row.ids, item.prompt) for row, item in asked if row.ids != item.prompt]
        if unequal:
            wrong.append(_unequal_prompt(engine, *unequal[0], tokenizer, len(unequal)))
        engines[engine] = {"rows": len(asked), "equal_prompts": len(asked) - len(unequal)}
    if wrong:
        return engines, "; ".join(wrong)
    model = saved_model.load_weights(saved, "float32", torch.device("cpu"))
    stops = stops_of(model, tokenizer)
    answers = [greedy(model, row.ids, stops, new_tokens, tokenizer.pad_token_id) for row in rows]
    for engine, items in served.items():
        shown = []
        for row, answer, item in zip(rows, answers, items, strict=True):
            if item is None or item.answer is None:
                continue
            compared = _compared(model, row.ids, answer, item.answer, stops, tokenizer)
            shown.append(compared)
            if compared.get("gap", 0) > limit:
                wrong.append(
                    f"{engine} answers {compared['export']!r} where the original answers {compared['original']!r}, and "
                    f"they part at {compared['original_token']!r}, {compared['gap']:.2f} nats likelier in the original "
                    f"than {compared['export_token']!r} ({limit} are allowed)"
                )
        if shown:
            engines[engine] |= {"equal_answers": sum("gap" not in item for item in shown), "answers": shown}
    return engines, wrong[0] if wrong else ""


def stops_of(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer of a loaded model."""
    return stop_tokens.stop_ids(tokenizer, getattr(model.generation_config, "eos_token_id", None))


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], stops: list[int], new_tokens: int, pad: int | None) -> list[int]:
    """Return the greedy answer's ids, without the token that ends it."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": stops or None, "pad_token_id": pad}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), repetition_penalty=1.0, **settings)
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer[: next((at for at, token in enumerate(answer) if token in stops), None)]


def _compared(
    model: Any, prompt: list[int], original: list[int], export: list[int], stops: list[int], tokenizer: Any
) -> dict[str, Any]:
    """Return both answers, and where they part: the tokens there, and how much likelier the original finds its own."""
    texts = {"original": tokenizer.decode(original), "export": tokenizer.decode(export)}
    if original == export:
        return texts
    at = next((i for i, (a, b) in enumerate(zip(original, export, strict=False)) if a != b), None)
    at = min(len(original), len(export)) if at is None else at
    logprobs = model(torch.tensor([[*prompt, *original[:at]]])).logits[0, -1].float().log_softmax(-1)

    def token(answer: list[int]) -> tuple[str, float]:
        """The token that follows, or the likeliest one that ends an answer."""
        if at < len(answer):
            return tokenizer.decode([answer[at]]), float(logprobs[answer[at]])
        return "<end>", max((float(logprobs[stop]) for stop in stops), default=-float("inf"))

    (own, likely), (other, unlikely) = token(original), token(export)
    parted = {"first_difference": at, "original_token": own, "export_token": other}
    return texts | parted | {"gap": round(min(likely - unlikely, 999.0), 4)}


def _unequal_prompt(engine: str, trained: list[int], served: list[int], tokenizer: Any, rows: int) -> str:
    at = next((i for i, (a, b) in enumerate(zip(trained, served, strict=False)) if a != b), None)
    at = min(len(trained), len(served)) if at is None else at
    start = max(0, at - 5)
    parts = [tokenizer.decode(ids[start : at + 10]) for ids in (trained, served)]
    return (
        f"{engine} sends another prompt than was trained in {rows} rows: in the first, token {at} begins "
        f"{parts[1]!r} ({served[at : at + 3]}) where it was {parts[0]!r} ({trained[at : at + 3]})"
    )
