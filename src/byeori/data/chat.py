"""Rows of messages through the tokenizer's own chat template: which rows it reads, and how it ends a turn.

conversation.py reads a row, turns.py makes the text of its trained turns, tokenize.py their token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from byeori.data import chat_columns
from byeori.data.conversation import Conversation, conversation
from byeori.data.turns import turns
from byeori.errors import TemplateError
from byeori.support.suggestions import nearest
from byeori.support.text_files import read_text

_CONTROL = re.compile(r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>")
_PROBE = Conversation(
    messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
    trained=(1,),
)


def shipped() -> list[str]:
    """Return the names of the chat templates that come with byeori."""
    folder = resources.files("byeori.data") / "chat_templates"
    return sorted(path.name.removesuffix(".jinja") for path in folder.iterdir() if path.name.endswith(".jinja"))


def set_template(tokenizer: Any, given: str | None, variables: Mapping[str, Any] | None) -> str | None:
    """Give a tokenizer another chat template, and values for the variables that templates read.

    The values become defaults inside the template, so that whoever renders it gets the same text: a server, or
    byeori after training. A request may still set them.

    given: a Jinja file or a shipped name; None leaves the tokenizer's own. Returns a note for the user, or None.

    Raises:
        TemplateError: if there is no such template, or there is none to give values to.
    """
    note = None
    if given is not None:
        tokenizer.chat_template = _read(given)
        missing = [word for word in _CONTROL.findall(tokenizer.chat_template) if word not in tokenizer.get_vocab()]
        if missing:
            note = f"The tokenizer has no token {missing[0]}, which the chat template {given} writes: it is spelled out"
    if variables:
        if not tokenizer.chat_template:
            raise TemplateError("--chat_template_kwargs needs a chat template, and this tokenizer has none")
        lines = [
            f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
            for name, value in variables.items()
        ]
        tokenizer.chat_template = "".join(lines) + tokenizer.chat_template
    return note


def _read(given: str) -> str:
    """Return the text of a chat template, from a file or by a shipped name."""
    if given in shipped():
        return (resources.files("byeori.data") / "chat_templates" / f"{given}.jinja").read_text(encoding="utf-8")
    if not Path(given).is_file():
        raise TemplateError(
            f"there is no chat template {given!r}{nearest(given, shipped())}: it is not a file, and the shipped ones "
            f"are {', '.join(shipped())}"
        )
    return read_text(Path(given), TemplateError)


def _literal(value: object) -> str:
    """Return a value as Jinja writes it, which is JSON but for null."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def turn_end(tokenizer: Any) -> int | None:
    """Return the token of its own with which the chat template ends an assistant's turn; None if there is none."""
    answer = _probe(tokenizer)
    last = tokenizer(answer, add_special_tokens=False)["input_ids"][-1] if answer else None
    return last if last in tokenizer.added_tokens_decoder else None


def leaves_turns_open(tokenizer: Any) -> bool:
    """Whether the chat template writes no token after an answer that would tell a model to stop."""
    return bool(_probe(tokenizer)) and turn_end(tokenizer) is None


def _probe(tokenizer: Any) -> str:
    """The text of an assistant's turn; "" without a chat template, or with one for other rows than these."""
    try:
        return turns(_PROBE, tokenizer)[0].answer if tokenizer.chat_template else ""
    except TemplateError:
        return ""


def check_columns(columns: list[str]) -> None:
    """Raise unless a table has a column of messages.

    Raises:
        TemplateError: if there is none.
    """
    if not chat_columns.has_conversation(columns) and "text" not in columns:
        names = [name for name in columns if not name.startswith("__")]
        raise TemplateError(
            "the template `chat` reads the column `messages` (or `conversations`), and the columns are "
            f"{', '.join(names)}{nearest('messages', names)}; choose another template"
        )


def until_last_answer(row: Mapping[str, object]) -> dict[str, object]:
    """Return a conversation's row with its messages in one form, up to the last assistant turn."""
    read = conversation(row)
    last = max((at for at, turn in enumerate(read.messages) if turn["role"] == "assistant"), default=None)
    messages = list(read.messages if last is None else read.messages[: last + 1])
    replaced = chat_columns.columns_read(list(row)) - {"tools", "functions"}
    return {name: value for name, value in row.items() if name not in replaced} | {"messages": messages}
