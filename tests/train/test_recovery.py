"""What a run does when something goes wrong, without a model: what is saved, reported and raised."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from byeori.errors import TrainingError
from byeori.train import oom, recovery
from byeori.train.oom import NoRoom
from byeori.train.recovery import Recovery
from byeori.train.state import Abandoned, Again, Progress


@dataclass
class Saved:
    """Stands in for the checkpoints of a run: the steps that were saved."""

    steps: list[int] = field(default_factory=list)
    waited: bool = False

    def save(self, progress: Progress) -> None:
        self.steps.append(replace(progress).step)

    write = save

    def wait(self) -> None:
        self.waited = True


@dataclass
class Run:
    progress: Progress
    saved: Saved
    said: list[str]
    recovery: Recovery


def run(folder: Path, *, sharded: bool = False, **values: Any) -> Run:
    job: Any = SimpleNamespace(output_dir=folder, processes=SimpleNamespace(sharded=sharded, main=True))
    progress, saved, said = Progress(**values), Saved(), []
    checkpoints: Any = saved
    return Run(progress, saved, said, Recovery(job, progress, checkpoints, said.append))


def bad_step(this: Run) -> None:
    this.recovery.before_step()
    this.progress.step += 1
    this.progress.bad_steps += 1
    this.recovery.on_not_finite([3, 7])


def test_the_third_bad_step_in_a_row_saves_the_run_from_before_and_ends_it(tmp_path: Path) -> None:
    this = run(tmp_path, step=4)
    bad_step(this)
    bad_step(this)
    assert this.said[0] == "step 5: the loss or its gradient is not finite; the step is skipped (rows 3, 7)"
    assert this.saved.steps == []
    with pytest.raises(TrainingError, match=r"3 steps in a row, last with rows 3, 7; .*checkpoint-4 holds the run"):
        bad_step(this)
    assert this.saved.steps == [4]


def test_a_good_step_in_between_starts_the_count_again(tmp_path: Path) -> None:
    this = run(tmp_path, step=4)
    bad_step(this)
    this.progress.step, this.progress.bad_steps = 6, 0
    this.recovery.before_step()
    bad_step(this)
    bad_step(this)
    with pytest.raises(TrainingError, match="checkpoint-6 holds"):
        bad_step(this)


def test_a_split_is_reported_and_counted(tmp_path: Path) -> None:
    this = run(tmp_path, step=1)
    this.recovery.on_split(1, NoRoom([0, 5], 640))
    this.recovery.on_split(2, None)
    assert this.progress.halvings == 2
    assert this.said[0].startswith("step 2: 2 rows (640 tokens) did not fit in memory together; from here on")
    assert this.said[1].startswith("step 2: another process's rows did not fit") and "split into 4" in this.said[1]


@pytest.mark.parametrize("step_done", [False, True])
def test_out_of_memory_saves_a_step_that_is_done(step_done: bool, tmp_path: Path) -> None:
    this = run(tmp_path, step=3)
    this.recovery.on_out_of_memory(NoRoom([0], 640), step_done=step_done)
    assert this.saved.steps == ([3] if step_done else [])


def test_sharded_rows_that_do_not_fit_end_the_attempt_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery.processes, "first_to", lambda act: True)
    this = run(tmp_path, sharded=True, step=3)
    with pytest.raises(Again, match=r"step 4: 2 rows \(640 tokens\) do not fit in memory together; go on"):
        this.recovery.on_out_of_memory(NoRoom([0, 1], 640), step_done=True)
    assert (oom.remembered(tmp_path), this.saved.steps, this.saved.waited) == (1, [3], True)
    alone = run(tmp_path, sharded=True, step=3)
    alone.recovery.on_out_of_memory(NoRoom([0], 640), step_done=True)  # no smaller size would help
    assert alone.saved.steps == [3]


def test_a_lost_rank_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for first in (True, False):
        monkeypatch.setattr(recovery.processes, "first_to_speak", lambda first=first: first)
        this = run(tmp_path, step=3)
        with pytest.raises(Abandoned):
            this.recovery.on_lost_rank(step_done=True)
        assert (this.saved.steps, this.saved.waited) == ([3], True)
        error = capsys.readouterr().err
        assert error.startswith("error: another process of this run ended at step 4") == first
        assert ("no checkpoint was written yet" in error) == first
