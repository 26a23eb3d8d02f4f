"""Processes: who am I, how many are we, and how results are added up. The only place that sets up groups.

Started by torchrun, every process trains its own share of each step's rows; the adapters' gradients are summed once a
step, after the last micro-batch. Started without it there is one process and nothing to add.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


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
