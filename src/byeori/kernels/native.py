"""csrc/kernels.c, compiled once for this machine and stored in the cache folder.

Without a C compiler, on another device or for another type, callers use PyTorch's own operations instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from byeori.kernels import device_kind, switches
from byeori.support import atomic_files
from byeori.support.cache_folder import cache_folder, is_private, private_folder
from byeori.support.console import say

_SOURCE = Path(__file__).with_name("csrc") / "kernels.c"
_INCLUDED = [_SOURCE.with_name(name) for name in ("attention.c", "linear.c", "strips.c", "tiles.c")]
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
_WIDE = "-mprefer-vector-width=512"  # gcc and clang use half of a 512 bit vector unless told otherwise
_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
_MAY_FAIL = ("attend", "attend_back", "linear", "outer")  # these return 1 if they find no memory


def same_layout(*tensors: torch.Tensor) -> bool:
    """Return whether all are plain contiguous tensors of one type."""
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.is_contiguous() for t in tensors)
    return plain and all(t.dtype == tensors[0].dtype for t in tensors)


def supports(*tensors: torch.Tensor) -> bool:
    """Return whether the kernels accept these tensors: on the CPU, contiguous, all bfloat16 or all float32."""
    first = tensors[0]
    return (
        switches.current().kernels
        and device_kind.kind(first) == "cpu"
        and first.dtype in _SUFFIXES
        and same_layout(*tensors)
        and _library() is not None
    )


def call(name: str, *arguments: torch.Tensor | float | None) -> None:
    """Run a kernel for the first tensor's type. int arguments become C's long, float arguments C's float.

    Raises:
        MemoryError: if the kernel cannot allocate its scratch memory.
    """
    passed: list[int | float | None] = []
    suffix = ""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            if argument.is_meta:
                return  # a rehearsal has no numbers
            suffix = suffix or _SUFFIXES[argument.dtype]
            passed.append(argument.data_ptr())
        else:
            passed.append(argument)
    kernel = getattr(_library(), f"{name}_{suffix}")
    if kernel.argtypes is None:
        kernel.argtypes = [*map(_c_type, arguments), ctypes.c_int]
    if kernel(*passed, torch.get_num_threads()) and name in _MAY_FAIL:
        raise MemoryError(f"the kernel {name} cannot allocate its scratch memory")


def _c_type(argument: torch.Tensor | float | None) -> Any:
    if argument is None or isinstance(argument, torch.Tensor):
        return ctypes.c_void_p
    return ctypes.c_long if isinstance(argument, int) else ctypes.c_float


@functools.cache
def sources() -> str:
    """Return a hash of the kernels' code."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in (_SOURCE, *_INCLUDED))).hexdigest()


def tiles() -> int:
    """Return how the kernels multiply bfloat16 tiles: 2 in AMX units, 1 in AVX-512 vectors, 0 without such units."""
    return _tiles() if switches.current().kernels else 0


@functools.cache
def _tiles() -> int:
    library = _library()
    return 0 if library is None else int(library.tiles())


def problem() -> str | None:
    """Return why there are no kernels on this machine, or None if there are."""
    return _built()[1]


def _library() -> ctypes.CDLL | None:
    return _built()[0]


@functools.cache
def _built() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled kernels, or why there are none."""
    if not sys.platform.startswith("linux"):
        return None, f"they are not built on {sys.platform}"
    names = (os.environ.get("CC"), "gcc", "cc", "clang")
    compiler = next((path for path in map(shutil.which, filter(None, names)) if path), None)
    if compiler is None:
        return None, "there is no C compiler; install gcc"
    key = hashlib.sha256((sources() + processor() + " ".join([compiler, *_FLAGS])).encode())
    try:
        return _load(compiler, f"kernels-{key.hexdigest()[:16]}.so"), None
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{compiler} cannot compile them ({error})"


def _load(compiler: str, name: str) -> ctypes.CDLL:
    """Load the library of this name from the cache, or compile it anew. Its OpenMP is the one that torch has loaded.

    A library is only loaded from a folder and a file that nobody else can write, and with the hash that was noted when
    it was compiled: code left by another user is not run, and half a file does not end the process.
    """
    folder = private_folder("kernels")
    if folder is None:
        say(f"{cache_folder() / 'kernels'} can be written by others: compiling the kernels for this process alone")
        with tempfile.TemporaryDirectory(prefix="byeori-") as temporary:
            _compile(compiler, target := Path(temporary) / name)
            return ctypes.CDLL(str(target))
    target = folder / name
    if atomic_files.is_as_noted(target) and is_private(target):
        return ctypes.CDLL(str(target))
    if target.exists() or target.is_symlink():
        say(f"{target} is damaged or not this user's alone; compiling it anew")
        target.unlink()  # a link would be written through
    _compile(compiler, target)
    atomic_files.note_hash(target)
    return ctypes.CDLL(str(target))


def _compile(compiler: str, target: Path) -> None:
    """Compile into a file that appears whole, since several processes may start at once."""
    wide = [_WIDE] if platform.machine() == "x86_64" else []
    with atomic_files.new_file(target) as temporary:
        command = [compiler, *_FLAGS, *wide, "-o", str(temporary), str(_SOURCE), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        temporary.chmod(0o700)


def processor() -> str:
    """Return what `-march=native` depends on: the processor's model and what it can do."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    described = [line for line in lines if line.startswith(("model", "cpu family", "flags", "Features", "CPU part"))]
    return "\n".join(dict.fromkeys(described))
