"""FSDP2 over frozen weights: every process holds its rows of them and gathers a layer when it is needed.

Only frozen matrices are sharded. Adapters, about a thousandth of the weights, stay whole on every process, and so do
norms: gradients, optimizer and checkpoints are the same as without sharding, gradients are summed once per step, and a
run resumes with any number of processes. Nothing is cast: weights are in the compute type, adapters in float32.
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
    """Shard by rows: each layer, the input embedding unless it is also the output embedding, and the rest.

    Over all processes, or over those of one machine (processes.shards); then every machine holds all weights and only
    adapters' gradients are sent between machines.
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
    causal.forward = MethodType(_forward, causal)


def _forward(self: Any, *args: Any, byeori_call: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs) if byeori_call is None else byeori_call()


def through(causal: Any, call: Callable[[], T]) -> T:
    """Return call(), called inside the model's own call, where the embeddings of a sharded model are whole."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(causal, FSDPModule):
        return call()
    result: T = causal(byeori_call=call)
    if not torch.is_grad_enabled():  # there is no backward pass that does it
        causal.reshard()
    return result


@contextmanager
def whole_shapes(causal: Any, device: torch.device) -> Iterator[None]:
    """Replace sharded weights by empty ones of their whole shape on `device` inside.

    PEFT makes an adapter of the size, and on the device, of a process's own rows otherwise.
    """
    from torch.distributed.tensor import DTensor

    replaced: list[tuple[Any, str, torch.Tensor, Any]] = []
    for module in causal.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                replaced.append((module, name, parameter, module._load_state_dict_post_hooks))
                module._load_state_dict_post_hooks = OrderedDict()  # FSDP's, which look for shards
                blank = torch.empty(1, dtype=parameter.dtype, device=device).expand(parameter.shape)
                module._parameters[name] = torch.nn.Parameter(blank, requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter, hooks in reversed(replaced):
            module._parameters[name], module._load_state_dict_post_hooks = parameter, hooks


@contextmanager
def last_layer_whole(causal: Any) -> Iterator[None]:
    """Gather the last layer inside, while it is compared with its pruned form."""
    from torch.distributed.fsdp import FSDPModule

    last = next(reversed(layers(causal)), None)
    if not isinstance(last, FSDPModule):
        yield
        return
    last.unshard()
    try:
        yield
    finally:
        last.reshard()


def rows(parameter: torch.Tensor) -> tuple[int, int | None]:
    """Return this process's rows of a parameter: (start, end), or (0, None) if it holds all."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(parameter, DTensor):
        return 0, None
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0], offset[0] + shape[0]


def shard_of(parameter: torch.Tensor, mine: torch.Tensor, *, offload: bool) -> torch.Tensor:
    """Return this process's rows of a parameter as a DTensor like it, or as they are if it holds all."""
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
