"""The processes of a run: who they are, and what they compute together.

Started by torchrun, each process trains its own share of every step's rows, and the adapters' gradients are summed once
a step, after the last micro-batch. Started without it there is one process, and every reduction returns its input.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from byeori.errors import may_speak

T = TypeVar("T")

# Share of a process's memory that frozen weights may take before they are sharded: activations need the rest.
_WEIGHTS_SHARE = 0.6


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """rank: of this process, 0-based. world: how many there are. device: the one this process computes on.

    local, local_world: the same on this machine. shards: how many processes frozen weights are sharded over; 1 is none.
    """

    rank: int
    world: int
    device: torch.device
    local: int = 0
    local_world: int = 1
    shards: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def first_here(self) -> bool:
        """Whether this process is the first of its machine: the one that fills the machine's caches."""
        return self.local == 0

    @property
    def sharded(self) -> bool:
        """Whether weights are gathered layer by layer; all processes must then run the same number of micro-batches."""
        return self.shards > 1


ALONE = Processes(rank=0, world=1, device=torch.device("cpu"))


def init_processes() -> Processes:
    """Join the process group that torchrun describes in the environment, or be the only process."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://"))
        # torchrun --max-restarts keeps its store; without a prefix a second attempt would read stale addresses
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    return Processes(rank=rank, world=world, device=device, local=local, local_world=local_world)


def choose_sharding(kind: str, weights: int, processes: Processes) -> Processes:
    """Return the processes with the number that frozen weights are sharded over.

    kind: ddp (1), fsdp (all), hsdp (those of a machine), or auto: ddp if the weights fit in _WEIGHTS_SHARE of a
    process's memory, else hsdp if their shards do, else fsdp. weights: bytes of all weights as held.
    """
    shards = {"ddp": 1, "hsdp": processes.local_world, "fsdp": processes.world}
    if kind != "auto":
        return replace(processes, shards=shards[kind])
    room = _WEIGHTS_SHARE * _memory(processes)
    fitting = [count for count in (shards["ddp"], shards["hsdp"]) if weights / count <= room]
    return replace(processes, shards=fitting[0] if fitting else shards["fsdp"])


def _memory(processes: Processes) -> float:
    """Bytes of memory for this process alone."""
    if processes.device.type == "cuda":
        return float(torch.cuda.get_device_properties(processes.device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes.local_world


def shutdown() -> None:
    """Leave the process group. No other process need report it: this one reports itself why it ends."""
    if dist.is_initialized():
        first_to("speak")
        dist.destroy_process_group()


def connection_lost(error: Exception) -> bool:
    """Whether a reduction failed because another process is gone."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def first_to_speak() -> bool:
    """Whether this process is the one to report an error: the first of the attempt that asks."""
    return first_to("speak") and may_speak()


def first_to(act: str) -> bool:
    """Whether this process is the first of the attempt to ask. The store is torchrun's, so it outlives rank 0."""
    try:
        return dist.distributed_c10d._get_default_store().add(f"byeori: {act}", 1) == 1
    except RuntimeError:  # the store is gone with the process that held it
        return True


def barrier(processes: Processes) -> None:
    """Wait for every process."""
    if processes.world > 1:
        dist.barrier()


@contextmanager
def one_at_a_time(processes: Processes) -> Iterator[None]:
    """Let the processes of a machine run the body in turn."""
    for _ in range(processes.local):
        barrier(processes)
    yield
    for _ in range(processes.local_world - processes.local):
        barrier(processes)


def all_reduce_sum(values: list[float], processes: Processes) -> list[float]:
    """Sum numbers over all processes, in float64."""
    if processes.world == 1:
        return values
    return all_reduce_array(np.array(values, dtype=np.float64), processes).tolist()


def all_reduce_min(value: float, processes: Processes) -> float:
    """Return the smallest value of all processes."""
    if processes.world == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=processes.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return float(tensor)


def all_reduce_array(values: np.ndarray, processes: Processes) -> np.ndarray:
    """Sum a float64 array over all processes."""
    if processes.world == 1:
        return values
    tensor = torch.from_numpy(values).to(processes.device)
    dist.all_reduce(tensor)
    return tensor.cpu().numpy()


def broadcast(tensors: Iterable[torch.Tensor], processes: Processes) -> None:
    """Give every process the tensors of the first one, in place."""
    if processes.world > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


_GRADIENTS_AT_ONCE = 1 << 26  # numbers


def all_reduce_gradients(parameters: list[torch.nn.Parameter], processes: Processes) -> None:
    """Sum gradients over all processes; a process without rows adds zeros. FSDP has summed those of sharded weights."""
    if processes.world == 1:
        return
    whole, at_once = [parameter for parameter in parameters if local(parameter) is parameter], 0
    part: list[torch.nn.Parameter] = []
    for parameter in whole:
        if part and at_once + parameter.numel() > _GRADIENTS_AT_ONCE:
            _sum_gradients(part)
            part, at_once = [], 0
        part.append(parameter)
        at_once += parameter.numel()
    if part:
        _sum_gradients(part)


def _sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([grad.numel() for grad in grads]), strict=True):
        parameter.grad = part.view_as(parameter)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's rows of a sharded tensor, and any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a sharded tensor, which every process has to ask for, and any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(value: T, processes: Processes) -> list[T]:
    """Return the values of all processes in their order on the main one, and none elsewhere."""
    if processes.world == 1:
        return [value]
    found: list[Any] | None = [None] * processes.world if processes.main else None
    dist.gather_object(value, found)
    return found or []
