"""The two answers of a preference row and the prompt that both follow, in the forms that tables have them.

chosen     [user Q, assistant A]                                    (UltraFeedback, TRL: the whole conversation)
prompt Q   chosen A                                                 (TRL, Intel, LLaMA-Factory's Alpaca rows)
conversations [human Q]   chosen {"from": "gpt", "value": A}        (LLaMA-Factory's ShareGPT rows)
messages [user Q]   chosen {"role": "assistant", "content": A}      (Axolotl)
input {"messages": [user Q]}   preferred_output [assistant A]       (OpenAI)
chosen_response                                                     (Argilla, Axolotl)
chosen "\\n\\nHuman: Q\\n\\nAssistant: A"                           (HH-RLHF)
chosen "The sky is blue."   rejected "The sky is green."            (TRL: the prompt is what both begin with)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from byeori.data import chat_columns, template
from byeori.data.chat_columns import EMPTY, is_turns, list_of_turns, question_of_row
from byeori.data.conversation import Message, conversation
from byeori.data.rendered_text import hh_turns
from byeori.data.template import Template
from byeori.errors import TemplateError
from byeori.support.text_files import one_line

SIDES = ("chosen", "rejected")
IMPLICIT = "prompt-completion"
"""The template of texts that hold their prompt themselves."""

_NAMES = {
    "chosen": ("chosen", "chosen_response", "preferred_output"),
    "rejected": ("rejected", "rejected_response", "non_preferred_output"),
}
_HH_ANSWER = "\n\nAssistant:"
# An answer may well begin as a short prompt does ("Hello"); with a longer one the prompt is repeated.
_REPEATED = 16


def column_of(columns: Sequence[str], side: str) -> str:
    """Return the column that holds the answer of a side; another kind of row has sides of its own names."""
    return next((name for name in _NAMES.get(side, ()) if name in columns), side)


def is_implicit(columns: Sequence[str]) -> bool:
    """Return whether a table has the two answers alone, so that the prompt can only be inside them."""
    sides = {column_of(columns, side) for side in SIDES}
    return all(name in sides or name.startswith("__") for name in columns)


def flat(row: Mapping[str, object]) -> Mapping[str, object]:
    """Return a row with what OpenAI's preferences hold inside `input` (messages, tools) as columns of its own."""
    inside = row.get("input")
    return {**row, "input": None, **inside} if isinstance(inside, Mapping) else row


def is_chat(row: Mapping[str, object]) -> bool:
    """Return whether a row of pairs is one of messages."""
    answers = [row.get(column_of(list(row), side)) for side in SIDES]
    messages = any(is_turns(value) or isinstance(value, (Mapping, list)) for value in (*answers, row.get("prompt")))
    beside = any(row.get(name) not in EMPTY for name in chat_columns.COLUMNS)
    return messages or beside or chat_columns.needs_chat(row) or isinstance(row.get("input"), Mapping)


# ---- messages ----------------------------------------------------------------------------------------------------


def conversations(row: Mapping[str, object]) -> dict[str, list[Message]]:
    """Return the whole conversation of each side; both have the same messages but for the last.

    Raises:
        TemplateError: if an answer is empty, or the prompts differ.
    """
    answers = {side: _answer(row, side) for side in SIDES}
    question = _without_answer(question_of_row(row), answers)
    answers = _unrepeated(question, answers)
    sides = {side: _conversation(row, question, answers[side], side) for side in SIDES}
    chosen, rejected = (sides[side][:-1] for side in SIDES)
    for number, (one, other) in enumerate(zip(chosen, rejected, strict=False), 1):
        if one != other:
            raise TemplateError(
                f"chosen and rejected do not answer the same prompt: their message {number} differs "
                f"({_short(one)} and {_short(other)}), so leave the row out"
            )
    if len(chosen) != len(rejected):
        raise TemplateError(
            f"chosen and rejected do not answer the same prompt: {len(chosen)} and {len(rejected)} messages come "
            "before their answers, so leave the row out"
        )
    if not any(message["role"] != "system" for message in chosen):
        raise TemplateError("there is no prompt: no message comes before the answers; add the prompt as `prompt`")
    beside = {name: value for name, value in row.items() if name not in _NAMES["chosen"] + _NAMES["rejected"]}
    said = [sides[side] for side in SIDES]
    chat_columns.check_nothing_is_left_out(beside, said, by="the chat template", read=("tools", "functions"))
    return sides


def _short(message: Message) -> str:
    return repr(one_line(str(message["content"] or message.get("tool_calls")), 40))


def _without_answer(turns: list[Any], answers: Mapping[str, list[Any]]) -> list[Any]:
    """Drop a last turn that is one of the answers again: UltraFeedback's `messages` are the chosen conversation."""
    if not turns:
        return turns
    read = conversation({"messages": turns}).messages
    same = [conversation({"messages": turn[-1:]}).messages[0] == read[-1] for turn in answers.values() if turn]
    return turns[:-1] if read[-1]["role"] == "assistant" and any(same) else turns


def _unrepeated(question: list[Any], answers: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The answers without the text of the question, where both begin with it."""
    contents = {side: turn[0].get("content") for side, turn in answers.items() if len(turn) == 1}
    texts = {side: text for side, text in contents.items() if isinstance(text, str)}
    if not question or len(texts) < len(SIDES):
        return dict(answers)
    bare = _without_prompt("", [conversation({"messages": question[-1:]}).messages[0]["content"]], texts)
    return {side: [{**answers[side][0], "content": text}] for side, text in bare.items()}


def _conversation(row: Mapping[str, object], question: list[Any], answer: list[Any], side: str) -> list[Message]:
    column = column_of(list(row), side)
    ends = answer and conversation({"messages": answer[-1:]})
    if not ends or not ends.trained:
        raise TemplateError(f"the answer, column {column!r}, is empty: its messages do not end with an assistant turn")
    context = {name: row.get(name) for name in chat_columns.SYSTEM}
    before = list(conversation({"messages": question}).messages) if question else []
    ending = list(conversation({"messages": answer}).messages)
    repeats = before and ending[0]["role"] != "assistant"
    messages = _joined(before, ending, column) if repeats else [*before, *ending]
    return list(conversation({"messages": messages, **context}).messages)


def _answer(row: Mapping[str, object], side: str) -> list[Any]:
    """The messages in the column of an answer, each in the form that the table has them."""
    column = column_of(list(row), side)
    value = row.get(column)
    if value in EMPTY or template.is_missing(value):
        return []
    if is_turns(value):
        return list_of_turns(value, column)
    if isinstance(value, Mapping):
        return [value if value.get("role") or value.get("from") else {**value, "role": "assistant"}]
    if isinstance(value, (list, tuple)) and not all(isinstance(part, Mapping) and "type" in part for part in value):
        raise TemplateError(
            f"column {column!r} holds a list of {len(value)}, neither one answer nor messages with a role and a text"
        )
    return [{"role": "assistant", "content": value}]


def _joined(before: list[Message], ending: list[Message], column: str) -> list[Message]:
    """Join a prompt and an answer that repeats the prompt's last messages, or all of them."""
    systems = [part[:1] for part in (before, ending) if part[0]["role"] in ("system", "developer")]
    if len(systems) == 2 and systems[0] != systems[1]:
        raise TemplateError(f"the prompt and {column!r} have two different system prompts; keep one")
    before, ending = (part[1:] if part[:1] in systems else part for part in (before, ending))
    for count in range(min(len(before), len(ending)), 0, -1):
        if before[-count:] == ending[:count]:
            return [*(systems[0] if systems else []), *before[:-count], *ending]
    if not before or ending[0]["role"] == "assistant":
        return [*(systems[0] if systems else []), *before, *ending]
    raise TemplateError(
        f"{column!r} does not answer the prompt of its row: it begins with {_short(ending[0])}, and the prompt ends "
        f"with {_short(before[-1])}; leave the row out, or drop the column with the prompt"
    )


# ---- texts -------------------------------------------------------------------------------------------------------


def with_texts(row: Mapping[str, object], chosen: Template) -> dict[str, dict[str, object]]:
    """Return the row of each side, with the text of its answer in the template's answer column.

    A prompt that stands inside both answers is taken out of them; without a column for it, it is what both begin with.

    Raises:
        TemplateError: if an answer is empty or not text, or there is no prompt.
    """
    answers = {side: _text(row, side) for side in SIDES}
    out = dict(row)
    if is_implicit(list(row)) and chosen.required_columns == ["prompt"]:
        out["prompt"] = prompt = _implicit_prompt(answers)
        answers = {side: text[len(prompt) :] for side, text in answers.items()}
    else:
        whole = "".join(part.text for part in chosen.segments({**row, chosen.answer_column: "a"}))
        rendered = whole.removesuffix(f"a{chosen.suffix}")  # with the spaces that Template.prompt leaves out
        answers = _without_prompt(rendered, [row.get(name) for name in chosen.prompt_columns], answers)
    for side, answer in answers.items():
        if not answer.strip():
            raise TemplateError(f"the answer, column {column_of(list(row), side)!r}, is empty but for the prompt")
    return {side: out | {chosen.answer_column: answer} for side, answer in answers.items()}


def _text(row: Mapping[str, object], side: str) -> str:
    column = column_of(list(row), side)
    answer = None if template.is_missing(row[column]) else row[column]
    if answer is not None and not isinstance(answer, str):
        raise TemplateError(template.not_text(column, answer))
    if not answer or not answer.strip():
        raise TemplateError(f"the answer, column {column!r}, is empty")
    return answer


def _implicit_prompt(answers: Mapping[str, str]) -> str:
    """What two texts begin with, up to a space; of HH-RLHF's texts, all turns but the last."""
    chosen, rejected = answers.values()
    if hh_turns(chosen):
        ends = [text.rfind(_HH_ANSWER) + len(_HH_ANSWER) for text in (chosen, rejected)]
        prompt = chosen[: ends[0]]
        if prompt != rejected[: ends[1]]:
            raise TemplateError("chosen and rejected do not answer the same prompt: their earlier turns differ")
        return prompt
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    while same and not chosen[same : same + 1].isspace():
        same -= 1
    if not chosen[:same].strip():
        raise TemplateError(
            "there is no prompt: no column besides chosen and rejected, and nothing that both texts begin with; add "
            "what they answer as `prompt`"
        )
    return chosen[:same]


def _without_prompt(rendered: str, columns: Sequence[object], answers: Mapping[str, str]) -> dict[str, str]:
    """The answers without the prompt that both begin with. rendered: by the template. columns: what it holds."""
    if len(rendered.strip()) >= _REPEATED and all(answer.startswith(rendered) for answer in answers.values()):
        return {side: answer[len(rendered) :] for side, answer in answers.items()}
    for prompt in (text.strip() for text in (rendered, *columns) if isinstance(text, str)):
        if len(prompt) >= _REPEATED and all(answer.startswith(prompt) for answer in answers.values()):
            return {side: answer[len(prompt) :].lstrip() for side, answer in answers.items()}
    return dict(answers)
