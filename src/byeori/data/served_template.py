"""Template -> Jinja chat template, so that any server builds the prompt that was trained, token for token."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from keyword import iskeyword
from typing import Any

from byeori.data.template import Template, is_missing
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

    A server tokenizes the BOS token's text together with the prompt. Llama 2's tokenizer puts a space before a text,
    but not before one that follows a special token, so there the template has to write it.
    """
    template, core = encoding.template, encoding.core
    if template is None:
        return str(encoding.tokenizer.chat_template)
    if encoding.bos is None:
        return chat_template(template, "")
    bos = str(encoding.tokenizer.bos_token)
    begin = template.parts[0].text.lstrip() or "a"

    def served(lead: str) -> list[int]:
        return list(core.encode(bos + lead + begin, add_special_tokens=False).ids)

    trained = [encoding.bos, *core.encode(begin, add_special_tokens=False).ids]
    lead = " " if served("") != trained and served(" ") == trained else ""
    return chat_template(template, bos, lead=lead)


def chat_template(template: Template, bos: str, *, lead: str = "") -> str:
    """Return the template as a Jinja chat template.

    The last user message fills the last required prompt column, a system message the column `system`; every other
    column is a keyword of `apply_chat_template` (`chat_template_kwargs` in vLLM) and empty without it.

    bos: the text of the BOS token, "" if the tokenizer uses none. lead: what must follow it so that the prompt is
    tokenized as it was trained; omitted before a text that already begins so.
    """
    if bos and template.parts[0].text.startswith(bos):
        bos = lead = ""
    main = template.main_column

    def value(column: str) -> str:
        if column == main:
            return "byeori.user"
        return "byeori.system" if column == "system" else f"({_identifier(column)} | default('', true))"

    lines = [
        "{%- set byeori = namespace(user='', system='') -%}",
        "{%- for message in messages -%}",
        "{%- if message.role == 'user' -%}{%- set byeori.user = message.content -%}{%- endif -%}",
        "{%- if message.role == 'system' -%}{%- set byeori.system = message.content -%}{%- endif -%}",
        "{%- endfor -%}",
        f"{{{{- {_quoted(bos)} -}}}}",
    ]
    if lead:
        first = template.parts[0]
        begin = value(first.column) if first.column and not first.block else _quoted(first.text)
        lines.append(f"{{{{- '' if ({begin}).startswith({_quoted(lead)}) else {_quoted(lead)} -}}}}")
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
        lines.append(f"{{{{- {value(part.column) if part.column else _quoted(part.text)} -}}}}")
    if block:
        lines.append("{%- endif -%}")
    ending = f"messages[-1].content ~ {_quoted(template.suffix)} ~ eos_token"
    lines.append(f"{{%- if messages[-1].role == 'assistant' -%}}{{{{- {ending} -}}}}{{%- endif -%}}")
    return "\n".join(lines)


def request(template: Template, row: Mapping[str, object]) -> dict[str, Any]:
    """Return the chat request (`messages`, `chat_template_kwargs`) that fills the exported chat template with a row."""
    values = {name: str(value) for name in template.prompt_columns if not is_missing(value := row.get(name))}
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
