"""The formats in which weights leave byeori. A new format is one file with a class, and a line in FORMATS.

merge:    base + adapter ── MergedModel ── write, check ──> a folder in one format
publish:  a folder ── the format that recognises it ── files ──> what is uploaded
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from byeori.errors import ModelError
from byeori.export.adapter_folder import AdapterFolder
from byeori.export.gguf_folder import GgufFolder
from byeori.export.safetensors_folder import SafetensorsFolder

if TYPE_CHECKING:
    from byeori.export.merge_plan import MergedModel, Progress


class Format(Protocol):
    """What publish needs."""

    name: str

    def recognises(self, folder: Path) -> bool:
        """Return whether the folder is in this format."""

    def files(self, folder: Path) -> Iterator[Path]:
        """Yield the files that make up the model (some may be missing), after checking that the weights are whole.

        Raises:
            ModelError: if the model is unfinished or damaged.
        """


class MergedFormat(Format, Protocol):
    """What merge needs."""

    def write(self, folder: Path, model: MergedModel, on_progress: Progress) -> None:
        """Write the merged model into an empty folder.

        Raises:
            ModelError: if a number in the adapter or the result is not finite.
            OSError: if the disk is full or read-only.
        """

    def check(self, folder: Path, model: MergedModel, on_progress: Progress) -> tuple[dict[str, Any], str]:
        """Compare what was written with the adapter on its base.

        Returns what was measured, for merge_report.json, and in what they differ ("" if they do not).

        Raises:
            MemoryError: if there is too little memory for it.
        """


FORMATS: tuple[Format, ...] = (AdapterFolder(), SafetensorsFolder(), GgufFolder())


def format_of(folder: Path) -> Format:
    """Return the format of a folder.

    Raises:
        ModelError: if it holds no weights in a known format.
    """
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}; use the folder of a finished adapter or merged model")
    for known in FORMATS:
        if known.recognises(folder):
            return known
    names = ", ".join(known.name for known in FORMATS)
    raise ModelError(f"{folder} is not a model in a known format ({names}); use a finished adapter or merged model")
