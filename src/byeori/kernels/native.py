"""kernels.c, compiled once for this machine and kept in the cache folder.

Without a C compiler, on another device or for another type the callers use PyTorch's own operations instead.
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
from pathlib import Path
from typing import Any

import torch

from byeori.kernels import device_kind as target
from byeori.support.cache_folder import cache_folder

_SOURCE = Path(__file__).with_name("csrc") / "kernels.c"
_INCLUDED = [_SOURCE.with_name(name) for name in ("attention.c", "linear.c", "strips.c", "tiles.c")]
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
_WIDE = "-mprefer-vector-width=512"  # gcc and clang halve the vectors of processors that have the widest
_STORED = {torch.bfloat16: "bf16", torch.float32: "f32"}
_MAY_FAIL = ("attend", "attend_back", "linear", "outer")  # kernels that return whether they did; others return nothing


_on = True


def switch(on: bool) -> None:
    """Let the kernels be used, or never."""
    global _on
    _on = on


def on() -> bool:
    """Whether kernels may be used."""
    return _on


def alike(*tensors: torch.Tensor) -> bool:
    """Whether tensors are plain ones, contiguous and of one type."""
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.is_contiguous() for t in tensors)
    return plain and all(t.dtype == tensors[0].dtype for t in tensors)


def runs(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take these tensors: plain ones on the CPU, of one type that they know."""
    first = tensors[0]
    return _on and target.kind(first) == "cpu" and first.dtype in _STORED and alike(*tensors) and _library() is not None


def call(name: str, *arguments: torch.Tensor | float | None) -> None:
    """Run a kernel; the first tensor's type chooses which. Integers are C's long, other numbers its float.

    Raises:
        MemoryError: a kernel found no memory for what it keeps meanwhile.
    """
    passed: list[int | float | None] = []
    stored = ""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            if argument.is_meta:
                return  # a rehearsal: there are no numbers
            stored = stored or _STORED[argument.dtype]
            passed.append(argument.data_ptr())
        else:
            passed.append(argument)
    kernel = getattr(_library(), f"{name}_{stored}")
    if kernel.argtypes is None:
        kernel.argtypes = [*map(_type, arguments), ctypes.c_int]
    if kernel(*passed, torch.get_num_threads()) and name in _MAY_FAIL:
        raise MemoryError(f"{name}: no memory for what it keeps meanwhile")


def _type(argument: torch.Tensor | float | None) -> Any:
    if argument is None or isinstance(argument, torch.Tensor):
        return ctypes.c_void_p
    return ctypes.c_long if isinstance(argument, int) else ctypes.c_float


@functools.cache
def sources() -> str:
    """A hash of the kernels' code."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in (_SOURCE, *_INCLUDED))).hexdigest()


def tiles() -> int:
    """How the kernels multiply tiles of bfloat16: 2 in matrix units (AMX), 1 in vectors, 0 without units for it."""
    return _tiles() if _on else 0


@functools.cache
def _tiles() -> int:
    library = _library()
    return 0 if library is None else int(library.tiles())


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be made."""
    found = (os.environ.get("CC"), "gcc", "cc", "clang")
    compiler = next((path for path in map(shutil.which, filter(None, found)) if path), None)
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    key = hashlib.sha256((sources() + _processor() + " ".join([compiler, *_FLAGS])).encode())
    target = cache_folder() / f"kernels-{key.hexdigest()[:16]}.so"
    try:
        if not target.exists():
            _compile(compiler, target)
        return ctypes.CDLL(str(target))  # OpenMP: the one that torch has loaded, by its name
    except (OSError, subprocess.SubprocessError):
        return None


def _compile(compiler: str, target: Path) -> None:
    """Into a file of this process, then renamed: processes may start at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    wide = [_WIDE] if platform.machine() == "x86_64" else []
    command = [compiler, *_FLAGS, *wide, "-o", str(temporary), str(_SOURCE), "-lm"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)


def _processor() -> str:
    """What `-march=native` depends on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.startswith(("model", "cpu family", "flags", "Features", "CPU part"))]
    return "\n".join(dict.fromkeys(kept))
