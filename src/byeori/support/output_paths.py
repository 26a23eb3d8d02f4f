"""Checks that output can be written, made before any work is done."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from byeori.errors import CheckpointError
from byeori.support.atomic_files import disk_errors


def check_writable(folder: Path) -> None:
    """Raise unless files can be written into a folder, which need not exist yet; leaves no trace.

    Raises:
        CheckpointError: if they cannot.
    """
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    try:
        Path(tempfile.mkdtemp(prefix=".byeori-", dir=existing)).rmdir()
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {folder} ({existing}: {error.strerror}); choose another --output_dir"
        ) from None


def check_result(output: Path, marker: str, overwrite: bool) -> None:
    """Raise unless results may be written into a folder; nothing changes.

    marker: the file that only a folder with results has.

    Raises:
        CheckpointError: if it holds results already, or cannot be written.
    """
    if (output / marker).exists() and not overwrite:
        raise CheckpointError(f"{output} holds results already; choose another --output_dir or --overwrite_output_dir")
    check_writable(output)


@contextmanager
def result(output: Path) -> Iterator[None]:
    """Make a folder for the results of the body; those of an earlier run stay until there are new ones.

    If the body fails and leaves nothing in a new folder, that goes again.

    Raises:
        CheckpointError: if it cannot be written.
    """
    existed = output.exists()
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not existed:
            with suppress(OSError):
                output.rmdir()
        raise


def check_model_output(
    output: Path, overwrite: bool, inputs: Sequence[Path] = (), *, marker: str = "config.json"
) -> None:
    """Raise unless a model may be written to a folder; with `overwrite`, it may hold a model, which is replaced.

    marker: the file that tells that the folder holds a model of this kind.

    Raises:
        CheckpointError: if it is a file, holds an input, or is not empty.
    """
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"--output_dir {output} is a file; choose a folder")
    if any(item.resolve().is_relative_to(output.resolve()) for item in inputs):
        raise CheckpointError(f"--output_dir {output} holds the adapter or its base; choose another folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not (output / marker).is_file():
        raise CheckpointError(f"{output} holds no model, so it is not overwritten; choose another folder")
    if not overwrite:
        raise CheckpointError(f"{output} is not empty; choose another folder or pass --overwrite_output_dir True")


def check_output_file(path: Path, inputs: list[str], overwrite: bool) -> None:
    """Raise unless answers may be written to a file.

    Raises:
        CheckpointError: if it is a folder or one of the inputs, exists already, or its folder does not exist.
    """
    if path.is_dir():
        raise CheckpointError(f"--output {path} is a folder; give a file, for instance {path / 'answers.jsonl'}")
    if any(Path(item).exists() and path.exists() and path.samefile(item) for item in inputs):
        raise CheckpointError(f"--output {path} is the input; give another file")
    if path.is_file() and not overwrite:
        raise CheckpointError(f"--output {path} exists already; give another file, or --overwrite to replace it")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(
            f"--output {path}: the folder {path.parent} does not exist; create it or give another file"
        )
