"""What is known about each machine: machines.yaml and prices.yaml in this folder, or the user's own copies."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from byeori.errors import ConfigError
from byeori.kernels import bf16_matmul
from byeori.support.suggestions import nearest
from byeori.support.yaml_files import yaml_mapping
from byeori.train import memory

_HERE = Path(__file__).parent
_SIZE = re.compile(r"[\s_-]+(\d+)\s*g(?:i?b)?$", re.IGNORECASE)  # of a memory, at the end of a name
_ADVICE = "start from a copy of the shipped one"
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One GPU, or this machine's CPU.

    memory: bytes. bandwidth: bytes a second, None if unknown. flops: matrix peak, operations a second.
    link, link_speed: how several are connected, bytes a second in one direction. workspace: bytes of the matrix
    library; on a CPU also those of this process before there is a model.
    utilisation: fraction of the peak that a step is assumed to reach, with its source. price: US dollars an hour, None
    if none was given.
    """

    name: str
    device: str
    memory: int
    workspace: int
    flops: float = 1.0
    utilisation: float = 1.0
    utilisation_source: str = ""
    bandwidth: float | None = None
    link: str = ""
    link_speed: float | None = None
    skypilot: str | None = None
    price: float | None = None
    price_source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """machines: the GPUs. context: bytes outside the allocator. fragmentation, cpu_holes: fractions of all memory but
    the weights that is lost in a GPU's allocator and in a CPU process's heap. headroom: fraction that is left free.

    cpu_utilisation: as of a Machine, with its source. cpu_price: dollars an hour, or None. source, date: the file's.
    """

    machines: tuple[Machine, ...]
    context: int
    fragmentation: float
    cpu_holes: float
    headroom: float
    cpu_utilisation: tuple[float, str]
    cpu_price: float | None
    source: str
    date: str


def read(machines: str | None = None, prices: str | None = None) -> Table:
    """Return the table; from the user's files if given.

    Raises:
        ConfigError: if a file cannot be read or an entry lacks a number; the sentence names it.
    """
    known = yaml_mapping(machines or _HERE / "machines.yaml", what="machines", advice=_ADVICE)
    own = yaml_mapping(prices, what="prices", advice=_ADVICE) if prices else {}
    priced = yaml_mapping(_HERE / "prices.yaml", what="prices", advice=_ADVICE) | own
    try:
        names = list(known["machines"])
        assumed = {name: (float(item["value"]), str(item["source"])) for name, item in known["assumptions"].items()}
        rows = tuple(_machine(name, known["machines"][name], _price(priced, name, prices)) for name in names)
        table = Table(
            machines=rows,
            context=int(assumed["context_mib"][0] * MIB),
            fragmentation=assumed["fragmentation"][0],
            cpu_holes=assumed["cpu_holes"][0],
            headroom=assumed["headroom"][0],
            cpu_utilisation=assumed["cpu_share"],
            cpu_price=_price(priced, "CPU", prices)[0],
            source=str(known.get("source", "")),
            date=str(known.get("date", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{machines or 'machines.yaml'} is not a table of machines ({error}); {_ADVICE}") from None
    for name in priced:
        if name not in [*names, "CPU"]:
            raise ConfigError(f"{prices} names an unknown GPU {name!r}{nearest(name, names)}")
    return table


def _machine(name: str, row: dict[str, Any], price: tuple[float | None, str]) -> Machine:
    return Machine(
        name=name,
        device="cuda",
        memory=int(row["memory_mib"]) * MIB,
        bandwidth=float(row["bandwidth_gbs"]) * 1e9,
        flops=float(row["tflops"]) * 1e12,
        link=str(row["link"]),
        link_speed=float(row["link_gbs"]) * 1e9,
        workspace=2 * int(row["workspace_mib"]) * MIB,
        utilisation=float(row["share"]),
        utilisation_source=str(row["share_source"]),
        skypilot=row.get("skypilot"),
        price=price[0],
        price_source=price[1],
    )


def _price(priced: dict[str, Any], name: str, file: str | None) -> tuple[float | None, str]:
    entry = priced.get(name)
    entry = entry if isinstance(entry, dict) else {"usd_per_hour": entry}
    price = entry.get("usd_per_hour")
    if price is None:
        return None, ""
    try:
        value = -1.0 if isinstance(price, bool) else float(price)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value < 1e6:
        raise ConfigError(f"{file}: the price of {name} is {price!r}; give dollars an hour for one GPU")
    return value, ", ".join(str(entry[key]) for key in ("source", "date") if entry.get(key)) or (file or "")


def select(machines: Sequence[Machine], wanted: Sequence[str]) -> list[Machine]:
    """Return the machines with these names, or with names that begin with these words; all if none is named.

    Spaces, dashes, RTX and GB may be left out, and the size of the memory added. Part of a word is not enough: an A10
    is neither an A10G nor an A100.

    Raises:
        ConfigError: if there is no such machine; the sentence has the nearest name.
    """
    check_names(machines, wanted)
    selected = [machine for name in wanted for machine in _named(machines, name)]
    return list(dict.fromkeys(selected)) if wanted else list(machines)


def check_names(machines: Sequence[Machine], wanted: Sequence[str]) -> None:
    """Raise unless all these names are of machines, or CPU.

    Raises:
        ConfigError: if one is not.
    """
    names = list(dict.fromkeys([*(machine.name for machine in machines), "CPU"]))
    for name in wanted:
        if _plain(name) != "cpu" and not _named(machines, name):
            near = nearest(_SIZE.sub("", name).upper(), names)
            raise ConfigError(f"there is no GPU {name!r}{near}; the known ones are {', '.join(names)}")


def _named(machines: Sequence[Machine], name: str) -> list[Machine]:
    exact = [machine for machine in machines if _plain(name) == _plain(machine.name)]
    if named := exact or [machine for machine in machines if _plain(name) in _beginnings(machine.name)]:
        return named
    if not (size := _SIZE.search(name)):
        return []
    least, most = (part * float(size[1]) for part in (0.9, 1.1))
    return [machine for machine in _named(machines, name[: size.start()]) if least < machine.memory / GIB < most]


def _plain(name: str) -> str:
    return re.sub(r"^rtx(?=.)|gb$", "", re.sub(r"[^a-z0-9]", "", name.lower()))


def _beginnings(name: str) -> list[str]:
    words = name.split()
    return [_plain("".join(words[:count])) for count in range(1, len(words) + 1)]


def this_cpu(table: Table, dtype: torch.dtype) -> Machine:
    """Return this machine's processor, with the peak measured now in a matrix product of this type."""
    extra = bf16_matmul.workspace_bytes(dtype, torch.device("cpu")) + bf16_matmul.code_bytes(dtype)
    return Machine(
        name="CPU",
        device="cpu",
        memory=memory.total_bytes(),
        flops=measured_peak(dtype),
        workspace=memory.resident_bytes() + extra,
        utilisation=table.cpu_utilisation[0],
        utilisation_source=table.cpu_utilisation[1],
        price=table.cpu_price,
    )


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
