"""One row as training will see it, at once: the tokens that are trained, their number, and what is wrong.

draft, row ── template or chat ──> examples ── tokenizer (kept in memory) ──> tokens of (text, trained)
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byeori import config
from byeori.data import chat, chat_columns, row_kinds, template
from byeori.data import tokenize as tokenizing
from byeori.data.row_kinds import RowKind
from byeori.data.template import Template
from byeori.data.tokenize import Encoding, Example
from byeori.errors import ByeoriError, DataError
from byeori.evaluate import preview as previews
from byeori.studio import data
from byeori.studio.workspace import Workspace
from byeori.support.text_files import sentence, visible

_MOST_TOKENS = 700  # of an example whose tokens are shown one by one
_lock = threading.Lock()  # tokenizers are not made for several threads
_start: tuple[str, Any] | None = None  # the tokenizer that was used last, and what it was loaded for


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """An example of the row. parts: (text, trained); tokens: whether each part is a token.

    prompt, answer: numbers of tokens; 0 without a tokenizer.
    """

    name: str
    parts: list[tuple[str, bool]]
    tokens: bool = False
    prompt: int = 0
    answer: int = 0
    notes: list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Live:
    """A row. columns: of the table. name: of the row. template: the one that is used, "chat" or "" without one.

    examples: what it becomes. error: what is wrong.
    """

    columns: list[str]
    name: str = ""
    rows: int = 0
    template: str = ""
    text: str = ""
    kind: str = "sft"
    examples: list[Shown]
    error: str = ""


def live(space: Workspace, draft: dict[str, Any], number: int) -> Live:
    """Return a row of the table as the settings of a draft make examples of it."""
    with _lock:
        try:
            return _live(space, draft, number)
        except ByeoriError as error:
            return Live(columns=[], examples=[], error=sentence(error))


def _live(space: Workspace, draft: dict[str, Any], number: int) -> Live:
    table = data.load(space, draft)
    if table is None:
        raise DataError("no rows are chosen yet; choose them on the screen before this one")
    columns = [name for name in table.rows.column_names if name != data.ROW]
    facts: dict[str, Any] = {"columns": columns, "rows": len(table.rows), "examples": []}
    try:
        if not 0 <= number < len(table.rows):
            raise DataError(f"there is no row {number + 1}; the rows are 1 to {len(table.rows)}")
        facts["name"] = table.name(number)
        chosen, kind = _chosen(draft, table)
        facts |= {"kind": kind.command, "template": chosen.name if chosen else template.CHAT}
        facts["text"] = chosen.text if chosen else ""
        wanted = kind.columns_wanted([*table.rows.column_names, *table.left_out], chosen)
        beside = {*wanted, *chat_columns.CARRYING}
        table = table.with_columns(beside, chosen.optional_columns if chosen and not chosen.lenient else beside)
        kind.check_columns(table.rows.column_names, chosen)
        row = dict(table.rows[number])
        if draft.get("base_model"):
            facts["examples"] = _tokenized(space, draft, row, chosen, kind)
        elif chosen is not None:
            parts = [(visible(segment.text), segment.trained) for segment in chosen.segments(row)]
            facts["examples"] = [Shown(name="", parts=parts, notes=[])]
    except ByeoriError as error:
        facts["error"] = sentence(error)
    return Live(**facts)


def _chosen(draft: dict[str, Any], table: Any) -> tuple[Template | None, RowKind]:
    """The template and the kind of rows, as preview chooses them."""
    columns = table.rows.column_names
    spec = draft.get("template")
    chosen = template.resolve(spec) if spec else None
    kind = row_kinds.of_table(columns, chosen)
    return (chosen, kind) if spec else (template.resolve(kind.choose_template(table.rows)), kind)


def _tokenized(
    space: Workspace, draft: dict[str, Any], row: dict[str, Any], chosen: Template | None, kind: RowKind
) -> list[Shown]:
    start, note = _starting_model(space, draft)
    values = config.PreviewSettings.model_fields
    setting = {name: draft.get(name, values[name].default) for name in _ENCODING}
    encoding = tokenizing.make_encoding(start.tokenizer, chosen, **setting)
    examples = kind.encode(row, encoding)
    return [
        _shown(example, encoding, kind.sides[place] if kind.examples > 1 else "", note if place == 0 else None)
        for place, example in enumerate(examples)
    ]


_ENCODING = ("cutoff_len", "add_eos_token", "train_on_inputs", "train_turns", "special_tokens_in_text")


def _shown(example: Example, encoding: Encoding, side: str, note: str | None) -> Shown:
    total = len(example.token_ids)
    single = total <= _MOST_TOKENS
    parts = (previews.tokens if single else previews.pieces)(example, encoding.tokenizer)
    notes: list[tuple[str, dict[str, Any]]] = [("{text}", {"text": note})] if note else []
    if example.shortened:
        notes.append(
            ("{count} tokens of the prompt are cut, so that the answer fits whole", {"count": example.shortened})
        )
    if example.special:
        notes.append(("{token} in this row looks like a control token", {"token": example.special}))
    if example.turns_left_out:
        notes.append(("{count} turns are longer than cutoff_len and left out", {"count": example.turns_left_out}))
    return Shown(
        name=side or (f"message {example.turn}" if example.turn else ""),
        parts=[(visible(text), trained) for text, trained in parts],
        tokens=single,
        prompt=total - example.target_count,
        answer=example.target_count,
        notes=notes,
    )


def _starting_model(space: Workspace, draft: dict[str, Any]) -> tuple[Any, str | None]:
    """The tokenizer of the model, loaded once, with the chat template of the draft."""
    global _start
    from byeori.artifacts import starting_model

    names = ("base_model", "revision", "trust_remote_code", "chat_template", "chat_template_kwargs", "cutoff_len")
    given = {name: draft[name] for name in names if draft.get(name) is not None}
    space.check(config.PreviewSettings, given)
    files = [
        Path(given["base_model"]) / name for name in ("tokenizer.json", "tokenizer_config.json", "adapter_config.json")
    ]
    times = [file.stat().st_mtime_ns for file in files if file.is_file()]
    key = json.dumps([given, times], sort_keys=True, default=str)
    if _start is None or _start[0] != key:
        settings = config.check(config.PreviewSettings, {"data_path": ["-"], **given})
        found, _ = starting_model.begin(settings.model_dump(), settings.model_fields_set)
        note = chat.set_template(found.tokenizer, settings.chat_template, settings.chat_template_kwargs)
        _start = (key, (found, note))
    loaded: tuple[Any, str | None] = _start[1]
    return loaded
