"""FSDP2 over frozen weights: every process keeps its rows of them and gathers a layer when it is needed.

Only frozen matrices are sharded. Adapters, some thousandth of the weights, stay whole on every process, and so do
norms: gradients, optimizer and checkpoints are the same as without sharding, gradients are summed once a step, and a
run goes on with any number of processes. Nothing is cast: weights lie in the compute type, adapters in float32.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch

from byeori.distributed.processes import Processes
from byeori.model.wrap import layers

T = TypeVar("T")


def shard(causal: Any, processes: Processes, *, offload: bool = False) -> None:
    """Shard each layer, the input embedding where it is not the output embedding too, and what is left, by rows.

    Over all processes, or over those of one machine (processes.shards); then every machine holds all weights and only
    adapters' gradients travel between machines.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    shape = (processes.world // processes.shards, processes.shards)
    mesh = init_device_mesh(processes.device.type, shape, mesh_dim_names=("copies", "shards"))["shards"]
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    whole = {parameter for parameter in causal.parameters() if parameter.dim() < 2}
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    apart = [] if embedding.weight is head.weight else [embedding]
    for module in [*layers(causal), *apart, causal]:
        fully_shard(module, mesh=mesh, offload_policy=policy, ignored_params=whole)
        if "forward" in vars(type(module)):  # transformers wraps a class's forward once more for every subclass
            del type(module).forward
    causal.forward = MethodType(_forward, causal)


def _forward(self: Any, *args: Any, byeori_call: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs) if byeori_call is None else byeori_call()


def through(causal: Any, call: Callable[[], T]) -> T:
    """Call inside the model's own call, where the embeddings of a sharded model are whole."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(causal, FSDPModule):
        return call()
    result: T = causal(byeori_call=call)
    if not torch.is_grad_enabled():  # no backward pass will do it; one process alone would, where it reads the model
        causal.reshard()
    return result


@contextmanager
def shown_whole(causal: Any, device: torch.device) -> Iterator[None]:
    """Show sharded weights as whole ones on `device` (without their numbers).

    PEFT makes adapters of the size, and in the place, of what a process holds of a layer.
    """
    from torch.distributed.tensor import DTensor

    hidden: list[tuple[Any, str, torch.Tensor, Any]] = []
    for module in causal.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                hidden.append((module, name, parameter, module._load_state_dict_post_hooks))
                module._load_state_dict_post_hooks = OrderedDict()  # FSDP's, which look for shards
                blank = torch.empty(1, dtype=parameter.dtype, device=device).expand(parameter.shape)
                module._parameters[name] = torch.nn.Parameter(blank, requires_grad=False)
    yield
    for module, name, parameter, hooks in reversed(hidden):
        module._parameters[name], module._load_state_dict_post_hooks = parameter, hooks


@contextmanager
def last_layer_whole(causal: Any) -> Iterator[None]:
    """The last layer gathered, while it is tried whether it can be pruned."""
    from torch.distributed.fsdp import FSDPModule

    last = next(reversed(layers(causal)), None)
    if not isinstance(last, FSDPModule):
        yield
        return
    last.unshard()
    yield
    last.reshard()


def rows(parameter: torch.Tensor) -> tuple[int, int | None]:
    """Which rows of a parameter this process keeps: (start, end), or (0, None) where it keeps all."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(parameter, DTensor):
        return 0, None
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0], offset[0] + shape[0]


def shard_of(parameter: torch.Tensor, mine: torch.Tensor, *, offload: bool) -> torch.Tensor:
    """This process's rows in the place of a parameter: a DTensor like it, or the rows themselves where it has all."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return mine
    sharded: torch.Tensor = DTensor.from_local(
        mine.cpu() if offload else mine,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return sharded
