"""A conversation with a model: what has been said, the answers to the last question, and pairs for DPO from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from byeori.data.template import Template
from byeori.data.tokenize import Encoding, encode_prompt
from byeori.errors import TemplateError


@dataclass(kw_only=True, slots=True)
class Chat:
    """A conversation. With a template every question is a row of its own; with a chat template turns follow each other.

    messages: the turns so far. row: the columns of the last question, for a template. answers: (who, text) of every
    answer to the last question; the last one is in `messages`.
    """

    encoding: Encoding
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    row: dict[str, str] = field(default_factory=dict)
    answers: list[tuple[str, str]] = field(default_factory=list)

    @property
    def template(self) -> Template | None:
        """The prompt template; None for the tokenizer's chat template."""
        return self.encoding.template

    @property
    def columns(self) -> list[str]:
        """What a question consists of."""
        return self.template.prompt_columns if self.template else ["message"]

    def ask(self, values: Mapping[str, str]) -> list[int]:
        """Ask a question; returns the prompt's token ids.

        Raises:
            TemplateError: if the prompt cannot be made; then nothing has been asked.
        """
        if self.template:
            prompt = encode_prompt(values, self.encoding)
            self.row = dict(values)
        else:
            asked = [*self.messages, {"role": "user", "content": values["message"]}]
            prompt = encode_prompt({"messages": self._with_system(asked)}, self.encoding)
            self.messages = asked
        self.answers = []
        return prompt

    def prompt_again(self) -> list[int]:
        """Return the prompt of the last question.

        Raises:
            TemplateError: if nothing has been asked.
        """
        if not self.answers:
            raise TemplateError("nothing has been asked yet")
        if self.template:
            return encode_prompt(self.row, self.encoding)
        return encode_prompt({"messages": self._with_system(self._question())}, self.encoding)

    def add(self, who: str, text: str) -> None:
        """Keep an answer; the conversation goes on with it."""
        self.answers.append((who, text))
        self._go_on_with(text)

    def forget_question(self) -> None:
        """Take back a question that got no answer."""
        if not self.answers and self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def start_anew(self) -> None:
        """Forget everything but the system message."""
        self.messages, self.row, self.answers = [], {}, []

    def pair(self, chosen: str, rejected: str) -> dict[str, Any]:
        """Return a row for `byeori dpo`: the last question with two answers; the conversation goes on with the chosen.

        Raises:
            TemplateError: if one of them is empty, or they are the same.
        """
        found = pair(self.row if self.template else self._with_system(self._question()), chosen, rejected)
        self._go_on_with(chosen)
        return found

    def _question(self) -> list[dict[str, str]]:
        """The turns up to the last question."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    def _go_on_with(self, text: str) -> None:
        if not self.template:
            self.messages = [*self._question(), _assistant(text)]

    def _with_system(self, messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *messages]


def pair(question: Mapping[str, str] | list[dict[str, str]], chosen: str, rejected: str) -> dict[str, Any]:
    """Return a row for `byeori dpo`. question: the columns of a template's prompt, or the messages before the answer.

    Raises:
        TemplateError: if one of the answers is empty, or they are the same.
    """
    if not chosen.strip() or not rejected.strip():
        raise TemplateError("an empty answer cannot be one of a pair")
    if chosen.strip() == rejected.strip():
        raise TemplateError("both answers are the same, so there is nothing to prefer")
    if isinstance(question, Mapping):
        return {**question, "chosen": chosen, "rejected": rejected}
    return {"prompt": question, "chosen": [_assistant(chosen)], "rejected": [_assistant(rejected)]}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
