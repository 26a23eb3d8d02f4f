"""What control groups (containers, systemd's slices, batch systems) grant to this process: cores and memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_threads_given = "OMP_NUM_THREADS" in os.environ  # by the user, before this module sets them
_SPINS = (
    "1000"  # a few microseconds; libgomp's own choice where it knows of more threads than cores, else it is 300,000
)


def cores() -> int:
    """Return how many threads this process can have running: its cores, or the quota of its group, rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    granted = quota()
    return allowed if granted is None else max(1, min(allowed, math.ceil(granted)))


def cores_to_divide() -> int | None:
    """Return the cores that several processes share; None if the user has said how many threads each has."""
    return None if _threads_given else cores()


def quota() -> float | None:
    """Return the processor time that the groups of this process grant, in cores; None without a limit."""
    found = []
    for folder in _folders("cpu"):
        with suppress(OSError, ValueError):
            if (both := folder / "cpu.max").exists():
                most, period = both.read_text(encoding="ascii").split()
            else:
                most, period = (
                    (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
                )
            if most.strip() not in ("max", "-1"):
                found.append(int(most) / int(period))
    return min(found, default=None)


def memory() -> tuple[int, int] | None:
    """Return the memory that the groups of this process grant and what is left of it, in bytes; None without a limit.

    Pages of files that were not used lately count as left: the kernel gives them up before it ends a process.
    """
    found = []
    for folder in _folders("memory"):
        most = _number(folder, "memory.max", "memory.limit_in_bytes")
        used = _number(folder, "memory.current", "memory.usage_in_bytes")
        if (
            most is not None and used is not None and most < 1 << 60
        ):  # the first version's "no limit" is 2**63 less a page
            found.append((most, max(0, most - used + _inactive(folder))))
    return (min(most for most, _ in found), min(left for _, left in found)) if found else None


def make_threads_polite() -> None:
    """Have OpenMP start as many threads as cores are granted, which sleep while they wait; the user's own values stay.

    To be called before torch is imported, which reads them. Threads that wait by spinning, as they do unasked, keep
    a core from the work that they wait for whenever other processes want it as well.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
    if quota() is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))


def _folders(controller: str) -> Iterator[Path]:
    """Yield the folders of the group of this process and of those around it, as far as they can be seen."""
    try:
        lines = _OWN.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            root = _ROOT / controllers if controllers else _ROOT
            inner = root / group.lstrip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root))


def _number(folder: Path, *names: str) -> int | None:
    for name in names:
        with suppress(OSError, ValueError):
            return int((folder / name).read_text(encoding="ascii"))
    return None


def _inactive(folder: Path) -> int:
    with suppress(OSError, ValueError):
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        stat = dict(line.split(maxsplit=1) for line in lines)
        return int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
    return 0
