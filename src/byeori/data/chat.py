"""Rows of messages through the tokenizer's own chat template: which rows it reads, and how it ends a turn.

conversation.py reads a row, turns.py makes the text of its trained turns, tokenize.py their token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from byeori.data.conversation import COLUMNS, CONTEXT_COLUMNS, Conversation, conversation
from byeori.data.turns import turns
from byeori.errors import TemplateError

_PROBE = Conversation(
    messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
    trained=(1,),
)


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
    if not set(COLUMNS) & set(columns) and not {"prompt", "completion"} <= set(columns):
        names = ", ".join(name for name in columns if not name.startswith("__"))
        raise TemplateError(
            f"the template `chat` reads the column `messages` (or `conversations`), and the columns are {names}; "
            "choose another template"
        )


def columns_read(columns: Sequence[str]) -> set[str]:
    """Return those of a table's columns that its conversations are made of."""
    messages = set(COLUMNS) & set(columns) or {"prompt", "completion"}
    return messages | set(CONTEXT_COLUMNS)


def until_last_answer(row: Mapping[str, object]) -> dict[str, object]:
    """Return a row of messages that ends with the last assistant turn; other rows as they are."""
    if not any(row.get(name) for name in COLUMNS):
        return dict(row)
    read = conversation(row)
    last = max((at for at, turn in enumerate(read.messages) if turn["role"] == "assistant"), default=None)
    messages = list(read.messages if last is None else read.messages[: last + 1])
    kept = {name: value for name, value in row.items() if name not in (*COLUMNS, "system")}
    return kept | {"messages": messages}
