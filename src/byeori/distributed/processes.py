"""Checkpointing, compiling, processes: everything that wraps a model or sets up a group, in this order, here only.

Started by torchrun, every process trains its own share of each step's rows; the adapters' gradients are summed once a
step, after the last micro-batch. Started without it there is one process and nothing to add.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from byeori.errors import may_speak

# Part of a process's memory that frozen weights may take before they are sharded: activations need the rest.
_ROOM = 0.6


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """rank: this process, 0-based. world: how many there are. device: where this one computes.

    local, local_world: the same on this machine. shards: over how many processes frozen weights are sharded; 1 is none.
    """

    rank: int
    world: int
    device: torch.device
    local: int = 0
    local_world: int = 1
    shards: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks to the terminal."""
        return self.rank == 0

    @property
    def first_here(self) -> bool:
        """Whether this process is the first of its machine, and so fills the machine's caches."""
        return self.local == 0

    @property
    def sharded(self) -> bool:
        """Whether weights are gathered layer by layer: all processes must then run as many micro-batches."""
        return self.shards > 1


def start() -> Processes:
    """Join the group that torchrun announced in the environment, or stand alone."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://"))
        # torchrun --max-restarts keeps its store: under one name the second attempt meets the addresses of the first
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    return Processes(rank=rank, world=world, device=device, local=local, local_world=local_world)


def choose(kind: str, weights: int, processes: Processes) -> Processes:
    """Over how many processes frozen weights are sharded.

    kind: ddp (none), fsdp (all), hsdp (those of a machine), or auto: ddp where the weights take at most _ROOM of a
    process's memory, else hsdp where that is so for their shards, else fsdp. weights: bytes of all weights as held.
    """
    shards = {"ddp": 1, "hsdp": processes.local_world, "fsdp": processes.world}
    if kind != "auto":
        return replace(processes, shards=shards[kind])
    room = _ROOM * _memory(processes)
    fitting = [count for count in (shards["ddp"], shards["hsdp"]) if weights / count <= room]
    return replace(processes, shards=fitting[0] if fitting else shards["fsdp"])


def _memory(processes: Processes) -> float:
    """Bytes that this process has for itself."""
    if processes.device.type == "cuda":
        return float(torch.cuda.get_device_properties(processes.device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes.local_world


def finish() -> None:
    """Leave the group. Those that are left need not say so: this process says itself why it ends."""
    if dist.is_initialized():
        first_to("speak")
        dist.destroy_process_group()


def connection_broke(error: Exception) -> bool:
    """Whether a sum over processes failed because one of them is gone."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def first_to_speak() -> bool:
    """Whether no other process of this attempt has asked; the store is torchrun's, so it outlives the first process."""
    return first_to("speak") and may_speak()


def first_to(act: str) -> bool:
    """Whether this process is the first of the attempt to ask about it."""
    try:
        return dist.distributed_c10d._get_default_store().add(f"byeori: {act}", 1) == 1
    except RuntimeError:  # the store is gone with the process that held it
        return True


def wait(processes: Processes) -> None:
    """Until every process is here."""
    if processes.world > 1:
        dist.barrier()


@contextmanager
def one_at_a_time(processes: Processes) -> Iterator[None]:
    """The processes of a machine run the body in turn."""
    for _ in range(processes.local):
        wait(processes)
    yield
    for _ in range(processes.local_world - processes.local):
        wait(processes)


def add_up(values: list[float], processes: Processes) -> list[float]:
    """Sum numbers over all processes, in float64."""
    if processes.world == 1:
        return values
    return add_array(np.array(values, dtype=np.float64), processes).tolist()


def least(value: float, processes: Processes) -> float:
    """The smallest of the processes' values."""
    if processes.world == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=processes.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return float(tensor)


def add_array(values: np.ndarray, processes: Processes) -> np.ndarray:
    """Sum a float64 array over all processes."""
    if processes.world == 1:
        return values
    tensor = torch.from_numpy(values).to(processes.device)
    dist.all_reduce(tensor)
    return tensor.cpu().numpy()


def add_gradients(parameters: list[torch.nn.Parameter], processes: Processes) -> None:
    """Sum gradients over all processes in one message; a process without rows adds zeros."""
    if processes.world == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([grad.numel() for grad in grads]), strict=True):
        parameter.grad = part.view_as(parameter)
