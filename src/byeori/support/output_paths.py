"""Whether a folder or a file may be written to, asked before any work is done."""

from __future__ import annotations

import tempfile
from pathlib import Path

from byeori.errors import CheckpointError
from byeori.support.atomic_files import disk_errors


def check_writable(folder: Path) -> None:
    """See whether files can be written into a folder that is there or can be made; leaves no trace.

    Raises:
        CheckpointError: they cannot.
    """
    there = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    try:
        Path(tempfile.mkdtemp(prefix=".byeori-", dir=there)).rmdir()
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {folder} ({there}: {error.strerror}); choose another --output_dir"
        ) from None


def check_result(output: Path, marker: str, overwrite: bool) -> None:
    """See whether results may be written into a folder, and leave it as it is.

    Raises:
        CheckpointError: it holds results already, or cannot be written.
    """
    if (output / marker).exists() and not overwrite:
        raise CheckpointError(f"{output} holds results already; choose another --output_dir or --overwrite_output_dir")
    check_writable(output)


def make_result(output: Path, names: list[str]) -> None:
    """Make a folder for results; what an earlier comparison left there goes.

    Raises:
        CheckpointError: it cannot be written.
    """
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        for name in names:
            (output / name).unlink(missing_ok=True)


def check_output_file(path: Path, inputs: list[str]) -> None:
    """See whether answers may be written to a file.

    Raises:
        CheckpointError: it is a folder, one of the inputs, or its folder cannot be written.
    """
    if path.is_dir():
        raise CheckpointError(f"--output {path} is a folder; give a file, for instance {path / 'answers.jsonl'}")
    if any(Path(item).exists() and path.exists() and path.samefile(item) for item in inputs):
        raise CheckpointError(f"--output {path} is the table that is read; give another file")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"there is no folder {path.parent} for --output {path}; make it or give another file")
