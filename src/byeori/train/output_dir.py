"""Whether a run may write to its output folder, checked before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from byeori.artifacts import layout
from byeori.errors import CheckpointError, ConfigError
from byeori.support import file_lock
from byeori.support.output_paths import check_writable
from byeori.support.suggestions import nearest_file

LOCK = ".lock"
RUN_FILES = (
    layout.ADAPTER_CONFIG,
    layout.ADAPTER,
    layout.LOG,
    layout.LIVE,
    layout.SETTINGS,
    layout.BASE,
    layout.AUDIT,
    layout.METRICS,
    layout.ORDER,
    layout.TRACKERS,
)


def check_not_the_start(output: Path, base: str) -> None:
    """Raise unless a run writes to another folder than that of the weights it starts from.

    Raises:
        ConfigError: if it is the same folder, or that of the run whose checkpoint it starts from.
    """
    start = Path(base).resolve()
    own = start.parent == output.resolve() and start.name.startswith("checkpoint-")
    if Path(base).is_dir() and (own or start == output.resolve()):
        raise ConfigError(f"--output_dir {output} holds the weights that the run starts from; give another folder")


def check_free(output: Path, *, occupied_ok: bool) -> None:
    """Raise unless a run may write to a folder. occupied_ok: also to one that holds another run.

    Raises:
        CheckpointError: if another run is in it or writes to it, if it holds files of no run, or is not writable.
    """
    if holder := file_lock.holder(output / LOCK):
        raise being_written(output, holder)
    if not holds_run(output) and (foreign := _foreign(output)):
        names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise CheckpointError(
            f"--output_dir {output} holds files that are not of a run ({names}), and a run could overwrite them; give "
            "a new or an empty folder"
        )
    if not occupied_ok:
        check_unoccupied(output)
    check_writable(output)


def check_unoccupied(output: Path) -> None:
    """Raise if a folder holds another run.

    Raises:
        CheckpointError: if it does.
    """
    if holds_run(output):
        raise CheckpointError(
            f"{output} holds another run; resume it with --resume_from_checkpoint latest, choose another --output_dir, "
            "or start over with --overwrite_output_dir"
        )


def being_written(output: Path, holder: str) -> CheckpointError:
    """Return the error about a folder that another run is writing into. holder: the process of that run."""
    return CheckpointError(
        f"{output} is being written by another run ({holder}); wait for it, or choose another --output_dir"
    )


def check_checkpoint(folder: Path) -> None:
    """Raise unless a folder to resume from exists.

    Raises:
        CheckpointError: if there is no such folder.
    """
    if not folder.is_dir():
        near = nearest_file(folder)
        raise CheckpointError(
            f"there is no checkpoint {folder}{near}; give --resume_from_checkpoint a folder or `latest`"
        )


def _foreign(output: Path) -> list[str]:
    """The files that keep a run out of a folder: all but a card, logs and hidden ones."""
    names = [path.name for path in output.iterdir() if path.is_file()] if output.is_dir() else []
    return sorted(
        name for name in names if name != layout.CARD and name[0] != "." and not name.endswith((".log", ".out", ".err"))
    )


def holds_run(output: Path) -> bool:
    """Return whether a folder holds files or checkpoints of a run."""
    checkpoints = (path for path in output.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal())
    return any((output / name).exists() for name in RUN_FILES) or any(checkpoints)
