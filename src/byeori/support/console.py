"""What a command prints and shows on the terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from tempfile import TemporaryFile

from byeori.support.language import translated
from byeori.support.text_files import redacted, visible

_LIBRARIES = ("torch", "transformers", "peft", "datasets", "accelerate", "huggingface_hub", "bitsandbytes")

# Seconds between two lines of progress where no bar can move.
_LINE_SECONDS = 5.0

Say = Callable[[str], None]
"""A function that shows a line to the user."""


@contextmanager
def progress(words: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on the terminal, or now and then a line elsewhere; yields a function of (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    words = translated(words)
    console = Console(stderr=True)
    in_place = shown and moving()
    columns = (TextColumn(words), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not in_place, transient=True) as bar:
        task, last = bar.add_task(words, total=None), 0.0

        def show(done: int, total: int) -> None:
            nonlocal last
            bar.update(task, completed=done, total=total)
            if shown and not in_place and (done == total or time.monotonic() - last > _LINE_SECONDS):
                last = time.monotonic()
                print(f"{words} {done}/{total}", file=sys.stderr, flush=True)

        yield show


def moving() -> bool:
    """Return whether a bar can be updated in place: on a terminal, or in a notebook with ipywidgets."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


@contextmanager
def visible_output() -> Iterator[None]:
    """Show what libraries in other languages write to standard output as text that the terminal does not obey.

    tokenizers, in Rust, prints names that it finds in tokenizer.json.
    """
    print(end="", flush=True)
    with TemporaryFile() as written:
        try:
            terminal = os.dup(1)
        except OSError:  # standard output is closed
            yield
            return
        os.dup2(written.fileno(), 1)
        try:
            yield
        finally:
            print(end="", flush=True)
            os.dup2(terminal, 1)
            os.close(terminal)
            written.seek(0)
            if text := written.read().decode("utf-8", errors="replace"):
                say(text.rstrip("\n"))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep warnings, logs and progress bars of other libraries off the terminal; usable as a decorator.

    Everything is as before afterwards. Their errors reach the user as sentences of byeori's own.
    """
    import logging
    import warnings

    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), _environment(TOKENIZERS_PARALLELISM="true"), _no_half_bars():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=rf"({'|'.join(_LIBRARIES)})\b")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables that are not set."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _no_half_bars() -> Iterator[None]:
    """Disable progress bars where they cannot move: they would fill a log with half lines."""
    if moving():
        yield
        return
    from huggingface_hub import utils as hub

    datasets = sys.modules.get("datasets")  # takes long to import; a later import reads the variable
    bars = [hub, *([datasets.utils] if datasets else [])]
    disabled = [library.are_progress_bars_disabled() for library in bars]
    for library in bars:
        library.disable_progress_bars()
    try:
        with _environment(HF_DATASETS_DISABLE_PROGRESS_BARS="1"):
            yield
    finally:
        if datasets is None and (imported := sys.modules.get("datasets.utils.tqdm")):
            vars(imported)["HF_DATASETS_DISABLE_PROGRESS_BARS"] = None  # the variable was set for this block alone
            imported.enable_progress_bars()
        for library, was_disabled in zip(bars, disabled, strict=True):
            if not was_disabled:
                library.enable_progress_bars()


def shown(text: str) -> str:
    """Return a result as standard output gets it: as it is, but on a terminal as text that it does not obey."""
    return visible(text) if sys.stdout.isatty() else text


def say(text: str) -> None:
    """Print a line to standard error; standard output is for results alone."""
    print(visible(redacted(translated(text))), file=sys.stderr, flush=True)
