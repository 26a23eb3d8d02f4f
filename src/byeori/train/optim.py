"""AdamW (Loshchilov & Hutter, arXiv:1711.05101)."""

from __future__ import annotations

import torch

from byeori.errors import CheckpointError
from byeori.model import quantize


def make(
    name: str,
    parameters: list[torch.nn.Parameter],
    *,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Return AdamW by its name in the settings; the learning rate is set before every step.

    adamw is PyTorch's, fused on a GPU. The others are bitsandbytes': moments in 8 bit (Dettmers et al.,
    arXiv:2110.02861; tensors under 4,096 numbers stay in 32 bit), paged ones in memory that moves to the CPU when the
    GPU's is full.

    Raises:
        ConfigError: if bitsandbytes is not installed.
    """
    if name == "adamw":
        fused = parameters[0].device.type == "cuda"
        return torch.optim.AdamW(parameters, lr=0.0, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=fused)
    quantize.check_installed(f"--optim {name}")
    from bitsandbytes.optim import AdamW

    optimizer: torch.optim.Optimizer = AdamW(
        parameters,
        lr=0.0,
        betas=betas,
        eps=epsilon,
        weight_decay=weight_decay,
        optim_bits=8 if name.endswith("8bit") else 32,
        is_paged=name.startswith("paged") and parameters[0].device.type == "cuda",
    )
    return optimizer


def paging_note(name: str, device: torch.device) -> str | None:
    """Return a note if paging is asked for and the device has none."""
    if not name.startswith("paged") or device.type == "cuda":
        return None
    return f"--optim {name}: {device.type.upper()} memory is not paged; the optimizer states stay in it"


def tensors(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Return copies of a parameter's state on the CPU."""
    state = optimizer.state.get(parameter, {})
    return {key: torch.as_tensor(value).detach().to("cpu").clone().contiguous() for key, value in state.items()}


def restore(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, index: int, saved: dict[str, torch.Tensor]
) -> None:
    """Restore a parameter's state from what `tensors` returned. index: of the parameter in the only group.

    Raises:
        CheckpointError: if it is the state of another optimizer.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        names = {"step", "exp_avg", "exp_avg_sq"}
        counts = parameter.device if optimizer.defaults["fused"] else "cpu"  # where the step count is read
        fresh = {key: tensor.to(counts if key == "step" else parameter.device) for key, tensor in saved.items()}
    else:  # bitsandbytes allocates its own buffers, which may be paged
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
        fresh = optimizer.state[parameter]
        names = set(fresh)
    if names != set(saved):
        raise CheckpointError(
            "the checkpoint's optimizer is not this run's; give the same --optim, or its adapter alone as a start"
        )
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[parameter] = fresh
        return
    for key, value in fresh.items():
        if isinstance(value, torch.Tensor):
            value.copy_(saved[key])
        else:
            fresh[key] = int(saved[key])
