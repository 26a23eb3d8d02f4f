"""The output folder of a training run: whether it may be used, what is resumed, what is cleared."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import Any

from byeori.artifacts import layout, model_files, records, saved_model
from byeori.artifacts.layout import SETTINGS
from byeori.data import row_kinds
from byeori.distributed.processes import Processes, all_reduce_min, all_reduce_sum, barrier
from byeori.errors import CheckpointError
from byeori.support.atomic_files import copy_folder, disk_errors, remove_folder
from byeori.support.console import Say
from byeori.support.file_lock import Held, locked
from byeori.train import checkpoint, oom
from byeori.train.output_dir import LOCK, RUN_FILES, being_written, check_checkpoint, check_free, check_unoccupied

LAUNCH = ".torchrun"

# settings that decide which rows a step has, what they become, and which of the adapter's weights are trained
_SAME = (
    "finetune",
    "train_layers",
    "master_weights",
    "lora_init",
    "batch_size",
    "seed",
    "max_rows",
    "val_set_size",
    "group_by_length",
    "cutoff_len",
    "train_on_inputs",
    "add_eos_token",
    "train_turns",
)


def claim(output: Path, resume: str | None, overwrite: bool, say: Say, processes: Processes) -> Path | None:
    """Return the checkpoint to resume from, or None. Raise unless the run may write into the folder; nothing changes.

    Raises:
        CheckpointError: if the folder holds another run, cannot be written, or has nothing to resume.
    """
    folder: Path | None = None
    restarted = all_reduce_sum([float(processes.main and _restarted(output))], processes)[0] > 0
    if restarted and (whole := checkpoint.newest(output, say)):
        say(f"Restarted by torchrun; resuming from {whole}")
        return whole
    if resume == "latest":
        folder = checkpoint.newest(output, say)
        if folder is None and checkpoint.steps(output):
            raise CheckpointError(f"no checkpoint in {output} is whole; start over with --overwrite_output_dir")
        if folder is None:
            say(f"No checkpoint in {output} yet; starting at step 0")
    elif resume is not None:
        folder = Path(resume)
        check_checkpoint(folder)
    if processes.main:
        check_free(output, occupied_ok=resume is not None or overwrite or restarted)
    barrier(processes)
    return folder


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Make the folder, and keep other runs out of it while the body runs.

    Raises:
        CheckpointError: if another run is writing into it, or it cannot be written.
    """
    with ExitStack() as stack:
        with disk_errors(output, advice="choose another --output_dir"):
            output.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(output / LOCK))
            except Held as held:
                raise being_written(output, str(held)) from None
        yield


def _restarted(output: Path) -> bool:
    """Whether torchrun --max-restarts restarted this process, and the folder holds the run that it restarts."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    path = output / LAUNCH
    return again and path.is_file() and path.read_text(encoding="utf-8") == _launch()


def _launch() -> str:
    """What all attempts of one torchrun share: the id that it was given, or else its process."""
    given = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return given if given != "none" else str(os.getppid())


def check_same_run(resume: Path, now: Mapping[str, Any], row_kind: str) -> None:
    """Raise unless a checkpoint was written with the same settings: its number of steps means other rows elsewhere.

    now: the settings of this run, by name. row_kind: the name of its kind of rows.

    Raises:
        CheckpointError: if the run that wrote it put other rows into its steps, or made other examples of them.
    """
    path = resume / SETTINGS
    checkpoint.check_whole(resume)
    if not (resume / layout.STATE).is_file() or not path.is_file():
        return
    saved = saved_model.run_settings(resume)
    if (recorded := row_kinds.recorded_name(saved)) != row_kind:
        known = row_kinds.ROW_KINDS.get(recorded)
        by = f"by byeori {known.command}" if known else f"with rows of the kind {recorded}, not {row_kind}"
        raise CheckpointError(
            f"the checkpoint {resume} was written {by}; to train its weights further, give it as --base_model"
        )
    for name in _SAME:
        if name in saved and saved[name] != now[name]:
            raise CheckpointError(
                f"the checkpoint {resume} was written with --{name} {saved[name]}, not {now[name]}; go on with the "
                "same settings, or give the finished adapter as --base_model to train its weights further"
            )


def day_of(resume: Path | None, processes: Processes) -> datetime:
    """Return the date that chat templates write into the rows: that of the run which is resumed, else today's.

    All processes get the earliest of theirs.
    """
    record = records.base_record(resume) if resume is not None else None
    day = date.fromisoformat(record["day"]) if record and "day" in record else date.today()
    return datetime.fromordinal(int(all_reduce_min(day.toordinal(), processes)))


def check_same_rows(resume: Path, content: str) -> None:
    """Raise unless the rows are tokenized to what a checkpoint was trained on. content: their hash.

    Raises:
        CheckpointError: if the data, the template or the tokenizer has changed.
    """
    record = records.base_record(resume)
    if not (resume / layout.STATE).is_file() or record is None:  # a finished adapter, or an older byeori's
        return
    if record.get("rows_sha256") != content:
        raise CheckpointError(
            f"the rows are not those that the checkpoint {resume} was trained on: the data or the template has "
            "changed; go on with the same, or give the checkpoint as --base_model to train its weights further on these"
        )


def make(output: Path, *, clear: bool, resume: Path | None, anew: bool, say: Say) -> None:
    """Prepare the folder of a run that is about to start. clear: delete the earlier run in it, now and not before.

    anew: the user did not ask to resume. Under torchrun the folder notes which run it holds, so that another attempt
    resumes from its checkpoints.

    Raises:
        CheckpointError: if it cannot be written.
    """
    if anew and not clear and not _restarted(output):
        check_unoccupied(output)  # once more: another run may have begun and ended meanwhile
    with disk_errors(output):
        if clear:
            for path in (*(output / name for name in (*RUN_FILES, layout.CONFIG)), *model_files.weight_files(output)):
                path.unlink(missing_ok=True)
            for _, folder in checkpoint.steps(output):
                remove_folder(folder)
        if anew and not _restarted(output):
            (output / oom.NOTE).unlink(missing_ok=True)
        if resume is not None:
            _set_others_aside(resume, output, say)
        (output / LAUNCH).unlink(missing_ok=True)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            (output / LAUNCH).write_text(_launch(), encoding="utf-8")


def _set_others_aside(resume: Path, output: Path, say: Say) -> None:
    """Rename checkpoints that did not lead to this one: `latest` would take them for this run's.

    The best checkpoint so far is copied from the folder that the run was in.
    """
    own = resume.resolve().parent == output.resolve()
    last = max((step for step, folder in checkpoint.steps(output) if folder.resolve() == resume.resolve()), default=0)
    for step, folder in checkpoint.steps(output):
        if not own or step > last:
            free = checkpoint.aside(folder.name, lambda name: (output / name).exists())
            folder.rename(output / free)
            say(f"{folder} belongs to another run; renamed to {free}")
    best = checkpoint.best_of(resume)
    if best is not None and not (output / best.name).exists() and checkpoint.verify(best) is None:
        copy_folder(best, output / best.name)
