"""Checkpoints are written by a thread, while the next steps are computed.

Training stops only while adapter and optimizer are copied to memory. One checkpoint is written at a time: the next
one waits for it, and so do the end of a run, Ctrl-C and SIGTERM. A disk error is raised at the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from byeori.artifacts import layout
from byeori.errors import CheckpointError
from byeori.support.atomic_files import flush
from byeori.support.console import Say
from byeori.train import checkpoint
from byeori.train.masters import Masters
from byeori.train.state import Job, Progress


class Writer:
    """Runs one function at a time in its own thread; no exception is lost.

    say: is told of a disk error if the run already ends with another exception.
    """

    def __init__(self, say: Say) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None
        self._say = say

    def submit(self, write: Callable[[], None]) -> None:
        """Start to write once the previous write has ended.

        Raises:
            CheckpointError: if the previous write failed.
        """
        self.wait()
        self._last = self._pool.submit(write)

    def check(self) -> None:
        """Raise the error of a write that has ended; does not wait for one in progress.

        Raises:
            CheckpointError: if the write failed.
        """
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            CheckpointError: if the write failed.
        """
        if self._last is None:
            return
        try:
            self._last.result()
        finally:
            if self._last.done():  # else a second Ctrl-C ended the wait, and the end of the process waits for the write
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


class Checkpoints(Writer):
    """Writes the checkpoints of a run in progress."""

    def __init__(self, job: Job, optimizer: torch.optim.Optimizer, masters: Masters, say: Say) -> None:
        super().__init__(say)
        self._job, self._optimizer, self._masters = job, optimizer, masters

    def save(self, progress: Progress) -> None:
        """Copy the run to memory and let the writer put it on the disk, if this process writes files.

        All processes have to call it where trained weights are sharded.
        """
        if self._job.processes.main or self._masters.sharded:
            self._write(progress)

    def write(self, progress: Progress) -> None:
        """Save the run from this process alone, whichever it is, if it holds all of what is trained."""
        if not self._masters.sharded:
            self._write(progress)

    def _write(self, progress: Progress) -> None:
        job, step, best = self._job, progress.step, progress.best_step
        if step == 0:
            return
        snapshot = checkpoint.snapshot(job.model, self._optimizer, progress.state(), self._masters, job.processes)
        if self._masters.sharded and not job.processes.main:
            return
        folder = job.output_dir / f"checkpoint-{step}"

        def fill(temporary: Path) -> None:
            snapshot.write(temporary)
            job.write_sidecar(temporary)
            flush(job.output_dir / layout.LOG)

        def write() -> None:
            checkpoint.save(folder, fill)
            checkpoint.prune(job.output_dir, job.options.save_total_limit, best=best, latest=step)
            if job.mirror:
                job.mirror.put(folder)

        self.submit(write)
