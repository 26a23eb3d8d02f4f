"""Row -> segments. Text only; no tokenizer is needed here.

A template reads like the finished example. Its last `{column}` is the answer:

    ### 본문:
    {document}

    ### 제목:
    {title}

- `{column}` is replaced by the row's text; braces inside a value stay as they are.
- `{{` and `}}` are literal braces.
- `[[ ... ]]` is left out of a row whose columns inside it are all empty (or null); without a column it is literal.
- The answer, and whatever follows it in the template, is trained; everything before it is the prompt.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from keyword import iskeyword
from pathlib import Path

from byeori.errors import TemplateError
from byeori.support.suggestions import nearest
from byeori.support.text_files import read_text

# Of three closing brackets the first is a literal: [[[{tag}]]] is a block around [{tag}].
_TOKEN = re.compile(r"\{\{|\}\}|\[\[|\]\](?!\])|\{[^{}\n]*\}|\{|\}")
CHAT = "chat"
# Names that mean something else to Jinja, to `apply_chat_template` or to the exported template itself.
_RESERVED = re.compile(
    r"and|or|not|in|is|if|else|elif|for|block|set|macro|import|from|include|extends|call|filter|with|do|true|false|none|"
    r"loop|self|super|caller|varargs|kwargs|range|dict|lipsum|cycler|joiner|namespace|byeori|messages?|conversation|"
    r"tools|documents|chat_template|add_generation_prompt|continue_final_message|tokenize|padding|truncation|max_length|"
    r"return_(tensors|dict|assistant_tokens_mask)|tokenizer_kwargs|raise_exception|strftime_now|(bos|eos|pad|unk)_token"
)
_EXAMPLE = "for instance `--template '### Question:\\n{question}\\n\\n### Answer:\\n{answer}'`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of an example's text.

    text: the characters.
    trained: whether the model learns to write them.
    column: the column the text came from; None for the template's own words.
    """

    text: str
    trained: bool
    column: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A literal (column is None) or a column; `block` numbers the `[[ ]]` it stands in, 0 outside."""

    text: str = ""
    column: str | None = None
    block: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """A parsed template.

    text: as written. name: shipped name, file name or `inline`.
    parts: literals and columns in order. answer: the index in `parts` of the answer.
    lenient: whether rows may lack the columns of `[[ ]]` altogether; where the user wrote them, that is a typo.
    """

    text: str
    name: str
    parts: tuple[_Part, ...]
    answer: int
    lenient: bool = False

    @property
    def answer_column(self) -> str:
        """The last column of the template."""
        return self.parts[self.answer].column or ""

    @property
    def prompt_columns(self) -> list[str]:
        """Columns of the prompt in order, each once."""
        return list(dict.fromkeys(p.column for p in self.parts[: self.answer] if p.column))

    @property
    def optional_columns(self) -> set[str]:
        """Columns that stand inside `[[ ]]` only."""
        outside = {p.column for p in self.parts if p.column and not p.block}
        return {p.column for p in self.parts if p.column and p.block} - outside

    @property
    def required_columns(self) -> list[str]:
        """Columns of the prompt that every row has to have."""
        return [name for name in self.prompt_columns if name not in self.optional_columns]

    def asks_nothing(self, row: Mapping[str, object]) -> bool:
        """Whether there are required columns in the prompt and all of them are empty."""
        required = self.required_columns
        return bool(required) and all(_is_empty(row.get(name)) for name in required)

    def check_columns(self, columns: list[str], *, with_answer: bool) -> None:
        """See whether the data has the columns of the template.

        Raises:
            TemplateError: it lacks one, and that is not an optional one of a lenient template.
        """
        for column in self.lacking(columns, with_answer=with_answer):
            raise TemplateError(unknown_column(column, columns))

    def lacking(self, columns: list[str], *, with_answer: bool) -> list[str]:
        """The columns of the template that the data lacks and may not lack."""
        known = {*columns, *(self.optional_columns if self.lenient else ())}
        wanted = [*self.prompt_columns, *([self.answer_column] if with_answer else [])]
        return [column for column in wanted if column not in known]

    @property
    def literal_blocks(self) -> list[str]:
        """`[[ ... ]]` without a column: text, like every other word."""
        return [block for part in self.parts for block in re.findall(r"\[\[.*?\]\]", part.text, re.DOTALL)]

    @property
    def suffix(self) -> str:
        """The template's words after the answer."""
        return "".join(part.text for part in self.parts[self.answer + 1 :])

    def segments(self, row: Mapping[str, object], *, with_answer: bool = True) -> tuple[Segment, ...]:
        """The row in the template's words; without the answer (and what follows it) if asked.

        Raises:
            TemplateError: a column is missing, or holds no text.
        """
        parts = self.parts if with_answer else self.parts[: self.answer]
        kept = {part.block for part in parts if part.column and part.block and not _is_empty(row.get(part.column))}
        out = []
        for index, part in enumerate(parts):
            if part.block and part.block not in kept:
                continue
            text = part.text if part.column is None else self._value(row, part)
            if text:
                out.append(Segment(text=text, trained=index >= self.answer, column=part.column))
        return tuple(out)

    def prompt(self, row: Mapping[str, object]) -> str:
        """The text that the model is given before it answers."""
        return "".join(segment.text for segment in self.segments(row, with_answer=False))

    def _value(self, row: Mapping[str, object], part: _Part) -> str:
        column = part.column or ""
        if column not in row:
            if part.block:
                return ""
            raise TemplateError(unknown_column(column, row))
        value = None if is_missing(row[column]) else row[column]
        if value is None and part.block:
            return ""
        if not isinstance(value, str):
            name = type(value).__name__
            article = "an" if name[0] in "aeiou" else "a"
            kind = "null" if value is None else f"{article} {name} ({_one_line(str(value))[:40]})"
            raise TemplateError(f"column {column!r} holds {kind} where text is expected")
        return value


def unknown_column(column: str, columns: Iterable[str]) -> str:
    """The sentence for a column that the data does not have."""
    names = [name for name in columns if not name.startswith("__")]
    return (
        f"the template names the column {column!r}, which the data does not have"
        f"{_one_line(nearest(column, names))}; its columns are {_one_line(', '.join(names))}"
    )


def _one_line(text: str) -> str:
    """The text without line breaks: a CSV file may have them in its column names."""
    return re.sub(r"\s*[\r\n]+\s*", " ", text)


def is_missing(value: object) -> bool:
    """Whether a value is null, or NaN, which pandas writes for it."""
    return value is None or (isinstance(value, float) and value != value)


def _is_empty(value: object) -> bool:
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def parse(text: str, name: str = "inline", *, lenient: bool = False) -> Template:
    """Parse a template's text.

    Raises:
        TemplateError: unclosed brace or block, a template without a column, an answer inside a block or shown in the
            prompt.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").rstrip()
    parts = _parts(text, name)
    columns = [index for index, part in enumerate(parts) if part.column]
    if not columns:
        raise TemplateError(f"template {name} names no column, so it has no answer to train; {_EXAMPLE}")
    answer = columns[-1]
    column = parts[answer].column
    if parts[answer].block:
        raise TemplateError(f"template {name}: the answer {{{column}}} stands inside [[ ]]; move it out")
    if any(part.column == column for part in parts[:answer]):
        raise TemplateError(
            f"template {name}: the answer {{{column}}} also stands in the prompt, which would give it away"
        )
    return Template(text=text, name=name, parts=tuple(parts), answer=answer, lenient=lenient)


def _parts(text: str, name: str) -> list[_Part]:
    parts: list[_Part] = []
    literal, position, block, blocks = "", 0, 0, 0

    def flush(until: int) -> None:
        nonlocal literal
        literal += text[position:until]
        if literal:
            parts.append(_Part(text=literal, block=block))
        literal = ""

    for match in _TOKEN.finditer(text):
        token, start = match.group(), match.start()
        line = text.count("\n", 0, start) + 1
        if token in ("{{", "}}"):
            literal += text[position:start] + token[0]
        elif token[0] == "{" and not token[1:-1].strip() and len(token) > 1:
            raise TemplateError(
                f"template {name}, line {line}: {token!r} names no column; write '{{{{}}}}' for literal braces"
            )
        elif token in ("{", "}"):
            raise TemplateError(
                f"template {name}, line {line}: unmatched {token!r}; write {token * 2!r} for a literal brace"
            )
        elif token in ("[[", "]]"):
            if (token == "[[") == bool(block):
                raise TemplateError(f"template {name}, line {line}: {token!r} does not match; blocks are [[ ... ]]")
            flush(start)
            blocks += token == "[["
            block = blocks if token == "[[" else 0
            if token == "]]" and not any(part.column for part in parts if part.block == blocks):
                literal = f"[[{''.join(part.text for part in parts if part.block == blocks)}]]"
                parts = [part for part in parts if part.block != blocks]
        else:
            flush(start)
            parts.append(_Part(column=unicodedata.normalize("NFC", token[1:-1].strip()), block=block))
        position = match.end()
    if block:
        raise TemplateError(f"template {name}: [[ is never closed with ]]")
    flush(len(text))
    return parts


def shipped() -> dict[str, str]:
    """Name -> text of the templates that come with the package."""
    folder = resources.files("byeori.data") / "templates"
    return {
        item.name.removesuffix(".txt"): item.read_text(encoding="utf-8")
        for item in sorted(folder.iterdir(), key=lambda item: item.name)
        if item.name.endswith(".txt")
    }


def resolve(spec: str) -> Template | None:
    """A template from a shipped name, a file, or inline text; None for `chat`.

    Raises:
        TemplateError: no such name or file, or the text does not parse.
    """
    if spec == CHAT:
        return None
    if spec in shipped():
        return parse(shipped()[spec], spec, lenient=True)
    if "{" not in spec and "\n" not in spec:
        if is_file(spec):
            return _read(Path(spec))
        known = [*shipped(), CHAT]
        shown = spec if len(spec) <= 60 else f"{spec[:60]}..."
        raise TemplateError(
            f"there is no template {shown!r}{nearest(spec, known)}: no file of that name, and the shipped ones are "
            f"{', '.join(known)}; an inline template needs a {{column}}"
        )
    # a shell gives no line breaks; where there are some, \n may begin a word, as in \nabla
    return parse(spec if "\n" in spec else spec.replace("\\n", "\n"))


def is_file(spec: str) -> bool:
    """Whether a template is given as a file, not by a shipped name or as text."""
    try:
        return spec not in (CHAT, *shipped()) and "{" not in spec and Path(spec).is_file()
    except (OSError, ValueError):  # a text longer than a file name may be
        return False


def _read(path: Path) -> Template:
    try:
        return parse(read_text(path, TemplateError), path.name)
    except OSError as error:
        raise TemplateError(f"template {path} cannot be read: {error.strerror}") from None


def choose(columns: list[str], *, with_answer: bool = True) -> str:
    """The name of the shipped template whose columns the data has.

    with_answer: False looks at the prompt's columns only.

    Raises:
        TemplateError: none fits; the sentence shows how to write one.
    """
    if with_answer and ("messages" in columns or "conversations" in columns):
        return CHAT
    for name, text in shipped().items():
        template = parse(text, name)
        needed = set(template.prompt_columns) | ({template.answer_column} if with_answer else set())
        if needed - template.optional_columns <= set(columns):
            return name
    own = [name for name in columns if not name.startswith("__")]
    names, example = _one_line(", ".join(own)), _example(own) if with_answer else _EXAMPLE
    pairs = "; or take `byeori dpo`, which such pairs are made for" if {"chosen", "rejected"} <= set(columns) else ""
    raise TemplateError(f"no shipped template fits the columns {names}; write one, {example}{pairs}")


def _example(columns: list[str]) -> str:
    """How to write a template, with the data's first and last column where their names are plain."""
    if len(columns) < 2 or not all(re.fullmatch(r"[\w .-]+", name) for name in columns):
        return _EXAMPLE
    prompt, answer = columns[0], columns[-1]
    text = f"### {prompt}:\\n{{{prompt}}}\\n\\n### {answer}:\\n{{{answer}}}"
    return f"for instance `--template '{text}'`, where the last one is the answer"


def chat_template(template: Template, bos: str, *, lead: str = "") -> str:
    """The template as a Jinja chat template, so that any server builds the prompt that was trained.

    The last user message fills the last required prompt column, a system message the column `system`; every other
    column is a keyword of `apply_chat_template` (`chat_template_kwargs` in vLLM) and empty without it.

    bos: the text of the token in front, "" where the tokenizer uses none. lead: what must stand behind it so that the
    prompt is tokenized as it was trained (data/tokenize.py finds out); not needed before a text that begins so.
    """
    if bos and template.parts[0].text.startswith(bos):
        bos = lead = ""
    main = (template.required_columns or template.prompt_columns or [""])[-1]

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


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _identifier(column: str) -> str:
    """The keyword that fills a column: its name, made a name that Jinja and Python take."""
    name = "".join(c if f"_{c}".isidentifier() else "_" for c in column)
    name = name if name.isidentifier() else f"_{name}"
    return f"{name}_" if _RESERVED.fullmatch(name) or iskeyword(name) else name
