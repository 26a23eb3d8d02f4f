"""What is known of each machine: machines.yaml and prices.yaml beside this file, or the user's own copies."""

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

    memory: bytes. bandwidth: bytes a second, None where it is not known. flops: matrix peak, operations a second.
    link, link_speed: how several are joined, bytes a second in one direction. workspace: bytes of the matrix library,
    on a CPU of this process before a model is there.
    share: part of the peak that a step is assumed to reach, and where that number comes from. price: US dollars an
    hour, None where none was given.
    """

    name: str
    device: str
    memory: int
    bandwidth: float | None
    flops: float
    link: str
    link_speed: float | None
    workspace: int
    share: float
    share_source: str
    skypilot: str | None = None
    price: float | None = None
    price_source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """machines: the GPUs. context: bytes outside the allocator. fragmentation: of all but the weights; cpu_holes: the
    same of a CPU's heap.

    headroom: part of the memory that is left free.
    cpu_share: the CPU's assumed share and its source. cpu_price: dollars an hour, or None. source, date: the file's.
    """

    machines: tuple[Machine, ...]
    context: int
    fragmentation: float
    cpu_holes: float
    headroom: float
    cpu_share: tuple[float, str]
    cpu_price: float | None
    source: str
    date: str


def read(machines: str | None = None, prices: str | None = None) -> Table:
    """The table, from the user's files where given.

    Raises:
        ConfigError: a file that cannot be read, or an entry that lacks a number; the sentence names it.
    """
    known = yaml_mapping(machines or _HERE / "machines.yaml", what="machines", advice=_ADVICE)
    own = yaml_mapping(prices, what="prices", advice=_ADVICE) if prices else {}
    priced = yaml_mapping(_HERE / "prices.yaml", what="prices", advice=_ADVICE) | own
    where = machines or "machines.yaml"
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
            cpu_share=assumed["cpu_share"],
            cpu_price=_price(priced, "CPU", prices)[0],
            source=str(known.get("source", "")),
            date=str(known.get("date", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{where} is not a table of machines ({error}); start from a copy of the shipped one"
        ) from None
    for name in priced:
        if name not in [*names, "CPU"]:
            raise ConfigError(f"{prices} names a GPU that is not known, {name!r}{nearest(name, names)}")
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
        share=float(row["share"]),
        share_source=str(row["share_source"]),
        skypilot=row.get("skypilot"),
        price=price[0],
        price_source=price[1],
    )


def _price(priced: dict[str, Any], name: str, file: str | None) -> tuple[float | None, str]:
    found = priced.get(name)
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        found = {"usd_per_hour": found}
    if found is None or not isinstance(found, dict) or found.get("usd_per_hour") is None:
        return None, ""
    try:
        value = float(found["usd_per_hour"])
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value < 1e6:
        raise ConfigError(f"{file}: the price of {name} is {found['usd_per_hour']!r}; give dollars an hour for one GPU")
    said = ", ".join(str(found[key]) for key in ("source", "date") if found.get(key))
    return value, said or (file or "")


def pick(machines: Sequence[Machine], wanted: Sequence[str]) -> list[Machine]:
    """The machines of these names, or of names that begin with these words; all where none is named.

    Spaces, dashes, RTX and GB may be left out, and the size of the memory added. Part of a word is not enough: an A10
    is neither an A10G nor an A100.

    Raises:
        ConfigError: a name that is not there; the sentence has the nearest ones.
    """
    refuse_unknown(machines, wanted)
    found = [machine for name in wanted for machine in _named(machines, name)]
    return list(dict.fromkeys(found)) if wanted else list(machines)


def refuse_unknown(machines: Sequence[Machine], wanted: Sequence[str]) -> None:
    """See whether there are machines of all these names.

    Raises:
        ConfigError: a name that is neither one of theirs nor the CPU's.
    """
    names = list(dict.fromkeys([*(machine.name for machine in machines), "CPU"]))
    for name in wanted:
        if _plain(name) != "cpu" and not _named(machines, name):
            near = nearest(_SIZE.sub("", name).upper(), names)
            raise ConfigError(f"there is no GPU {name!r}{near}; known are {', '.join(names)}")


def _named(machines: Sequence[Machine], name: str) -> list[Machine]:
    exact = [machine for machine in machines if _plain(name) == _plain(machine.name)]
    if exact or (found := [machine for machine in machines if _plain(name) in _beginnings(machine.name)]):
        return exact or found
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
    """This machine's processor, with the peak that it shows now in a matrix product of this type."""
    extra = bf16_matmul.prepare(dtype, torch.device("cpu")) + bf16_matmul.code_bytes(dtype)
    return Machine(
        name="CPU",
        device="cpu",
        memory=memory.total_bytes(),
        bandwidth=None,
        flops=measured_peak(dtype),
        link="",
        link_speed=None,
        workspace=memory.resident_bytes() + extra,
        share=table.cpu_share[0],
        share_source=table.cpu_share[1],
        price=table.cpu_price,
    )


def measured_peak(dtype: torch.dtype, size: int = 1024) -> float:
    """Operations a second of a matrix product, the best of four."""
    bf16_matmul.prepare(dtype, torch.device("cpu"))  # this may be the first one, which reads how many are kept
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
