"""Template or chat template -> Ollama's TEMPLATE, in Go's template language, so that Ollama builds the trained prompt.

    prompt template ── its literals and columns ─────────────────────────┐
    chat template ── what it writes around marked turns, put in pieces ──┴─> OllamaTemplate ── go, render

Ollama knows one system prompt and the texts of user and assistant. It adds BOS itself, as the GGUF file says, so that
is left out here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from byeori.data.template import SPACES, Part, Template

Render = Callable[[list[dict[str, str]]], str]
"""Messages -> the prompt that the tokenizer's chat template makes of them, up to the answer."""

ANYTHING = "{{ .Prompt }}"
"""The TEMPLATE that passes a prompt on as it is."""

_LAST_USER = '{{ $user := "" }}{{ range .Messages }}{{ if eq .Role "user" }}{{ $user = .Content }}{{ end }}{{ end }}'


@dataclass(frozen=True, kw_only=True, slots=True)
class OllamaTemplate:
    """go: the text of TEMPLATE. render: (system prompt, turns of user and assistant) -> what Ollama makes of it.

    notes: what a request to Ollama cannot give this template.
    """

    go: str
    render: Callable[[str, Sequence[dict[str, str]]], str]
    notes: tuple[str, ...] = ()


def of_template(template: Template, front: str) -> OllamaTemplate | None:
    """Compile a prompt template; None if it has required columns besides the user's text and `system`.

    The last user message fills the last required prompt column, as in the exported chat template. front: text of the
    tokens that the tokenizer puts in front, such as BOS; "" if there are none.
    """
    main = template.main_column
    if set(template.required_columns) - {main, "system"}:
        return None
    values = {"system": ".System", main: "$user"}
    parts = _without_ends(template, front)
    go, block = [_LAST_USER], 0
    for part in parts:
        if part.block != block:
            if block:
                go.append("{{ end }}")
            if part.block:
                given = list(dict.fromkeys(values[name] for name in _inside(parts, part.block) if name in values))
                go.append(f"{{{{ if {'or ' if len(given) > 1 else ''}{' '.join(given) or 'false'} }}}}")
            block = part.block
        if part.column is None:
            go.append(_literal(part.text))
        elif part.column in values:
            go.append(f"{{{{ {values[part.column]} }}}}")
    if block:
        go.append("{{ end }}")

    def render(system: str, turns: Sequence[dict[str, str]]) -> str:
        user = next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), "")
        row = {"system": system, main: user}
        shown = {part.block for part in parts if not part.block or any(map(row.get, _inside(parts, part.block)))}
        texts = (
            part.text if part.column is None else row.get(part.column, "") for part in parts if part.block in shown
        )
        return "".join(texts)

    notes = []
    if parts and (parts[-1].column or parts[-1].block or not parts[-1].text.strip(SPACES)):
        notes.append("Ollama sends spaces at the end of a text too, which the trained prompt ends without")
    never = [name for name in template.prompt_columns if name not in values]
    if never:
        notes.append(f"Ollama has no place for {', '.join(map(repr, never))}, which stays empty there")
    return OllamaTemplate(go="".join(go), render=render, notes=tuple(notes))


def _inside(parts: Sequence[Part], block: int) -> list[str]:
    return [part.column for part in parts if part.block == block and part.column]


def _without_ends(template: Template, front: str) -> list[Part]:
    """Return the prompt's parts without the tokens in front, and without the spaces before the answer."""
    parts = list(template.parts[: template.answer])
    if parts and parts[0].column is None:
        parts[0] = replace(parts[0], text=parts[0].text.removeprefix(front))
    if parts and parts[-1].column is None:
        parts[-1] = replace(parts[-1], text=parts[-1].text.rstrip(SPACES))
    return parts


# ---- chat templates ------------------------------------------------------------------------------------------------

_SYSTEM, _ASKED, _ANSWERED, _AGAIN = "Qsystem0Q", "Quser1Q", "Qassistant2Q", "Quser3Q"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pieces:
    """What a chat template writes: opening or system[0] + S + system[1], U, answer + A, again + U, ..., ending."""

    opening: str
    system: tuple[str, str] | None
    answer: str
    again: str
    ending: str

    def render(self, system: str, turns: Sequence[dict[str, str]]) -> str:
        text = f"{self.system[0]}{system}{self.system[1]}" if system and self.system else self.opening
        asked = False
        for turn in turns:
            if turn["role"] == "user":
                text += (self.again if asked else "") + turn["content"]
                asked = True
            elif turn["role"] == "assistant":
                text += self.answer + turn["content"]
        return text + self.ending

    def go(self) -> str:
        opening = _literal(self.opening)
        if self.system:
            first, second = map(_literal, self.system)
            opening = f"{{{{ if .System }}}}{first}{{{{ .System }}}}{second}{{{{ else }}}}{opening}{{{{ end }}}}"
        return (
            f"{opening}{{{{ $asked := false }}}}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{{{{ if $asked }}}}{_literal(self.again)}{{{{ end }}}}'
            "{{ .Content }}{{ $asked = true }}"
            f'{{{{ else if eq .Role "assistant" }}}}{_literal(self.answer)}{{{{ .Content }}}}{{{{ end }}}}'
            f"{{{{ end }}}}{_literal(self.ending)}"
        )


def of_chat_template(render: Render, source: str, front: str) -> OllamaTemplate | None:
    """Compile a chat template from what it writes; None if that is not its turns in order with fixed words between.

    source: its text. front: as for `of_template`.
    """
    try:
        pieces = _pieces(render, front)
    except Exception:  # each chat template refuses in its own way
        return None
    if pieces is None:
        return None
    notes = []
    if pieces.system is None:
        notes.append("the chat template takes no system prompt, so Ollama's is left out")
    if "tools" in source:
        notes.append("Ollama passes no tools to this TEMPLATE")
    if "strftime_now" in source:
        notes.append("the chat template writes today's date, and TEMPLATE the date of this export")
    return OllamaTemplate(go=pieces.go(), render=pieces.render, notes=tuple(notes))


def _pieces(render: Render, front: str) -> _Pieces | None:
    """Cut the text of marked conversations at the marks, and compare longer conversations with the pieces."""

    def text(*turns: tuple[str, str]) -> str:
        return render([{"role": role, "content": content} for role, content in turns]).removeprefix(front)

    asked, answered, again = ("user", _ASKED), ("assistant", _ANSWERED), ("user", _AGAIN)
    opening, _, ending = text(asked).partition(_ASKED)
    between = text(asked, answered, again).removeprefix(opening + _ASKED).removesuffix(_AGAIN + ending)
    answer, _, following = between.partition(_ANSWERED)
    try:
        first, _, rest = text(("system", _SYSTEM), asked).partition(_SYSTEM)
        system = (first, rest.partition(_ASKED)[0])
    except Exception:  # as Gemma 2's does, which knows no system prompt
        system = None
    pieces = _Pieces(opening=opening, system=system, answer=answer, again=following, ending=ending)
    longer = [asked, answered, again, ("assistant", "y"), ("user", "z")]
    for turns in ([asked], [asked, answered, again], longer):
        for start in ([], [("system", _SYSTEM)]) if system else ([],):
            messages = [{"role": role, "content": content} for role, content in turns]
            if pieces.render(_SYSTEM if start else "", messages) != text(*start, *turns):
                return None
    return pieces


# ---- Go ------------------------------------------------------------------------------------------------------------


def _literal(text: str) -> str:
    """Return text as Go's template language and a Modelfile's triple quotes have it."""
    return re.sub(r'\{$|[{"]{2,}|"$|^"', lambda match: f"{{{{ {_quoted(match.group())} }}}}", text)


def _quoted(text: str) -> str:
    return "`" + text + "`" if '"' in text else json.dumps(text)
