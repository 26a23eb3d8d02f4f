"""The plan at work in a run: it chooses what the settings leave open, and is held against the truth at the end."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from byeori.artifacts.starting_model import StartingModel
from byeori.batch.loader import Schedule
from byeori.commands import _model
from byeori.config import TrainSettings
from byeori.data.tokenized import Rows
from byeori.distributed import processes as parallel
from byeori.distributed.processes import Processes
from byeori.errors import ByeoriError, ConfigError
from byeori.model import fingerprint, load
from byeori.plan import candidates, machines, workload
from byeori.plan.candidates import Candidate, PlanInput
from byeori.plan.machines import GIB, MIB, Machine
from byeori.plan.rehearser import Rehearser
from byeori.support import hub
from byeori.train import memory

FILE = "plan.json"
# Bytes of weights under which a model fits everywhere, and a plan would take longer than it is worth.
_SMALL = 64 * MIB
# What cuBLAS takes for its two streams of work (PyTorch: 32 MiB each since Hopper, else 8 MiB).
_WORKSPACE = {True: 2 * 32 * MIB, False: 2 * 8 * MIB}


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a run is expected to take on one device. peak: bytes, by the measure that `measured` has at the end."""

    offer: Candidate
    peak: int

    def as_json(self, measured: int | None = None) -> dict[str, Any]:
        """What plan.json holds; `measured` in bytes, once it is known."""
        assert self.offer.way is not None
        found: dict[str, Any] = {
            "device": self.offer.machine.name,
            "processes": self.offer.count,
            "memory_bytes": self.offer.machine.memory,
            "fits": self.offer.fits,
            "chosen": self.offer.way.settings,
            "predicted": {"need_bytes": self.offer.need, "peak_bytes": self.peak, "parts": self.offer.parts},
        }
        if measured is not None:
            found |= {"measured": {"peak_bytes": measured}, "error": round(self.peak / measured - 1, 4)}
        return found

    def write(self, folder: Path, measured: int | None = None) -> None:
        """Leave plan.json in a folder."""
        (folder / FILE).write_text(json.dumps(self.as_json(measured), indent=1), encoding="utf-8")

    def compared(self, measured: int) -> str:
        """A line for the end of a run."""
        off = self.peak / measured - 1
        return f"Peak memory {measured / GIB:.2f} GiB, {self.peak / GIB:.2f} planned ({off:+.1%})"


def choose(
    settings: TrainSettings,
    start: StartingModel,
    rows: Rows,
    schedule: Schedule,
    processes: Processes,
    tell: Callable[[str], None],
) -> tuple[TrainSettings, Processes, Forecast | None]:
    """Resolve every `auto` that is about memory, and say what was chosen and why.

    Returns the settings without `auto`, the processes with their shards, and what the run is expected to take: None
    for a model too small to ask, and for one that cannot be rehearsed.

    Raises:
        ConfigError: a setting that the model cannot have, found before its weights are read.
    """
    size, chosen = _weights(settings, start, processes), None
    try:
        chosen = _chosen(settings, start, rows, schedule, processes) if size >= _SMALL else None
    except ConfigError:
        raise
    except ByeoriError as error:
        tell(f"No plan for this model: {error}")
    kind = chosen[1] if chosen and settings.parallel == "auto" else settings.parallel
    processes = parallel.choose(kind, size, processes)
    if processes.world > 1:
        shared = f", frozen weights sharded over {processes.shards} of them" if processes.sharded else ""
        tell(f"{processes.world} processes{shared}")
    if chosen is None:
        return _resolved(settings, "none", False, None), processes, None
    offer, way = chosen[0], chosen[0].way
    assert way is not None
    tell(_sentence(offer))
    peak = offer.allocated if offer.machine.device == "cuda" else offer.need
    tokens = None if way.micro.size else way.micro.tokens
    return _resolved(settings, way.recompute, way.four_bit, tokens), processes, Forecast(offer=offer, peak=peak)


def _weights(settings: TrainSettings, start: StartingModel, processes: Processes) -> int:
    """Bytes of all weights as they would be held; only the headers of the files are read."""
    bits = _model.bits(settings) or 8 * load.resolve_dtype(settings.dtype, processes.device).itemsize
    stored = fingerprint.stored_tensors(load.local_folder(start.base, start.revision, hub.WEIGHTS))
    return sum(item.count for item in stored.values()) * bits // 8


def _resolved(settings: TrainSettings, recompute: str, four_bit: bool, tokens: int | None) -> TrainSettings:
    found: dict[str, Any] = {}
    if settings.gradient_checkpointing == "auto":
        found["gradient_checkpointing"] = recompute
    if settings.load_in_4bit == "auto":
        found["load_in_4bit"] = four_bit
    if settings.micro_batch_size is None and settings.micro_batch_tokens is None:
        found["micro_batch_tokens"] = tokens
    return settings.model_copy(update=found)


def _chosen(
    settings: TrainSettings, start: StartingModel, rows: Rows, schedule: Schedule, processes: Processes
) -> tuple[Candidate, str] | None:
    """The best way on as many of this machine as there are processes, and how weights are shared."""
    config = load.load_config(
        start.base, revision=start.revision, trust_remote_code=settings.trust_remote_code is not None
    )
    if settings.load_in_8bit or getattr(config, "quantization_config", None):
        return None  # whose weights are not rehearsed as they are held
    rehearser, table = Rehearser(config=config, training=settings), machines.read()
    choice, world = rehearser.choice, processes.world
    if choice.four_bit is None and importlib.util.find_spec("bitsandbytes") is None:
        choice = replace(choice, four_bit=False)
    work = workload.of_rows(
        rows,
        plan=schedule,
        world=world,
        size=settings.micro_batch_size,
        tokens=rehearser.micro_batch_tokens(processes.device.type),
        share=settings.share_prefixes != "off",
        only=settings.micro_batch_size is not None or settings.micro_batch_tokens is not None,
    )
    # three equal passes of one token each: no speed is asked for, only the order of the ways
    case = PlanInput(
        work=work,
        choice=choice,
        table=table,
        rehearse=rehearser.rehearse,
        usual=lambda *_: (3.0, 1.0, 1.0),
        least=rehearser.least,
    )
    here = _here(processes)
    offer = candidates.best(case, here, world)
    if offer.way is None or not offer.way.sharded:
        return offer, "ddp"
    found = rehearser.rehearse(offer.way.micro, offer.way.recompute, offer.way.four_bit, here.device)
    need = sum(candidates.memory(found, table, here, processes.local_world).values())
    return offer, "hsdp" if need <= here.memory * (1 - table.headroom) else "fsdp"


def _here(processes: Processes) -> Machine:
    """What one process has of this machine: the least of all, so that all choose alike."""
    device = processes.device
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device)
        name, memory_bytes, workspace = has.name, float(has.total_memory), _WORKSPACE[has.major >= 9]
    else:
        name, memory_bytes, workspace = "CPU", memory.total_bytes() / processes.local_world, memory.resident_bytes()
    return Machine(
        name=name,
        device=device.type,
        memory=int(parallel.least(memory_bytes, processes)),
        bandwidth=None,
        flops=1.0,
        link="",
        link_speed=None,
        workspace=-int(parallel.least(-float(workspace), processes)),
        share=1.0,
        share_source="",
    )


def _sentence(offer: Candidate) -> str:
    assert offer.way is not None
    has, need = f"{offer.machine.memory / GIB:.1f} GiB", f"{offer.need / GIB:.1f}"
    each = " in each process" if offer.count > 1 else ""
    if offer.fits:
        return f"Plan: {offer.way.words}, which takes about {need} of {has}{each}"
    return (
        f"Plan: {need} GiB are needed{each} even with {offer.way.words}, and there are {has}: this run may end without "
        "memory; byeori plan shows where it fits"
    )
