"""What is known about each machine: machines.yaml in this folder or the user's own copy, and prices.py."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from byeori.errors import ConfigError
from byeori.kernels import bf16_matmul
from byeori.plan import prices as price_list
from byeori.plan.prices import Price
from byeori.support.suggestions import nearest
from byeori.support.yaml_files import yaml_mapping
from byeori.train import memory

_HERE = Path(__file__).parent
_SIZE = re.compile(r"[\s_-]+(\d+)\s*g(?:i?b)?$", re.IGNORECASE)  # of a memory, at the end of a name
_VENDOR = re.compile(r"\b(?:NVIDIA|GeForce|Tesla|AMD|Instinct|Radeon)\b", re.IGNORECASE)
_ADVICE = "start from a copy of the shipped one"
MIB, GIB = 2**20, 2**30
OLD_CUDA = "cuda without flash attention"
OLDEST = 7.5  # the compute capability that PyTorch's wheels have code for, since 2.11

Range = tuple[float, float]  # the lowest and the highest


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One GPU, or this machine's CPU.

    memory: bytes. bandwidth: bytes a second, None if unknown. flops: matrix peak, operations a second.
    link, gather: how several are connected, and bytes a second at which sharded weights arrive. workspace: bytes of the
    matrix library; on a CPU also those of this process before there is a model.
    share: fraction of the peak that a step reaches, with its source. capability: of CUDA; flash attention needs 8.
    skypilot, runpod: its names there, None if they do not rent it. most: how many there are, 0 if that is not known.
    """

    name: str
    device: str
    memory: int
    workspace: int
    flops: float = 0.0
    share: Range = (1.0, 1.0)
    share_source: str = ""
    bandwidth: float | None = None
    link: str = ""
    gather: Range | None = None
    capability: float = 8.0
    skypilot: str | None = None
    runpod: str | None = None
    most: int = 0

    @property
    def kind(self) -> str:
        """What is rehearsed for it: cpu, cuda, or OLD_CUDA for a GPU without flash attention."""
        return OLD_CUDA if self.device == "cuda" and self.capability < 8 else self.device


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """GPUs that are free for a time. session, weekly: hours; weekly is None if there is no such limit."""

    name: str
    gpu: str
    count: int
    session: float
    weekly: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """machines: the GPUs. context: bytes outside the allocator. fragmentation, cpu_holes: fractions of all memory but
    the weights that is lost in a GPU's allocator and in a CPU process's heap. default_fragmentation: in an allocator
    without expandable segments, which runs turn on. headroom: fraction that is left free.

    layer_seconds: of a layer's forward and backward pass, however small. opening: times that opening 4-bit weights
    takes what the bandwidth allows. scaling: fraction of the time lost for every doubling of the processes, at most.
    host: bytes a second between a GPU and the CPU's memory.
    start: hours that a rented machine is paid for before it trains. cpu_share: as of a Machine, with its source.
    prices: of prices.py. source, date: the file's.
    """

    machines: tuple[Machine, ...]
    services: tuple[Service, ...]
    prices: tuple[Price, ...]
    context: int
    fragmentation: float
    default_fragmentation: float
    cpu_holes: float
    headroom: float
    layer_seconds: Range
    opening: Range
    scaling: float
    host: Range
    start: Range
    cpu_share: tuple[Range, str]
    source: str
    date: str


def read(machines: str | None = None, prices: str | None = None, provider: str | None = None) -> Table:
    """Return the table; from the user's files if given. provider: the only one whose prices count.

    Raises:
        ConfigError: if a file cannot be read or an entry lacks a number; the sentence names it.
    """
    known = yaml_mapping(machines or _HERE / "machines.yaml", what="machines", advice=_ADVICE)
    try:
        names = list(known["machines"])
        assumed = {name: item["value"] for name, item in known["assumptions"].items()}
        low, high = _range(assumed["layer_ms"])
        return Table(
            machines=tuple(_machine(name, known["machines"][name]) for name in names),
            services=tuple(_service(name, row) for name, row in known.get("services", {}).items()),
            prices=price_list.read(prices, names, provider),
            context=int(float(assumed["context_mib"]) * MIB),
            fragmentation=float(assumed["fragmentation"]),
            default_fragmentation=float(assumed["default_fragmentation"]),
            cpu_holes=float(assumed["cpu_holes"]),
            headroom=float(assumed["headroom"]),
            layer_seconds=(low / 1000, high / 1000),
            opening=_range(assumed["opening"]),
            scaling=float(assumed["scaling"]),
            host=(1e9 * _range(assumed["host_gbs"])[0], 1e9 * _range(assumed["host_gbs"])[1]),
            start=_range(assumed["start_hours"]),
            cpu_share=(_range(assumed["cpu_share"]), str(known["assumptions"]["cpu_share"]["source"])),
            source=str(known.get("source", "")),
            date=str(known.get("date", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{machines or 'machines.yaml'} is not a table of machines ({error}); {_ADVICE}") from None


def _machine(name: str, row: dict[str, Any]) -> Machine:
    slow, fast = _range(row["gather_gbs"])
    return Machine(
        name=name,
        device="cuda",
        memory=int(row["memory_mib"]) * MIB,
        bandwidth=float(row["bandwidth_gbs"]) * 1e9,
        flops=float(row["tflops"]) * 1e12,
        link=str(row["link"]),
        gather=(slow * 1e9, fast * 1e9),
        workspace=2 * int(row["workspace_mib"]) * MIB,
        share=_range(row["share"]),
        share_source=str(row["share_source"]),
        capability=float(row["capability"]),
        skypilot=row.get("skypilot"),
        runpod=row.get("runpod"),
    )


def _service(name: str, row: dict[str, Any]) -> Service:
    weekly = row.get("weekly_hours")
    return Service(
        name=name,
        gpu=str(row["gpu"]),
        count=int(row["count"]),
        session=float(row["session_hours"]),
        weekly=None if weekly is None else float(weekly),
    )


def _range(values: Any) -> Range:
    low, high = map(float, values)
    return low, high


def select(table: Table, wanted: Sequence[str]) -> list[Machine]:
    """Return the GPUs with these names, or with names that begin with these words; if none is named, all that PyTorch's
    current wheels have code for.

    Spaces, dashes, RTX and GB may be left out, and the size of the memory added. Part of a word is not enough: an A10
    is no A100. A service (Colab, Kaggle) stands for the GPUs that it lends. CPU is left to the caller.

    Raises:
        ConfigError: if there is no such machine; the sentence has the nearest name.
    """
    check_names(table, wanted)
    selected = [machine for name in wanted for machine in _named(table, name)]
    current = [machine for machine in table.machines if machine.capability >= OLDEST]
    return list(dict.fromkeys(selected)) if wanted else current


def check_names(table: Table, wanted: Sequence[str]) -> None:
    """Raise unless all these names are of machines, of services, or CPU.

    Raises:
        ConfigError: if one is not.
    """
    names = [*(machine.name for machine in table.machines), *(service.name for service in table.services), "CPU"]
    for name in wanted:
        if _plain(name) != "cpu" and not _named(table, name):
            near = nearest(_SIZE.sub("", name).upper(), names)
            raise ConfigError(f"there is no GPU {name!r}{near}; the known ones are {', '.join(names)}")


def _named(table: Table, name: str) -> list[Machine]:
    machines = table.machines
    for service in table.services:
        if service.name.lower() == name.lower():
            return [replace(machine, most=service.count) for machine in machines if machine.name == service.gpu]
    exact = [machine for machine in machines if _plain(name) == _plain(machine.name)]
    if named := exact or [machine for machine in machines if _plain(name) in _beginnings(machine.name)]:
        return named
    if not (size := _SIZE.search(name)):
        return []
    least, most = (part * float(size[1]) for part in (0.9, 1.1))
    return [machine for machine in _named(table, name[: size.start()]) if least < machine.memory / GIB < most]


def _plain(name: str) -> str:
    return re.sub(r"^rtx(?=.)|gb$", "", re.sub(r"[^a-z0-9]", "", name.lower()))


def _beginnings(name: str) -> list[str]:
    words = name.split()
    return [_plain("".join(words[:count])) for count in range(1, len(words) + 1)]


def this_cpu(table: Table, dtype: torch.dtype) -> Machine:
    """Return this machine's processor, with the peak measured now in a matrix product of this type."""
    return Machine(
        name="CPU",
        device="cpu",
        memory=memory.total_bytes(),
        flops=measured_peak(dtype),
        workspace=memory.resident_bytes() + cpu_products(dtype),
        share=table.cpu_share[0],
        share_source=table.cpu_share[1],
        most=1,
    )


def cpu_products(dtype: torch.dtype) -> int:
    """Return the bytes that matrix products of a type come to take on this processor besides their results."""
    return bf16_matmul.workspace_bytes(dtype, torch.device("cpu")) + bf16_matmul.code_bytes(dtype)


def this_gpu(table: Table) -> Machine | None:
    """Return this machine's GPU with its real memory, and how many there are of it; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    known = of_device(table.machines, properties.name, properties.total_memory / GIB)
    own: dict[str, Any] = {
        "memory": properties.total_memory,
        "capability": float(f"{properties.major}.{properties.minor}"),
        "most": torch.cuda.device_count(),
    }
    if known is not None:
        return replace(known, **own)
    return Machine(name=properties.name, device="cuda", workspace=4 * 16 * MIB, **own)


def of_device(machines: Sequence[Machine], name: str, gigabytes: float) -> Machine | None:
    """Return the machine that a driver calls `NVIDIA A100-SXM4-80GB` or a catalogue `RTX4070TiSUPER`, if it is known.

    gigabytes: of its memory; GiB do as well.
    """
    plain = _plain(_VENDOR.sub("", name))
    exact = [machine for machine in machines if _plain(machine.name) == plain]
    beginning = [m for m in machines if plain.startswith(_base(m)) and abs(m.memory / GIB / gigabytes - 1) < 0.1]
    return max(exact or beginning, key=lambda machine: len(_base(machine)), default=None)


def _base(machine: Machine) -> str:
    return _plain(_SIZE.sub("", machine.name))


def measured_peak(dtype: torch.dtype, size: int = 1024) -> float:
    """Return operations a second of a matrix product, the best of four."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best = math.inf
    with bf16_matmul.prepared(dtype, torch.device("cpu")):
        for _ in range(4):
            began = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
