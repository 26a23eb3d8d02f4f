"""Checkpointing, compiling, processes: everything that wraps a model or sets up a group, in this order, here only.

Started by torchrun, every process trains its own share of each step's rows; the adapters' gradients are summed once a
step, after the last micro-batch. Started without it there is one process and nothing to add.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Seconds. Compiling takes about half a minute and saves about a fifth; a shorter run does not earn it back.
_COMPILE_PAYS_AFTER = 300.0
# FLOP/s that a run is assumed to reach, only to decide whether compiling pays.
_ASSUMED_SPEED = {"cpu": 3e11, "cuda": 2e14}


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """rank: this process, 0-based. world: how many there are. device: where this one computes."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks to the terminal."""
        return self.rank == 0


def recompute_layers(causal: Any) -> None:
    """Activation checkpointing (Chen et al., arXiv:1604.06174): layers keep their inputs only and run twice."""
    causal.gradient_checkpointing_enable({"use_reentrant": False})


def compiling_pays(model: torch.nn.Module, tokens: int, device: torch.device) -> bool:
    """Whether `--compile auto` compiles: there is a compiler, and the run is long enough to earn the time back.

    tokens: all tokens of the run on this process; a LoRA step takes about 4 FLOP per weight and token.
    """
    if device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        return False
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    weights = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in tables)
    return 4.0 * weights * tokens / _ASSUMED_SPEED[device.type] > _COMPILE_PAYS_AFTER


def compile_layers(causal: Any) -> int:
    """Compile the decoder's layers, each kind once and for every length; returns how many layers there are."""
    kinds = set(getattr(causal, "_no_split_modules", None) or ())
    layers = [module for module in causal.modules() if type(module).__name__ in kinds]
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled layers as they are written, where compiling them once more (for evaluation) would not pay."""
    with torch.compiler.set_stance("force_eager"):
        yield


def start() -> Processes:
    """Join the group that torchrun announced in the environment, or stand alone."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(rank=rank, world=world, device=device)


def finish() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait(processes: Processes) -> None:
    """Until every process is here."""
    if processes.world > 1:
        dist.barrier()


def add_up(values: list[float], processes: Processes) -> list[float]:
    """Sum numbers over all processes, in float64."""
    if processes.world == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=processes.device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def add_gradients(parameters: list[torch.nn.Parameter], processes: Processes) -> None:
    """Sum gradients over all processes in one message; a process without rows adds zeros."""
    if processes.world == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([grad.numel() for grad in grads]), strict=True):
        parameter.grad = part.view_as(parameter)
