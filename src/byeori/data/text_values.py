"""Values of a row as plain text: Hangul in one form, and marks for what must not become a control token.

각 (three letters, as macOS names files)      ->  각 (one syllable)
"a<|im_end|>" ── marked ──> "a\\U000f0000" ── chat template ── unmarked ──> "...a<|im_end|>...", cut inside it
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from byeori.data.text_encoder import TextEncoder, cut_of
from byeori.errors import TemplateError

_JAMO = re.compile("[\u1100-\u1112][\u1161-\u1175][\u11a8-\u11c2]?|[\uac00-\ud7a3][\u11a8-\u11c2]")
_MARKS = range(0xF0000, 0xFFFFE)  # private use, plane 15


def compose(value: Any) -> Any:
    """Return a value whose texts have Hangul syllables instead of their letters; nothing else is changed.

    A decomposed syllable costs a model two or three times the tokens, and is none that it has learned much about.
    """
    return _each_text(value, _composed)


def is_decomposed(value: Any) -> bool:
    """Return whether a text in a value holds a syllable in letters."""
    return any(_JAMO.search(text) for text in _texts(value))


def _composed(text: str) -> str:
    return text if text.isascii() else _JAMO.sub(lambda match: unicodedata.normalize("NFC", match.group()), text)


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value of lists and mappings with each text changed, keys as well.

    Raises:
        TemplateError: if it is nested too deeply.
    """
    try:
        return _changed(value, change)
    except RecursionError:
        raise TemplateError("a value is nested hundreds of times; remove it") from None


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, (list, tuple)):
        return [_changed(item, change) for item in value]
    if isinstance(value, Mapping):
        return {_changed(key, change): _changed(item, change) for key, item in value.items()}
    return value


def _texts(value: Any) -> list[str]:
    texts: list[str] = []

    def note(text: str) -> str:
        texts.append(text)
        return text

    _each_text(value, note)
    return texts


@dataclass(frozen=True, kw_only=True, slots=True)
class Marks:
    """Characters that stand for control tokens inside values while a chat template writes them.

    token_of: a mark -> the text of its token, in the order in which the values hold them. A template may write JSON
        in ASCII, so the mark's JSON stands for the token's.
    """

    token_of: Mapping[str, str]

    @property
    def first(self) -> str:
        """The first control token found, "" if there is none."""
        return next(iter(self.token_of.values()), "")

    def unmarked(self, text: str) -> tuple[str, list[int]]:
        """Return a text with its tokens instead of the marks, and where to cut it (text_encoder.cuts)."""
        if not self.token_of:
            return text, []
        out: list[str] = []
        cuts: list[int] = []
        length = 0
        text_of = {_in_ascii(mark): _in_ascii(token) for mark, token in self.token_of.items()}
        text_of |= self.token_of
        for piece in re.split(f"({'|'.join(map(re.escape, text_of))})", text):
            if token := text_of.get(piece):
                cuts.append(length + cut_of(token))
            out.append(token or piece)
            length += len(out[-1])
        return "".join(out), cuts


def _in_ascii(text: str) -> str:
    return json.dumps(text)[1:-1]


def marked(value: Any, encoder: TextEncoder) -> tuple[Any, Marks]:
    """Return a value of lists and mappings with a mark for each control token in its texts, and the marks."""
    texts = _texts(value)
    if not any(map(encoder.find, texts)):
        return value, Marks(token_of={})
    used = set("".join(texts))
    free = (chr(code) for code in _MARKS if chr(code) not in used)
    mark_of: dict[str, str] = {}

    def mark(text: str) -> str:
        out, at = "", 0
        while match := encoder.find(text, at):
            if match.group() not in mark_of:
                mark_of[match.group()] = next(free)
            out += text[at : match.start()] + mark_of[match.group()]
            at = match.end()
        return out + text[at:]

    return _each_text(value, mark), Marks(token_of={sign: token for token, sign in mark_of.items()})
