"""How long a micro-batch takes, as a range: from public runs, or from runs on this machine where there are some.

    fastest = max(layers, operations / (peak highest share), weights read / bandwidth, gathered / fastest link)
    slowest = max(layers, operations / (peak lowest share)) + 4-bit weights opened + gathered / slowest link

What is kept in the CPU's memory is copied over its link: the fastest hides that, the slowest does not.

`layers`: what a layer costs the host forward and backward, however few tokens there are. Between them lies whether
copies overlap with the computation. Constants: machines.yaml; how far off that is: benchmarks/public_runs.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from byeori.errors import ByeoriError
from byeori.plan.machines import Machine, Range, Table
from byeori.plan.rehearsal import Rehearsal
from byeori.support import atomic_files, cache_folder
from byeori.support.foreign_files import json_record

# Tokens of a micro-batch from which on its time says something about the share of a GPU's peak.
LEAST_TOKENS = 2048
_KEPT = 20  # runs of a device and kind of weights
_SPREAD = 0.1  # a share that was measured here may be off by this much


class Cost(NamedTuple):
    """A typical micro-batch without recomputation: operations, those of its forward pass, unique tokens."""

    flops: float
    forward_flops: float
    tokens: float


def seconds(
    table: Table,
    machine: Machine,
    rehearsal: Rehearsal,
    cost: Cost,
    *,
    again: float,
    processes: int,
    sharded: bool,
    cpu_offload: bool = False,
) -> Range | None:
    """Return the fastest and the slowest time of a micro-batch, None if nothing is known about the machine's speed.

    rehearsal: with the weights as they are stored. cost: of the micro-batch. again: the fraction of the layers that is
    computed twice. processes: over how many weights are sharded, and rows divided. cpu_offload: sharded weights are in
    the CPU's memory.
    """
    if not machine.flops:
        return None
    flops, passes = cost.flops + again * cost.forward_flops, 2 + again  # forward, backward, and forward again
    low_share, high_share = machine.share
    layers = [0.0, 0.0]
    if machine.device == "cuda":
        layers = [rehearsal.layers * (1 + again / 2) * each for each in table.layer_seconds]
    fastest, slowest = flops / machine.flops / high_share, flops / machine.flops / low_share
    reads = passes * rehearsal.resident["weights"]
    opened = passes * rehearsal.quantized * 4.5  # a byte of each pair is read, four are written and read again
    read = opening = 0.0
    if machine.bandwidth:
        read, opening = (reads + opened) / machine.bandwidth, table.opening[1] * opened / machine.bandwidth
    gathers = [0.0, 0.0]
    if sharded and machine.gather:
        gathers = [reads * (processes - 1) / processes / each for each in machine.gather]
    copied = 2 * rehearsal.offloaded * cost.tokens / rehearsal.tokens  # there and back
    copied += reads / processes if sharded and cpu_offload else 0
    waiting = 1 + table.scaling * math.log2(processes)
    slow = max(layers[1], slowest, read) + opening + gathers[0] + copied / table.host[0]
    return max(layers[0], fastest, read, gathers[1], copied / table.host[1]), slow * waiting


# ---- what runs on this machine have measured ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A step, or all steps of a run. device: its name, CPU for a processor. four_bit: of the frozen weights."""

    device: str
    four_bit: bool
    flops: float
    seconds: float
    peak: float

    @property
    def share(self) -> float:
        """Fraction of the device's peak that was reached."""
        return self.flops / self.seconds / self.peak


def _file() -> Path:
    return cache_folder.cache_folder() / "measured_speed.json"


def recorded() -> dict[str, list[float]]:
    """Return the shares of the peak that runs here reached, the last ones of every device and kind of weights."""
    try:
        return json_record(_file(), dict[str, list[float]])
    except ByeoriError:  # none yet, or not ours
        return {}


def record(measured: Measured) -> None:
    """Add a share to the file in the cache that later plans read; a plan is worth no error, so none is raised."""
    known, key = recorded(), _key(measured.device, measured.four_bit)
    known[key] = [*known.get(key, []), round(measured.share, 4)][-_KEPT:]
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write(_file(), json.dumps(known, indent=1))
    except OSError:
        return


def with_measured(machine: Machine, four_bit: bool, known: dict[str, list[float]]) -> Machine:
    """Return the machine with the shares of its peak that runs here have reached; known: of `recorded`."""
    shares = known.get(_key(machine.name, four_bit), [])
    shares = [share for share in shares if isinstance(share, float) and share > 0]
    if not shares:
        return machine
    runs = f"measured here on {len(shares)} run{'' if len(shares) == 1 else 's'}"
    share = min(shares) * (1 - _SPREAD), max(shares) * (1 + _SPREAD)
    return replace(machine, share=share, share_source=runs)


def _key(device: str, four_bit: bool) -> str:
    return device + ", 4-bit" * four_bit


def settings_of(machine: Machine) -> dict[str, Any]:
    """Return what a plan assumes about a machine's speed, for JSON."""
    low, high = machine.share
    return {"share_of_peak": [round(low, 4), round(high, 4)], "share_source": machine.share_source}
