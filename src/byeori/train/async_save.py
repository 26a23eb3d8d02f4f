"""Checkpoints are written by a thread, while the next steps are computed.

Training stops only while adapter and optimizer are copied to memory. One checkpoint is written at a time: the next
one waits for it, and so do the end of a run, Ctrl-C and SIGTERM. An error of the disk is raised at the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from byeori.errors import CheckpointError


class Writer:
    """Runs one function at a time in a thread of its own; what it raises is never lost.

    say: told of an error of the disk when the run already ends with another one.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None
        self._say = say

    def submit(self, write: Callable[[], None]) -> None:
        """Start to write, once the one before is written.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        self._last = self._pool.submit(write)

    def check(self) -> None:
        """Raise the error of a write that has ended; does not wait for one that goes on.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Until everything is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._last is None:
            return
        try:
            self._last.result()
        finally:
            if self._last.done():  # else a second Ctrl-C ended the waiting, and the end of the process waits for it
                self._last = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except CheckpointError as second:
            if error is None:
                raise
            self._say(str(second))
        finally:
            self._pool.shutdown(wait=False)
