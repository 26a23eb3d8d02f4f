"""One local file -> rows: its reader's batches, written once as an Arrow file in datasets' cache and memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from byeori.data.readers import READERS, ending, workbook
from byeori.data.readers.text import COMPRESSED, DAMAGED, FileRows, check_unique, open_bytes
from byeori.errors import DataError
from byeori.support.atomic_files import is_as_noted, new_file, note_hash
from byeori.support.text_files import hollow, not_utf8, one_line

if TYPE_CHECKING:  # importing it takes half a second, which `byeori --help` must not
    from datasets import Dataset

KNOWN_ENDINGS = (
    f"{', '.join(name for name in READERS if not name.endswith(COMPRESSED))} (text also as {', '.join(COMPRESSED)})"
)
_CACHE_VERSION = b"3"  # increase it when the same file is read into other rows than before
_COMPRESSION = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_FACTS = b"byeori"  # where the Arrow file keeps what is not rows
# What is no table, and how to make one of it.
_DOCUMENTS = {
    (
        ".hwp",
        ".hwpx",
    ): "in Hancom Office, copy its table into Hancell or Excel and save that as .xlsx, or "
    "save its text with File > Save As > Text Document and make rows of it",
    (".doc", ".docx", ".pdf", ".pptx"): "copy its table into a spreadsheet and save that as .xlsx or .csv",
    (".numbers",): "export it as .xlsx or .csv",
    (".zip", ".tar", ".7z", ".rar"): "unpack it and give the folder",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows of one file.

    name: for messages. left_out: columns that cannot be read, and why. notes: sentences about how it was read.
    """

    name: str
    rows: Dataset
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def check_file(path: Path) -> None:
    """Raise DataError if a file has an unknown ending or is empty; what is in it is not read."""
    if ending(path) not in READERS:
        for endings, advice in _DOCUMENTS.items():
            if path.suffix.lower() in endings:
                raise DataError(f"{path} is no table of rows: {advice}.")
        raise DataError(f"{path} has an unknown ending; known endings are {KNOWN_ENDINGS}.")
    if (status := path.stat()).st_size == 0:
        raise DataError(f"{path} is empty; give a file with at least one row.")
    if hollow(status):
        raise DataError(f"{path} has {status.st_size:,} bytes, nearly all of which were never written; copy it again.")


def load_file(path: Path, *, name: str | None = None, sheet: str | None = None) -> Part:
    """Return the rows of a file, from the cache if a file with the same content was read before.

    name: what messages call the file; its path by default. sheet: of a workbook.

    Raises:
        DataError: if the file cannot be read or is damaged.
    """
    import datasets
    import pyarrow as pa

    import byeori.data.json_values  # noqa: F401  its type has to be known when the cache is opened

    check_file(path)
    sheet = sheet if ending(path) in workbook.ENDINGS else None
    with reading(path):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        digest.update(ending(path).encode() + (sheet or "").encode() + _CACHE_VERSION)
        cached = Path(datasets.config.HF_DATASETS_CACHE) / "byeori" / f"{digest.hexdigest()}.arrow"
        if not is_as_noted(cached):  # not made yet, or damaged since
            _write(path, sheet, cached)
            note_hash(cached)
        with pa.memory_map(str(cached)) as stream:
            facts = json.loads(pa.ipc.open_stream(stream).schema.metadata[_FACTS])
        return Part(
            name=name or str(path),
            rows=datasets.Dataset.from_file(str(cached)),
            left_out=facts["left_out"],
            notes=tuple(note.replace("{path}", name or str(path)) for note in facts["notes"]),
        )


def _write(path: Path, sheet: str | None, cached: Path) -> None:
    """Write the rows of `path` as an Arrow stream, which appears whole."""
    import pyarrow as pa

    read: FileRows = workbook.read(path, sheet) if sheet else READERS[ending(path)](path)
    check_unique(path, list(read.features))
    schema = read.features.arrow_schema
    facts = json.dumps({"left_out": read.left_out, "notes": read.notes}).encode()
    cached.parent.mkdir(parents=True, exist_ok=True)
    with (
        new_file(cached) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, schema.with_metadata((schema.metadata or {}) | {_FACTS: facts})) as writer,
    ):
        for batch in read.batches:
            writer.write_batch(batch)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any error while a file is read into one sentence.

    Raises:
        DataError: if something is wrong with the file, or with the disk that the cache is on.
    """
    import pyarrow as pa

    try:
        yield
    except RecursionError:
        raise DataError(f"{path} has values that are nested hundreds of times; remove them.") from None
    except (ValueError, OverflowError, pa.ArrowException) as error:
        if isinstance(error, UnicodeDecodeError) and path.is_file():
            with open_bytes(path) as lines:
                raise DataError(not_utf8(path, lines)) from None
        kind = path.suffix.lower().removeprefix(".") or "datasets folder"
        raise DataError(f"{path} is damaged or not {kind} ({one_line(error)}); write it again.") from None
    except (OSError, *DAMAGED) as error:
        if path.suffix.lower() in COMPRESSED and getattr(error, "errno", None) is None:  # not the disk
            kind = _COMPRESSION[path.suffix.lower()]
            raise DataError(f"{path} is not a complete {kind} file; copy or compress it again.") from None
        reason = getattr(error, "strerror", None) or one_line(error).removesuffix(".")
        raise DataError(f"{path} cannot be read or copied to datasets' cache: {reason}; check both.") from None
