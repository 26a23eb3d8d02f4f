"""The plan at the start of a run, for the settings that are left open, and its comparison with the truth at the end."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from byeori.artifacts import layout
from byeori.artifacts.starting_model import StartingModel
from byeori.batch.loader import Schedule
from byeori.data.tokenized import Rows
from byeori.distributed.processes import Processes, all_reduce_min, choose_sharding
from byeori.errors import ByeoriError, ConfigError
from byeori.model import load, packed, quantize
from byeori.plan import candidates, machines, speed, workload
from byeori.plan.candidates import Candidate
from byeori.plan.machines import GIB, MIB, Machine
from byeori.plan.rehearser import PlannedRun, Rehearser
from byeori.plan.speed import Cost
from byeori.support import hub
from byeori.train import memory

# Bytes of weights below which a model fits everywhere, and a plan would take longer than it is worth.
_SMALL = 64 * MIB
_LEAST_SECONDS = 5.0  # of steps, for their speed to be kept
# What cuBLAS takes for its two streams of work (PyTorch: 32 MiB each since Hopper, else 8 MiB).
_WORKSPACE = {True: 2 * 32 * MIB, False: 2 * 8 * MIB}


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a run is expected to need on one device. peak: bytes, measured as the run's own peak is at the end.

    flops: operations for a unique token, with recomputation. tokens: unique ones of its largest micro-batch.
    dtype: what it computes in.
    """

    candidate: Candidate
    peak: int
    flops: float
    tokens: int
    dtype: torch.dtype

    def record_speed(self, log: Sequence[Mapping[str, Any]], processes: int) -> None:
        """Keep the share of the device's peak that a finished run reached, for later plans.

        log: lines of train_log.jsonl; the first step, which compiles and allocates, does not count.
        """
        steps = [line for line in log if line.get("seconds") and line.get("unique_tokens")][1:]
        tokens, seconds = (sum(line[name] for line in steps) for name in ("unique_tokens", "seconds"))
        on_gpu = self.candidate.machine.device == "cuda"
        if seconds < _LEAST_SECONDS or (on_gpu and self.tokens < speed.LEAST_TOKENS):
            return
        gpu = machines.this_gpu(machines.read()) if on_gpu else None
        peak = gpu.flops if gpu else 0.0 if on_gpu else machines.measured_peak(self.dtype)
        config = self.candidate.run_config
        if peak and config is not None:
            name, work = gpu.name if gpu else "CPU", self.flops * tokens / processes
            how: dict[str, Any] = {"flops": work, "seconds": seconds, "peak": peak, "four_bit": config.four_bit}
            speed.record(speed.Measured(device=name, **how))

    def write(self, folder: Path, measured: int) -> None:
        """Write plan.json. measured: bytes at the peak of the run."""
        candidate = self.candidate
        values: dict[str, Any] = {
            "device": candidate.machine.name,
            "processes": candidate.count,
            "memory_bytes": candidate.machine.memory,
            "fits": candidate.fits,
            "chosen": candidate.settings,
            "predicted": {"need_bytes": candidate.need, "peak_bytes": self.peak, "parts": candidate.parts},
            "measured": {"peak_bytes": measured},
            "error": round(self.peak / measured - 1, 4),
        }
        (folder / layout.PLAN).write_text(json.dumps(values, indent=1), encoding="utf-8")

    def compared(self, measured: int) -> str:
        """A line for the end of a run."""
        off = self.peak / measured - 1
        return f"Peak memory {measured / GIB:.2f} GiB, {self.peak / GIB:.2f} planned ({off:+.1%})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """settings: values for those that were left open. processes: with the number of shards.

    forecast: None for a model too small to plan for, and for one that cannot be rehearsed.
    """

    settings: dict[str, Any]
    processes: Processes
    forecast: Forecast | None


def choose(
    run: PlannedRun,
    start: StartingModel,
    rows: Rows,
    schedule: Schedule,
    processes: Processes,
    say: Callable[[str], None],
    *,
    trust_remote_code: bool = False,
) -> Chosen:
    """Resolve every setting about memory that is left to the plan, and say what was chosen and why.

    Raises:
        ConfigError: if the model cannot have a setting; its weights are not read before.
    """
    size, best = _weight_bytes(run, start, processes), None
    if size >= _SMALL:
        try:
            config = load.load_config(start.base, revision=start.revision, trust_remote_code=trust_remote_code)
            best = _best(run, config, rows, schedule, processes)
        except ConfigError:
            raise
        except ByeoriError as error:
            say(f"No plan for this model: {error}")
    processes = choose_sharding(best[1] if best and run.parallel == "auto" else run.parallel, size, processes)
    if processes.world > 1:
        shared = f", frozen weights sharded over {processes.shards} of them" if processes.sharded else ""
        say(f"{processes.world} processes{shared}")
    if best is None:
        settings = {"gradient_checkpointing": "none", "load_in_4bit": False, "micro_batch_tokens": None}
        return Chosen(settings=_left_open(run, settings), processes=processes, forecast=None)
    candidate = best[0]
    say(_sentence(candidate))
    peak = candidate.allocated if candidate.machine.device == "cuda" else candidate.need
    forecast = Forecast(candidate=candidate, peak=peak, **best[2])
    return Chosen(settings=_left_open(run, candidate.settings), processes=processes, forecast=forecast)


def _weight_bytes(run: PlannedRun, start: StartingModel, processes: Processes) -> int:
    """Bytes of all weights in memory; only the headers of the files are read."""
    bits = run.bits or 8 * load.resolve_dtype(run.dtype, processes.device).itemsize
    tensors = packed.sources(load.local_folder(start.base, start.revision, hub.WEIGHTS))
    return sum(item.count for item in tensors.values()) * bits // 8


def _left_open(run: PlannedRun, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that the run leaves to the plan; how weights are sharded is decided with its processes."""
    is_open = {
        "gradient_checkpointing": run.recompute is None,
        "load_in_4bit": run.four_bit is None,
        "micro_batch_tokens": not run.sets_micro_batches,
    }
    return {name: value for name, value in settings.items() if is_open.get(name)}


def _best(
    run: PlannedRun, model_config: Any, rows: Rows, schedule: Schedule, processes: Processes
) -> tuple[Candidate, str, dict[str, Any]] | None:
    """The best candidate on as many of this machine as there are processes, the setting `parallel` for it, and what a
    forecast says of its speed.
    """
    if (quantize.stored(model_config) or ("", 16))[1] < 16:
        return None  # a rehearsal does not know bitsandbytes' own layers
    rehearser, table = Rehearser(model_config, run), machines.read()
    if not memory.expandable_segments():
        table = replace(table, fragmentation=table.default_fragmentation)
    space = rehearser.search_space
    if space.four_bit is None and importlib.util.find_spec("bitsandbytes") is None:
        space = replace(space, four_bit=False)
    work = workload.of_rows(
        rows,
        schedule=schedule,
        world=processes.world,
        size=run.micro_batch_size,
        tokens=rehearser.micro_batch_tokens(processes.device.type),
        share=run.share_prefixes,
        only=run.sets_micro_batches,
    )
    # three equal passes of one token each: no speed is asked for, only the order of the candidates
    plan_input = replace(
        rehearser.plan_input(work, table),
        search_space=space,
        typical_cost=lambda micro_batch: Cost(3.0, 1.0, 1.0),
        speed_known=True,
    )
    here = _this_machine(processes, rehearser.dtype(processes.device.type))
    best = candidates.best(plan_input, here, processes.world)
    config = best.run_config
    if config is None:
        return best, "ddp", {"flops": 0.0, "tokens": 0, "dtype": torch.float32}
    rehearsed = rehearser.rehearse(config.micro_batch, config.recompute, config.four_bit, here.kind)
    flops = rehearsed.flops / max(1, rehearsed.tokens)
    about = {"flops": flops, "tokens": rehearsed.tokens, "dtype": rehearser.dtype(here.kind)}
    if not config.sharded:
        return best, "ddp", about
    parts = candidates.memory(rehearsed, table, here, processes.local_world, cpu_offload=run.cpu_offload)
    need = sum(parts.values())
    return best, "hsdp" if need <= here.memory * (1 - table.headroom) else "fsdp", about


def _this_machine(processes: Processes, dtype: torch.dtype) -> Machine:
    """This machine's share for one process: the least of all processes, so that each makes the same choice.

    dtype: what the run computes in.
    """
    device = processes.device
    capability = 8.0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory_bytes = properties.name, float(properties.total_memory)
        workspace, capability = _WORKSPACE[properties.major >= 9], properties.major + properties.minor / 10
    else:
        name, memory_bytes = "CPU", memory.total_bytes() / processes.local_world
        workspace = memory.resident_bytes() + machines.cpu_products(dtype)
    return Machine(
        name=name,
        device=device.type,
        memory=int(all_reduce_min(memory_bytes, processes)),
        workspace=-int(all_reduce_min(-float(workspace), processes)),
        flops=1.0,  # only the order of candidates counts
        capability=capability,
    )


def _sentence(candidate: Candidate) -> str:
    available, need = f"{candidate.machine.memory / GIB:.1f} GiB", f"{candidate.need / GIB:.1f}"
    each = " in each process" if candidate.count > 1 else ""
    if candidate.fits:
        return f"Plan: {candidate.label}, which takes about {need} of {available}{each}"
    return (
        f"Plan: {need} GiB are needed{each} even with {candidate.label}, and {available} are available: "
        "the run may run out of memory; byeori plan shows where it fits"
    )
