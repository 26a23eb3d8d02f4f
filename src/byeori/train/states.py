"""The optimizer's states in a checkpoint, by parameter name; of sharded weights those of each process.

model.layers.0.mlp.up_proj.weight.exp_avg                 a state
model.layers.0.mlp.up_proj.weight.master                  the float32 copy of a weight that is saved in bfloat16
rank1/model.layers.0.mlp.up_proj.weight.exp_avg           the rows of process 1
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from byeori.distributed.processes import Processes, gather, local
from byeori.errors import CheckpointError
from byeori.model import load
from byeori.train import optim
from byeori.train.masters import MASTER, Masters


def trainable(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Return (name, parameter) of everything that is trained, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def tensors(
    model: Any, masters: Masters, optimizer: torch.optim.Optimizer, processes: Processes
) -> dict[str, torch.Tensor]:
    """Return copies of all states on the CPU; those of every process on the main one if trained weights are sharded."""
    own: dict[str, torch.Tensor] = {}
    saved = load.compute_dtype(model)
    for (name, parameter), held in zip(trainable(model), masters.held, strict=True):
        state = optim.tensors(optimizer, held)
        copied = held is not parameter or local(parameter) is not parameter
        if copied and held.numel() and held.dtype.itemsize > saved.itemsize:
            state[MASTER] = local(held).detach().to("cpu", copy=True).contiguous()
        own |= {f"{name}.{key}": tensor for key, tensor in state.items()}
    if not masters.sharded:
        return own
    every = enumerate(gather(own, processes))
    return {f"rank{rank}/{key}": tensor for rank, each in every for key, tensor in each.items()}


@torch.no_grad()
def restore(path: Path, model: Any, masters: Masters, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
    """Restore every state from the file of a checkpoint.

    Raises:
        CheckpointError: if they are those of another optimizer, or of another number of processes.
    """
    saved, prefix = load_file(path), ""
    ranks = {key.partition("/")[0] for key in saved if key.startswith("rank") and "/" in key}
    if masters.sharded or ranks:
        prefix = f"rank{processes.rank}/"
        if len(ranks) != processes.world or not masters.sharded:
            how = f"--nproc {len(ranks)} --parallel fsdp" if ranks else "--parallel ddp"
            raise CheckpointError(
                f"{path.parent} has the optimizer's states of another sharding than this run's; go on with {how}"
            )
    for (name, parameter), held in zip(trainable(model), masters.held, strict=True):
        own = f"{prefix}{name}"
        state = {key.rpartition(".")[2]: saved[key] for key in saved if key.rpartition(".")[0] == own}
        if MASTER in state:
            local(held).copy_(state.pop(MASTER))
        if state:
            with masters.filled(held, parameter):
                optim.restore(optimizer, held, state)
