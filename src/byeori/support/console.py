"""What a command says and shows on the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec


@contextmanager
def progress(words: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal (a line every so often elsewhere); yields a function of (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    in_place = shown and moving()
    columns = (TextColumn(words), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not in_place, transient=True) as bar:
        task = bar.add_task(words, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if shown and not in_place:
                print(f"{words} {done}/{total}", file=sys.stderr, flush=True)

        yield show


def moving() -> bool:
    """Whether progress can move in place: on a terminal, or in a notebook that has widgets for it."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


def quiet_libraries() -> None:
    """Keep other libraries' notes off the terminal; their errors reach the user as sentences of ours."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|peft|transformers|datasets|accelerate)\b")
    for name in ("transformers", "peft", "datasets", "accelerate", "torch", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not moving():  # bars that cannot move fill a log with half lines
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        if datasets := sys.modules.get("datasets"):
            datasets.disable_progress_bars()
        else:  # which takes long to import, and many commands do without
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def say(text: str) -> None:
    """A line for the person at the terminal; results alone go to standard output."""
    print(text, file=sys.stderr, flush=True)
