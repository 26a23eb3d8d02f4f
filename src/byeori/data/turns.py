"""A Conversation -> its trained turns, each with the prompt that a server sends and the answer that is trained.

    turn i:  prompt = apply_chat_template(messages[:i], tools, add_generation_prompt=True)
             answer = what the template then writes for message i, and the end of its turn

Today's chat templates rewrite history (Qwen3 drops earlier reasoning, gpt-oss ends an earlier turn otherwise), so one
rendering of the whole conversation holds prompts that no server ever sends. Each turn is an example of its own here;
the forest computes what the turns of a conversation share once (batch/forest.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeVar

from byeori.data import bounded_jinja
from byeori.data.conversation import Conversation, Message
from byeori.errors import TemplateError
from byeori.support.text_files import one_line

_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_OPEN, _CLOSE = "<think>", "</think>"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One trained turn as text. number: of its message, 1-based.

    prompt: what the server sends. answer: what is trained, up to and with the end of the turn.
    """

    number: int
    prompt: str
    answer: str


def turns(conversation: Conversation, tokenizer: Any, day: datetime | None = None) -> list[Turn]:
    """Return the trained turns of a conversation. day: what a template writes as today; today by default.

    Raises:
        TemplateError: if the chat template refuses the messages, or leaves out a text, a call, a tool or reasoning.
    """
    return _in_a_form_that_works(
        conversation, tokenizer, day, lambda renderer: [renderer.turn(index) for index in conversation.trained]
    )


def prompt(conversation: Conversation, tokenizer: Any) -> str:
    """Return what a server sends to have the conversation continued.

    Raises:
        TemplateError: as `turns`.
    """
    return _in_a_form_that_works(conversation, tokenizer, None, lambda renderer: renderer.prompt())


def _in_a_form_that_works(
    conversation: Conversation, tokenizer: Any, day: datetime | None, render: Callable[[_Renderer], T]
) -> T:
    """Return what the first form gives that the template accepts; raises the error of the usual form."""
    refused: TemplateError | None = None
    for form in _forms(conversation):
        try:
            return render(_Renderer(form, tokenizer, day))
        except TemplateError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _forms(conversation: Conversation) -> Iterator[Conversation]:
    """The same conversation in every form that templates expect: the usual first, the others where that one fails.

    A message that only calls has an empty content or none; arguments are objects or JSON text; contents are text or
    lists of parts.
    """
    yield conversation
    if any("tool_calls" in message for message in conversation.messages):
        bare = tuple(_without_empty_content(message) for message in conversation.messages)
        yield replace(conversation, messages=bare)
        yield replace(conversation, messages=tuple(map(_with_text_arguments, bare)))
        yield replace(conversation, messages=tuple(map(_with_text_arguments, conversation.messages)))
    parts = tuple(
        message | {"content": [{"type": "text", "text": message["content"]}]} for message in conversation.messages
    )
    yield replace(conversation, messages=parts)


def _without_empty_content(message: Message) -> Message:
    return message | {"content": None} if "tool_calls" in message and not message["content"] else message


def _with_text_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append(call | {"function": function | {"arguments": text}})
    return message | {"tool_calls": calls}


class _Renderer:
    """One conversation in one form, rendered turn by turn."""

    def __init__(self, conversation: Conversation, tokenizer: Any, day: datetime | None) -> None:
        self.messages, self.tools = list(conversation.messages), list(conversation.tools) or None
        self._tokenizer = tokenizer
        self._template = (
            _dated(tokenizer.chat_template, day) if day and isinstance(tokenizer.chat_template, str) else None
        )

    def render(self, count: int, *, generation: bool) -> str:
        """The first `count` messages as text."""
        text = bounded_jinja.render(
            self._tokenizer,
            self.messages[:count],
            tools=self.tools,
            add_generation_prompt=generation,
            chat_template=self._template,
        )
        if isinstance(self.messages[0]["content"], list) and "'type': 'text'" in text:
            raise TemplateError("the tokenizer's chat template reads no lists of parts")  # it printed one
        return text

    def prompt(self) -> str:
        """What a server sends after all the messages."""
        text = self.render(len(self.messages), generation=True)
        self.check_prompt(text, len(self.messages))
        return text

    def turn(self, index: int) -> Turn:
        """The trained turn at message `index`."""
        finished = self._without_opened_turn(index)
        if index == 0:  # many templates render no empty list
            at = finished.find(self.messages[0]["content"].strip()) if self.messages[0]["content"] else 0
            sent, answer = finished[: max(0, at)], finished[max(0, at) :]
        else:
            sent = self.render(index, generation=True)
            answer = self._answer(index, sent, finished)
        answer = answer.rstrip()
        self.check_prompt(sent, index)
        self._check_answer(sent, answer, index)
        return Turn(number=index + 1, prompt=sent, answer=answer)

    def _answer(self, index: int, sent: str, finished: str) -> str:
        """What follows the prompt in the finished turn: the answer begins where the prompt ends."""
        common = _common_prefix(sent, finished)
        if (tag := sent.rfind("<", 0, common)) > sent.rfind(">", 0, common):
            common = tag  # two tags that begin alike are two tags
        opened, answer = sent[common:], finished[common:]
        if not opened.strip():
            return answer
        reasoning, content = _reasoning(self.messages[index])
        if opened.strip() == _OPEN and _CLOSE not in answer:
            # the server opens the reasoning and the template drops it, as DeepSeek's does
            if content and not answer.lstrip().startswith(content[:20]):
                answer = answer.replace(str(self.messages[index]["content"]).strip(), content)
            return f"{reasoning}\n{_CLOSE}\n\n{answer.lstrip()}"
        if reasoning and _CLOSE in opened:
            raise TemplateError(
                f"message {index + 1} has reasoning, and the chat template's prompt ends the reasoning before the "
                "answer begins; give --chat_template_kwargs '{\"enable_thinking\": true}', or remove the reasoning"
            )
        raise TemplateError(
            f"the chat template writes another prompt once message {index + 1} has answered it "
            f"({one_line(opened)[:60]!r} is gone); give a --chat_template that keeps the prompt"
        )

    def _without_opened_turn(self, index: int) -> str:
        """The conversation up to message `index`, without the next turn that some templates always open.

        The first Llama 3 template writes the assistant's header behind every conversation: what a prompt with and
        without a generation prompt both end with.
        """
        finished = self.render(index + 1, generation=False)
        if self.render(index + 1, generation=True) != finished or index == 0:
            return finished
        sent = self.render(index, generation=False)
        if sent != self.render(index, generation=True):
            return finished  # a template that ignores add_generation_prompt after an answer
        shared = sent[len(sent) - _common_prefix(sent[::-1], finished[::-1]) :]
        end = self._end_of_turn(shared)
        return finished[: len(finished) - len(shared) + end]

    def _end_of_turn(self, shared: str) -> int:
        """Where the turn's own end token stops in what both end with: their texts may end alike, too."""
        ends = [
            (at, at + len(token.content))
            for token in self._tokenizer.added_tokens_decoder.values()
            if token.content and (at := shared.find(token.content)) >= 0
        ]
        return min(ends)[1] if ends else 0

    def check_prompt(self, text: str, count: int) -> None:
        """Raise where a message before `count`, or a tool, is not in the prompt."""
        for number, message in enumerate(self.messages[:count], 1):
            _, content = _reasoning(message)
            if not _holds(text, content):
                instead = "call its role system" if message["role"] == "developer" else "remove the message"
                raise TemplateError(
                    f"the tokenizer's chat template leaves out the text of message {number} ({message['role']}); "
                    f"give a --chat_template that writes it, or {instead}"
                )
            self._check_calls(message, text, number)
        for tool in self.tools or ():
            name = tool.get("function", tool).get("name") if isinstance(tool, Mapping) else None
            if name and not _holds(text, str(name)):
                raise TemplateError(
                    f"the tokenizer's chat template does not show the tool {name!r} to the model; give a "
                    "--chat_template that does, or remove the tools"
                )

    def _check_answer(self, sent: str, answer: str, index: int) -> None:
        message, number = self.messages[index], index + 1
        reasoning, content = _reasoning(message)
        tail = _bare(sent)[-len(_bare(content)) :] if content else ""
        if not _holds(answer, content) and _bare(content) not in tail + _bare(answer):
            raise TemplateError(
                f"the tokenizer's chat template leaves out a part of the answer (message {number}); remove that part, "
                "or give a --template of your own"
            )
        if not _holds(answer, reasoning):
            raise TemplateError(
                f"the tokenizer's chat template leaves out the reasoning of message {number}; give a --chat_template "
                "that writes it, or remove it from the rows"
            )
        self._check_calls(message, answer, number)

    def _check_calls(self, message: Message, text: str, number: int) -> None:
        for call in message.get("tool_calls") or ():
            function = call["function"]
            arguments = function["arguments"]
            values = arguments.values() if isinstance(arguments, Mapping) else ()
            said = [function["name"], *(value for value in values if isinstance(value, str))]
            if not all(_holds(text, value) for value in said):
                raise TemplateError(
                    f"the tokenizer's chat template leaves out the call of {function['name']!r} in message {number}; "
                    "give a --chat_template that writes tool calls, or leave such rows out"
                )


def _dated(template: str, day: datetime) -> str:
    """A chat template with a date instead of today's."""
    return _TODAY.sub(lambda call: repr(day.strftime(call[2])), template)


def _reasoning(message: Message) -> tuple[str, str]:
    """The reasoning and the content of a message; the reasoning has a key of its own or stands in the content."""
    content = message["content"] or ""
    if isinstance(content, list):
        content = content[0]["text"]
    reasoning = str(message.get("reasoning_content") or "").strip()
    if message["role"] == "assistant" and _CLOSE in content:
        before, _, content = content.rpartition(_CLOSE)
        reasoning = reasoning or before.replace(_OPEN, "").strip()
    return reasoning, content.strip()


def _common_prefix(first: str, second: str) -> int:
    """How many characters two texts have in common from the start."""
    shortest = min(len(first), len(second))
    return next((at for at in range(shortest) if first[at] != second[at]), shortest)


def _bare(text: str) -> str:
    """Text without white space, which templates strip and add."""
    return "".join(text.split())


def _holds(text: str, value: str) -> bool:
    """Whether a template wrote a value: as it is or as JSON text, with other white space."""
    forms = (value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1])
    bare = _bare(text)
    return any(_bare(form) in bare for form in forms)
