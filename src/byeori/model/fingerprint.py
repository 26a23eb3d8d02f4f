"""The tensors in a model's safetensors files, without loading them, and a fingerprint of a base model.

Tensors are read by plain file reads, a block of rows at a time: the pages of a memory-mapped file count as the
process's memory, so a merge of a large model would look, and on a small machine be, as large as the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from byeori.errors import ModelError
from byeori.support import atomic_files
from byeori.support.cache_folder import cache_folder
from byeori.support.console import progress
from byeori.support.foreign_files import json_file, json_record
from byeori.support.pickles import missing_weights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SAMPLE_BYTES = 4096
_BLOCK, _READERS, _LONG = 1 << 22, 4, 8e9  # bytes at once, threads, bytes that take long enough for a progress bar
_ABOUT_THE_FILE = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


class _Index(TypedDict):
    weight_map: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor in a safetensors file.

    dtype: safetensors' name (F32, BF16, I64, ...). start, size: its bytes in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def count(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors of one safetensors file.

    Raises:
        ModelError: if the file is missing, not safetensors, or cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np"):  # the library checks offsets, sizes and types
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, ValueError, struct.error, RecursionError) as error:
        raise ModelError(f"{path} is damaged or cut short ({error}); copy or download it again") from None
    except OSError as error:
        raise ModelError(f"cannot read {path} ({error.strerror or error}); copy or download it again") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path} is damaged; copy or download it again")
    header.pop("__metadata__", None)
    return {
        name: Stored(
            path=path,
            dtype=item["dtype"],
            shape=tuple(item["shape"]),
            start=8 + length + item["data_offsets"][0],
            size=item["data_offsets"][1] - item["data_offsets"][0],
        )
        for name, item in header.items()
    }


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model's folder.

    Raises:
        ModelError: if there are none, the index is damaged, or a file that it names is missing.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json_record(index, _Index)["weight_map"].values()))
        except ModelError:
            raise ModelError(f"{index} is damaged; copy or download it again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder} lacks {', '.join(missing)}, which {INDEX} lists; copy or download it again")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / "config.json").is_file():
        hint = "an adapter; give its base model" if (folder / "adapter_config.json").is_file() else "no config.json"
        raise ModelError(f"{folder} is not a model: it has {hint}")
    raise ModelError(f"{missing_weights(folder, 'safetensors weights')}; give a model that has them")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a model's folder by its name in the files.

    Raises:
        ModelError: if there are no safetensors weights, or they are damaged.
    """
    tensors: dict[str, Stored] = {}
    for path in weight_files(folder):
        tensors.update(read_header(path))
    return tensors


def base_fingerprint(folder: Path) -> str:
    """Return the SHA-256 of every tensor's name, type, shape and first 4 KiB, which byeori 0.1 recorded with adapters.

    Raises:
        ModelError: if there are no safetensors weights, or they are damaged.
    """
    digest = hashlib.sha256()
    for name, stored in sorted(stored_tensors(folder).items()):
        digest.update(_described(name, stored))
        with stored.path.open("rb") as file:
            file.seek(stored.start)
            digest.update(file.read(min(stored.size, _SAMPLE_BYTES)))
    return digest.hexdigest()


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of every tensor's name, type, shape and content.

    It does not depend on how the tensors are divided into files. Reading a large model takes a while, so the result is
    kept in the cache for as long as the files have the same path, size, inode and time of change.

    Raises:
        ModelError: if there are no safetensors weights, or they are damaged.
    """
    files = [(str(path.resolve()), path.stat()) for path in weight_files(folder)]
    key = json.dumps([(path, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for path, s in files])
    kept = cache_folder() / "fingerprints" / hashlib.sha256(key.encode()).hexdigest()
    with suppress(OSError):
        if re.fullmatch(r"[0-9a-f]{64}", text := kept.read_text(encoding="ascii", errors="replace")):
            return text
    digest = hashlib.sha256()
    tensors = sorted(stored_tensors(folder).items())
    shown = sum(stored.size for _, stored in tensors) > _LONG
    with progress("Hashing the base's weights", shown=shown) as show, ThreadPoolExecutor(_READERS) as pool:
        contents = pool.map(_content, (stored for _, stored in tensors))
        for done, ((name, stored), content) in enumerate(zip(tensors, contents, strict=True), 1):
            digest.update(_described(name, stored) + content)
            show(done, len(tensors))
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_files.new_file(kept) as temporary:
            temporary.write_text(digest.hexdigest(), encoding="ascii")
    return digest.hexdigest()


def config_sha256(folder: Path) -> str:
    """Return the SHA-256 of what config.json says about computing; who saved it, and with what, is left out."""
    config = _computing(json_file(folder / "config.json"))
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _computing(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _computing(item) for name, item in value.items() if name not in _ABOUT_THE_FILE}
    return value


def _described(name: str, stored: Stored) -> bytes:
    return json.dumps([name, stored.dtype, stored.shape]).encode()


def _content(stored: Stored) -> bytes:
    digest, left = hashlib.sha256(), stored.size
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        while left and (block := file.read(min(left, _BLOCK))):
            digest.update(block)
            left -= len(block)
    return digest.digest()
