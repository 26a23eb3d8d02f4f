"""Row -> segments. Text only; no tokenizer is needed here.

A template reads like the finished example. Its last `{column}` is the answer:

    ### 본문:
    {document}

    ### 제목:
    {title}

- `{column}` is replaced by the row's text; braces inside a value are text.
- `{{` and `}}` are literal braces.
- `[[ ... ]]` is omitted if all columns inside it are empty (or null); without a column it is literal.
- The answer, and whatever follows it in the template, is trained; everything before it is the prompt.
- Spaces at the end of the prompt belong to the answer: tokenizers join a space with the word behind it, so models know
  no prompt that ends with one.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from byeori.data import chat_columns
from byeori.data.column_names import EXAMPLE, example_for
from byeori.data.text_values import compose
from byeori.errors import TemplateError
from byeori.support.suggestions import nearest, nearest_file
from byeori.support.text_files import one_line, read_text

# Of three closing brackets the first is literal: [[[{tag}]]] is a block around [{tag}].
_TOKEN = re.compile(r"\{\{|\}\}|\[\[|\]\](?!\])|\{[^{}\n]*\}|\{|\}")
_HALF = re.compile("[\ud800-\udfff]")
CHAT = "chat"
SPACES = " \t\u00a0\u3000"
"""What a prompt does not end with. A line break stays: tokenizers end a token with it."""
_OTHER_ROWS = {
    "input_ids": "token ids, and byeori makes the tokens itself; give the texts or messages that they were made of",
    "segments": "pieces of a finished text (Axolotl's input_output), and byeori reads columns; write what is not "
    "trained and what is into two columns, such as `prompt` and `completion`",
    "completions": "several answers or steps, and byeori trains one answer; write a row for each that is right, with "
    "the columns `prompt` and `completion`",
}
"""Columns of rows that others train and byeori does not, and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A piece of an example's text.

    trained: whether the model learns to write it. column: where it comes from, None for the template's own words.
    """

    text: str
    trained: bool
    column: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A literal (column is None) or a column; `block` is the number of the `[[ ]]` around it, 0 outside."""

    text: str = ""
    column: str | None = None
    block: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """A parsed template.

    text: as written. name: of a built-in template or a file, or `inline`.
    parts: literals and columns in order. answer: the index of the answer in `parts`.
    lenient: whether the data may lack the columns inside `[[ ]]`; in a template of the user's own, that is a typo.
    """

    text: str
    name: str
    parts: tuple[Part, ...]
    answer: int
    lenient: bool = False

    @property
    def answer_column(self) -> str:
        """The last column of the template."""
        return self.parts[self.answer].column or ""

    @property
    def prompt_columns(self) -> list[str]:
        """The columns of the prompt in order, each once."""
        return list(dict.fromkeys(p.column for p in self.parts[: self.answer] if p.column))

    @property
    def columns(self) -> list[str]:
        """All columns in order, each once."""
        return [*self.prompt_columns, self.answer_column]

    @property
    def optional_columns(self) -> set[str]:
        """The columns that occur inside `[[ ]]` only."""
        outside = {p.column for p in self.parts if p.column and not p.block}
        return {p.column for p in self.parts if p.column and p.block} - outside

    @property
    def required_columns(self) -> list[str]:
        """The columns of the prompt that every row must have."""
        return [name for name in self.prompt_columns if name not in self.optional_columns]

    @property
    def main_column(self) -> str:
        """The column that a chat's user message fills: the last required one of the prompt; "" without columns."""
        return (self.required_columns or self.prompt_columns or [""])[-1]

    def has_empty_prompt(self, row: Mapping[str, object]) -> bool:
        """Return whether the prompt has required columns and all of them are empty in this row."""
        required = self.required_columns
        return bool(required) and all(_is_empty(row.get(name)) for name in required)

    def check_columns(self, columns: list[str], *, with_answer: bool) -> None:
        """Raise TemplateError if the data lacks a column of the template (see `lacking`)."""
        for column in self.lacking(columns, with_answer=with_answer):
            raise TemplateError(unknown_column(column, columns))

    def lacking(self, columns: list[str], *, with_answer: bool) -> list[str]:
        """Return the columns of the template that the data must have and does not."""
        known = {*columns, *(self.optional_columns if self.lenient else ())}
        wanted = [*self.prompt_columns, *([self.answer_column] if with_answer else [])]
        return [column for column in wanted if column not in known]

    @property
    def literal_blocks(self) -> list[str]:
        """Every `[[ ... ]]` without a column, which is plain text."""
        return [block for part in self.parts for block in re.findall(r"\[\[.*?\]\]", part.text, re.DOTALL)]

    @property
    def suffix(self) -> str:
        """The template's words after the answer."""
        return "".join(part.text for part in self.parts[self.answer + 1 :])

    def segments(self, row: Mapping[str, object], *, with_answer: bool = True) -> tuple[Segment, ...]:
        """Fill the template with a row; without the answer (and what follows it) if `with_answer` is False.

        Spaces at the end of the prompt are the beginning of what is trained.

        Raises:
            TemplateError: if a column is missing, or a value is not text.
        """
        parts = self.parts if with_answer else self.parts[: self.answer]
        filled = {part.block for part in parts if part.column and part.block and not _is_empty(row.get(part.column))}
        out = []
        for index, part in enumerate(parts):
            if part.block and part.block not in filled:
                continue
            text = part.text if part.column is None else self._value(row, part)
            if text:
                out.append(Segment(text=text, trained=index >= self.answer, column=part.column))
        return _without_spaces_at_the_prompts_end(out)

    def prompt(self, row: Mapping[str, object]) -> str:
        """Return the text that the model is given before it answers."""
        return "".join(segment.text for segment in self.segments(row, with_answer=False))

    def _value(self, row: Mapping[str, object], part: Part) -> str:
        column = part.column or ""
        if column not in row and not part.block:
            raise TemplateError(unknown_column(column, row))
        value = row.get(column)
        if is_missing(value):
            value = "" if part.block else None
        value = as_text(value)
        if not isinstance(value, str):
            raise TemplateError(not_text(column, value))
        text: str = compose(value)
        return text


def _without_spaces_at_the_prompts_end(segments: list[Segment]) -> tuple[Segment, ...]:
    """Move the spaces at the end of the prompt to the answer, if there is one."""
    prompt = [segment for segment in segments if not segment.trained]
    answer = segments[len(prompt) :]
    moved = ""
    while prompt and prompt[-1].text[-1] in SPACES:
        last = prompt.pop()
        text = last.text.rstrip(SPACES)
        moved = last.text[len(text) :] + moved
        if text:
            prompt.append(replace(last, text=text))
    first = [Segment(text=moved, trained=True)] if moved and answer else []
    return (*prompt, *first, *answer)


def as_text(value: object) -> object:
    """Return a number or true/false as JSON writes it; any other value as it is.

    Raises:
        TemplateError: if a text holds half of a surrogate pair, which no tokenizer reads.
    """
    if isinstance(value, str) and not value.isascii() and _HALF.search(value):
        raise TemplateError("a text holds half of a surrogate pair (\\ud800 to \\udfff), no character; remove it")
    return json.dumps(value) if isinstance(value, (bool, int, float)) else value


def unknown_column(column: str, columns: Iterable[str]) -> str:
    """Return the sentence for a column that the data does not have."""
    names = [name for name in columns if not name.startswith("__")]
    return one_line(
        f"the template uses the column {column!r}, which the data does not have{nearest(column, names)}; its columns "
        f"are {', '.join(names)}",
        1000,
    )


def not_text(column: str, value: object) -> str:
    """Return the sentence for a value that is not text."""
    kind = "null" if value is None else f"{type(value).__name__} {one_line(str(value), 40)}"
    return f"column {column!r} holds {kind}, not text"


def is_missing(value: object) -> bool:
    """Return whether a value is null, or NaN, which pandas writes for it."""
    return value is None or (isinstance(value, float) and value != value)


def _is_empty(value: object) -> bool:
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def parse(text: str, name: str = "inline", *, lenient: bool = False) -> Template:
    """Parse a template's text.

    Raises:
        TemplateError: if a brace or block is not closed, or there is no column, or the answer is inside a block or
            also in the prompt.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").rstrip()
    parts = _parts(text, name)
    columns = [index for index, part in enumerate(parts) if part.column]
    if not columns:
        raise TemplateError(f"template {name} has no column, so there is no answer to train; {EXAMPLE}")
    answer = columns[-1]
    column = parts[answer].column
    if parts[answer].block:
        raise TemplateError(f"template {name}: the answer {{{column}}} is inside [[ ]]; move it out")
    if any(part.column == column for part in parts[:answer]):
        raise TemplateError(f"template {name}: the answer {{{column}}} is also in the prompt, which would give it away")
    return Template(text=text, name=name, parts=tuple(parts), answer=answer, lenient=lenient)


def _parts(text: str, name: str) -> list[Part]:
    parts: list[Part] = []
    literal, position, block, blocks = "", 0, 0, 0

    def flush(until: int) -> None:
        nonlocal literal
        literal += text[position:until]
        if literal:
            parts.append(Part(text=literal, block=block))
        literal = ""

    for match in _TOKEN.finditer(text):
        token, start = match.group(), match.start()
        line = text.count("\n", 0, start) + 1
        if token in ("{{", "}}"):
            literal += text[position:start] + token[0]
        elif token[0] == "{" and not token[1:-1].strip() and len(token) > 1:
            raise TemplateError(
                f"template {name}, line {line}: {token!r} has no column name; write '{{{{}}}}' for literal braces"
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
            parts.append(Part(column=unicodedata.normalize("NFC", token[1:-1].strip()), block=block))
        position = match.end()
    if block:
        raise TemplateError(f"template {name}: [[ is not closed with ]]")
    flush(len(text))
    return parts


def shipped() -> dict[str, str]:
    """Return name -> text of the templates that come with the package."""
    folder = resources.files("byeori.data") / "templates"
    return {
        item.name.removesuffix(".txt"): item.read_text(encoding="utf-8")
        for item in sorted(folder.iterdir(), key=lambda item: item.name)
        if item.name.endswith(".txt")
    }


def resolve(spec: str) -> Template | None:
    """Return the template of a built-in name, a file, or inline text; None for `chat`.

    Raises:
        TemplateError: if there is no such name or file, or the text does not parse.
    """
    if spec == CHAT:
        return None
    if spec in shipped():
        return parse(shipped()[spec], spec, lenient=True)
    if "{" not in spec and "\n" not in spec:
        if is_file(spec):
            try:
                return parse(read_text(Path(spec), TemplateError), Path(spec).name)
            except OSError as error:
                raise TemplateError(f"template {spec} cannot be read: {error.strerror}") from None
        known = [*shipped(), CHAT]
        near = nearest(spec, known) or nearest_file(Path(spec))
        shown = spec if len(spec) <= 60 else f"{spec[:60]}..."
        raise TemplateError(
            f"there is no template or file {shown!r}{near}; the templates are {', '.join(known)}, and "
            "an inline template needs a {column}"
        )
    # a shell passes \n as two characters; in a text with real line breaks it may begin a word, as in \nabla
    return parse(spec if "\n" in spec else spec.replace("\\n", "\n"))


def is_file(spec: str) -> bool:
    """Return whether a template is given as a file, not by a built-in name or as text."""
    try:
        return spec not in (CHAT, *shipped()) and "{" not in spec and Path(spec).is_file()
    except (OSError, ValueError):  # a text longer than a file name may be
        return False


def choose(columns: list[str], *, with_answer: bool = True, texts: Collection[str] = ()) -> str:
    """Return the name of the built-in template whose columns the data has.

    with_answer: if False, only the prompt's columns are compared. texts: columns that hold no messages, whatever they
        are called.

    Raises:
        TemplateError: if none fits; the sentence shows how to write one.
    """
    talks = [name for name in columns if name not in texts]
    if with_answer and ("messages" in talks or "conversations" in talks):
        return CHAT
    for name, text in shipped().items():
        template = parse(text, name)
        needed = set(template.prompt_columns) | ({template.answer_column} if with_answer else set())
        if needed - template.optional_columns <= set(columns):
            return name
    if chat_columns.has_conversation(talks) if with_answer else chat_columns.has_question(talks):
        return CHAT
    own = [name for name in columns if not name.startswith("__")]
    if other := next((name for name in _OTHER_ROWS if name in columns), None):
        raise TemplateError(f"the column {other!r} holds {_OTHER_ROWS[other]}")
    names, example = one_line(", ".join(own), 1000), example_for(own) if with_answer else EXAMPLE
    pairs = "; or use `byeori dpo`, which trains on such pairs" if {"chosen", "rejected"} <= set(columns) else ""
    whole = f"; or train all of its text with --text_column {own[0]}" if with_answer and len(own) == 1 else ""
    raise TemplateError(f"no built-in template fits the columns {names}; {example}{pairs}{whole}")
