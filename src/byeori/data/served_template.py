"""Template -> Jinja chat template, so that any server builds the prompt that was trained, token for token."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from keyword import iskeyword
from typing import Any

from byeori.data.template import SPACES, Template, is_missing
from byeori.data.text_values import compose
from byeori.data.tokenize import Encoding

# Names that mean something else to Jinja, to `apply_chat_template` or to the exported template itself.
_RESERVED = re.compile(
    r"and|or|not|in|is|if|else|elif|for|block|set|macro|import|from|include|extends|call|filter|with|do|true|false|none|"
    r"loop|self|super|caller|varargs|kwargs|range|dict|lipsum|cycler|joiner|namespace|byeori|messages?|conversation|"
    r"tools|documents|chat_template|add_generation_prompt|continue_final_message|tokenize|padding|truncation|max_length|"
    r"return_(tensors|dict|assistant_tokens_mask)|tokenizer_kwargs|raise_exception|strftime_now|(bos|eos|pad|unk)_token"
)


def served_template(encoding: Encoding) -> str:
    """Return the chat template whose text a server tokenizes to the ids that were trained.

    A server tokenizes the text of the tokens in front (BOS) together with the prompt. Llama 2's tokenizer puts a space
    before a text, but not before one that follows a special token, so there the template has to write it.
    """
    template, encoder = encoding.template, encoding.encoder
    if template is None:
        return str(encoding.tokenizer.chat_template)
    tokens = encoding.tokenizer.convert_ids_to_tokens(encoding.prefix)
    front, first = "".join(tokens), template.parts[0]
    for count in range(len(tokens), 0, -1):
        if first.text.startswith(begun := "".join(tokens[:count])):
            first = replace(first, text=first.text.removeprefix(begun))
            return chat_template(replace(template, parts=(first, *template.parts[1:])), front)
    begin = first.text.lstrip() or "a"
    trained = [*encoding.prefix, *encoder.ids(begin)]
    lead = " " if front and encoder.ids(front + begin) != trained == encoder.ids(f"{front} {begin}") else ""
    return chat_template(template, front, lead=lead)


def chat_template(template: Template, front: str, *, lead: str = "") -> str:
    """Return the template as a Jinja chat template.

    The last user message fills the last required prompt column, a system message the column `system`; every other
    column is a keyword of `apply_chat_template` (`chat_template_kwargs` in vLLM) and empty without it. A prompt ends
    without spaces, as Template.segments leaves it.

    front: the text of the tokens in front, "" if the tokenizer uses none. lead: what must follow it so that the prompt
    is tokenized as it was trained; omitted before a text that already begins so.
    """
    main = template.main_column

    def value(column: str) -> str:
        if column == main:
            return "byeori.user"
        return "byeori.system" if column == "system" else f"({_identifier(column)} | default('', true))"

    lines = [
        "{%- set byeori = namespace(user='', system='', prompt='') -%}",
        "{%- for message in messages -%}",
        "{%- if message.role == 'user' -%}{%- set byeori.user = message.content -%}{%- endif -%}",
        "{%- if message.role == 'system' -%}{%- set byeori.system = message.content -%}{%- endif -%}",
        "{%- endfor -%}",
    ]
    block = 0
    for part in template.parts[: template.answer]:
        if part.block != block:
            if block:
                lines.append("{%- endif -%}")
            if part.block:
                names = [p.column for p in template.parts if p.block == part.block and p.column]
                test = " or ".join(f"{value(name)} | trim" for name in names)
                lines.append(f"{{%- if {test} -%}}")
            block = part.block
        text = value(part.column) if part.column else _quoted(part.text)
        lines.append(f"{{%- set byeori.prompt = byeori.prompt ~ {text} -%}}")
    if block:
        lines.append("{%- endif -%}")
    answered = f"messages[-1].content ~ {_quoted(template.suffix)} ~ eos_token"
    lines += [
        "{%- if messages[-1].role == 'assistant' -%}",
        f"{{%- set byeori.prompt = byeori.prompt ~ {answered} -%}}",
        f"{{%- else -%}}{{%- set byeori.prompt = byeori.prompt.rstrip({_quoted(SPACES)}) -%}}{{%- endif -%}}",
    ]
    if lead:
        begins = f"not byeori.prompt or byeori.prompt.startswith({_quoted(lead)})"
        lines.append(f"{{%- set byeori.prompt = ('' if {begins} else {_quoted(lead)}) ~ byeori.prompt -%}}")
    lines.append(f"{{{{- {_quoted(front)} ~ byeori.prompt -}}}}")
    return "\n".join(lines)


def request(template: Template, row: Mapping[str, object]) -> dict[str, Any]:
    """Return the chat request (`messages`, `chat_template_kwargs`) that fills the exported chat template with a row.

    Hangul is composed, as in training: no server does that.
    """
    values = {name: str(compose(value)) for name in template.prompt_columns if not is_missing(value := row.get(name))}
    user = {"role": "user", "content": values.pop(template.main_column, "")}
    system = values.pop("system", "")
    messages = [{"role": "system", "content": system}, user] if system else [user]
    return {"messages": messages, "chat_template_kwargs": {_identifier(name): text for name, text in values.items()}}


def keywords(template: Template) -> list[str]:
    """Return the names in `chat_template_kwargs` that fill the prompt's columns besides those that messages fill."""
    return [_identifier(name) for name in template.prompt_columns if name not in (template.main_column, "system")]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _identifier(column: str) -> str:
    """Return the keyword that fills a column: its name, made an identifier that Jinja and Python accept."""
    name = "".join(c if f"_{c}".isidentifier() else "_" for c in column)
    name = name if name.isidentifier() else f"_{name}"
    return f"{name}_" if _RESERVED.fullmatch(name) or iskeyword(name) else name
