"""kernels.c in each way that it can multiply tiles of bfloat16."""

from __future__ import annotations

import ctypes
import functools
import shutil
import tempfile
from pathlib import Path

import pytest

from byeori.kernels import native

# The flags that leave each way, and what tiles() then is at most.
WAYS = {"matrix units": ([], 2), "vectors": (["-mno-amx-bf16"], 1), "plain": (["-mno-amx-bf16", "-mno-avx512bf16"], 0)}


@functools.cache
def library(way: str) -> ctypes.CDLL:
    """The kernels, compiled for a way; on a processor without its units, for the next one."""
    flags, most = WAYS[way]
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: PyTorch's own operations are used")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(native, "_FLAGS", [*native._FLAGS, *flags])
        native._compile(compiler, Path(folder) / "kernels.so")
        found = ctypes.CDLL(str(Path(folder) / "kernels.so"))
    assert found.tiles() <= most
    return found
