"""Regular expressions of strangers: PEFT compares the names of all layers with those in an adapter_config.json.

`(a*)*b` takes a time that doubles with every letter, and Python's `re` knows no limit; it does look for signals.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_SECONDS = 3.0  # of computing


class _TooLongError(Exception):
    """A pattern took more time than any name is worth."""


def problem(pattern: str, names: Iterable[str]) -> str | None:
    """Return why names cannot be compared with a pattern, as the end of a sentence on it; None if they can.

    Its time has no limit in another thread than the main one.
    """
    try:
        with _limited(_SECONDS):
            ending = re.compile(rf"(.*\.)?({pattern})$")
            for name in names:
                ending.match(name)
    except _TooLongError:
        return "takes for ever to be compared with the name of a layer"
    except (re.error, RecursionError, OverflowError) as error:
        return f"is no regular expression ({error})"
    return None


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
