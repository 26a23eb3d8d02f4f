"""What a run does when something goes wrong: memory runs out, another rank is lost, a loss is not finite."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

from byeori.distributed import processes
from byeori.errors import TrainingError
from byeori.support.console import Say, say
from byeori.train import checkpoint, oom
from byeori.train.async_save import Checkpoints
from byeori.train.oom import NoRoom
from byeori.train.state import Abandoned, Again, Job, Progress

_BAD_STEPS = 3


class Recovery:
    """Lets the run go on if that is possible; else saves what it has done and tells the user how to go on.

    say: shows a line above the progress.
    """

    def __init__(self, job: Job, progress: Progress, checkpoints: Checkpoints, say: Say) -> None:
        self._job, self._progress, self._checkpoints, self._say = job, progress, checkpoints, say
        self._good = replace(progress)

    def before_step(self) -> None:
        """Remember the run as it was before the bad steps that may come."""
        if self._progress.bad_steps == 0:
            self._good = replace(self._progress)

    def on_split(self, halvings: int, why: NoRoom | None) -> None:
        """Micro-batches are split, and the step is computed again. why: None if another process ran out of memory."""
        self._progress.halvings = halvings
        where = f"{len(why.rows)} rows ({why.tokens} tokens) did" if why else "another process's rows did"
        self._say(
            f"step {self._progress.step + 1}: {where} not fit in memory together; from here on micro-batches are split "
            f"into {2**halvings}, and the step is computed again with the same result"
        )

    def on_not_finite(self, rows: list[int]) -> None:
        """A step was skipped. rows: its rows, counted from 1.

        Raises:
            TrainingError: if it was the third in a row.
        """
        named = ", ".join(map(str, rows))
        self._say(
            f"step {self._progress.step}: the loss or its gradient is not finite; the step is skipped (rows {named})"
        )
        if self._progress.bad_steps < _BAD_STEPS:
            return
        self._checkpoints.save(self._good)
        step, folder = self._good.step, self._job.output_dir / f"checkpoint-{self._good.step}"
        raise TrainingError(
            f"the loss was not finite in {_BAD_STEPS} steps in a row, last with rows {named}; lower --learning_rate or "
            f"look at these rows; {f'{folder} holds the run from before' if step else 'no step was good'}"
        )

    def on_out_of_memory(self, error: NoRoom, *, step_done: bool) -> None:
        """Save what the run has done. step_done: the last step is done, with all that follows it.

        Raises:
            Again: if weights are sharded and the run can go on in smaller micro-batches, in new processes.
        """
        if self._job.processes.sharded and not error.alone:
            self._restart_smaller(error, step_done)
        if step_done and self._job.processes.main:
            self._checkpoints.write(self._progress)

    def on_lost_rank(self, *, step_done: bool) -> NoReturn:
        """Save what the run has done, and let one of the processes that are left say so.

        Raises:
            Abandoned: always.
        """
        job, progress = self._job, self._progress
        if step_done and job.processes.main and not checkpoint.is_there(job.output_dir, progress.step):
            self._checkpoints.write(progress)
        self._checkpoints.wait()
        if processes.first_to_speak():
            whole = checkpoint.newest(job.output_dir)
            done = f"everything up to {whole.name} is in {job.output_dir}" if whole else "no checkpoint was written yet"
            say(
                f"error: another process of this run ended at step {progress.step + 1} (killed, or out of memory?); "
                f"{done}; go on with the same command and --resume_from_checkpoint latest"
            )
        raise Abandoned("another process of this run ended")

    def _restart_smaller(self, error: NoRoom, step_done: bool) -> NoReturn:
        """The other processes cannot leave the failed pass: this one alone saves the run, for the next attempt."""
        progress = self._progress
        if processes.first_to("restart with smaller micro-batches"):
            oom.remember(self._job.output_dir, progress.halvings + 1)
            progress.halvings += 1
            if step_done and progress.step:
                self._checkpoints.write(progress)
            self._checkpoints.wait()
        raise Again(
            f"step {progress.step + step_done}: {len(error.rows)} rows ({error.tokens} tokens) do not fit in memory "
            "together; go on with the same command and --resume_from_checkpoint latest, which splits micro-batches in "
            "two"
        )
