"""FSDP2: every process holds its rows of the weights and gathers a layer when it is needed.

Of a model with an adapter only frozen matrices are sharded. Adapters, about a thousandth of the weights, stay whole on
every process, and so do norms: gradients, optimizer and checkpoints are the same as without sharding, gradients are
summed once per step, and a run resumes with any number of processes. Nothing is cast: weights are in the compute type,
adapters in float32.

Weights that are trained themselves are sharded with their gradients and the optimizer's states.
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


def shard(causal: Any, processes: Processes, *, offload: bool = False, dtype: torch.dtype | None = None) -> None:
    """Shard by rows: each layer, the input embedding unless it is also the output embedding, and the rest.

    Weights that are trained are sharded with their gradients, which are summed in float32; dtype: that they compute in.

    Over all processes, or over those of one machine (processes.shards); then every machine holds all weights and only
    adapters' gradients are sent between machines.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    shape = (processes.world // processes.shards, processes.shards)
    mesh = init_device_mesh(processes.device.type, shape, mesh_dim_names=("copies", "shards"))
    trained = any(parameter.requires_grad for parameter in causal.parameters())
    if not trained or shape[0] == 1:
        mesh = mesh["shards"]
    precision = MixedPrecisionPolicy(
        param_dtype=dtype if trained else None,
        reduce_dtype=torch.float32 if trained else None,
        cast_forward_inputs=False,
    )
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    whole = {p for p in causal.parameters() if p.dim() < 2 and not p.requires_grad}
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    apart = [] if embedding.weight is head.weight else [embedding]
    for module in [*layers(causal), *apart, causal]:
        fully_shard(module, mesh=mesh, offload_policy=policy, mp_policy=precision, ignored_params=whole)
        if trained:  # gradients are sums, which the step divides once; gloo knows no other kind
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
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


def reshard(causal: Any) -> None:
    """Let go of everything that is gathered: a pass without a backward pass of its own leaves embeddings whole."""
    from torch.distributed.fsdp import FSDPModule

    for module in causal.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
