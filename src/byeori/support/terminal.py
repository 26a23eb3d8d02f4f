"""Lines from and to a person at a terminal, or a pipe in their place.

What a program may want to read, the answers, goes to standard output; questions and notes go to standard error, and
only where a person sees them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from byeori.errors import ConfigError
from byeori.support import console
from byeori.support.language import translated

_QUOTES = '"""'


class Terminal:
    """Standard input and output. by_hand: whether a person types."""

    def __init__(self) -> None:
        if sys.stdin is None or sys.stdin.closed:
            raise ConfigError("there is nothing to read: standard input is closed")
        self.by_hand = sys.stdin.isatty()
        if self.by_hand:
            _line_editing()

    def note(self, text: str) -> None:
        """Show a line to a person."""
        if self.by_hand:
            print(translated(text), file=sys.stderr, flush=True)

    def ask(self, name: str, about: str = "") -> str:
        """Return the next line, or several between triple quotes.

        Raises:
            EOFError: at the end of the input.
            ConfigError: if it is not UTF-8.
        """
        line = self._line(f"{translated(name)}{translated(about)}> ")
        if not line.lstrip().startswith(_QUOTES):
            return line
        text = line.lstrip().removeprefix(_QUOTES)
        while _QUOTES not in text:
            text += "\n" + self._line("... ")
        return text.split(_QUOTES)[0].strip("\n")

    def _line(self, prompt: str) -> str:
        try:
            if self.by_hand:
                return input(prompt)
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise ConfigError("standard input is not UTF-8; convert it, for example with iconv") from None
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    @contextmanager
    def answer(self, title: str) -> Iterator[Callable[[str], None]]:
        """Yield a function that shows a piece of an answer at once; the answer ends with a line break."""
        if title:
            print(f"{title.strip()}: ", end="", flush=True)
        last = ""

        def emit(text: str) -> None:
            nonlocal last
            last = text or last
            print(console.shown(text), end="", flush=True)

        yield emit
        if not last.endswith("\n"):
            print(flush=True)


def _line_editing() -> None:
    """Let `input` edit its line, with wide characters, and remember earlier ones, where readline is there."""
    try:
        import readline  # noqa: F401
    except ImportError:  # Windows, and Pythons built without it
        return
