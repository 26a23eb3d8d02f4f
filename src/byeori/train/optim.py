"""Optimizers by their names: PyTorch's, bitsandbytes' and schedulefree's.

    adamw                       Loshchilov & Hutter, arXiv:1711.05101      two moments in float32
    adamw_8bit, lion_8bit       Dettmers et al., arXiv:2110.02861          in 8 bit; tensors under 4,096 numbers in 32
    paged_...                   bitsandbytes                               in memory that moves to the CPU if the GPU's
                                                                           is full
    lion                        Chen et al., arXiv:2302.06675              one moment
    muon                        Jordan; Liu et al., arXiv:2502.16982       one, for matrices; AdamW for everything else
    adafactor                   Shazeer & Stern, arXiv:1804.04235          a row and a column for each matrix
    schedule_free_adamw, _sgd   Defazio et al., arXiv:2405.15682           weights that average, and one moment
    sgd                                                                    one moment, or none

Weight decay is left out for vectors (norms, biases), as everywhere in the field.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch

from byeori.distributed.processes import local
from byeori.errors import CheckpointError, ConfigError
from byeori.model import quantize

# what the state of a parameter is called: one of these sets
_STATES: dict[str, tuple[set[str], ...]] = {
    "AdamW": ({"step", "exp_avg", "exp_avg_sq"},),
    "Muon": ({"momentum_buffer"},),
    "SGD": ({"momentum_buffer"}, set()),
    "Adafactor": ({"step", "row_var", "col_var"}, {"step", "variance"}),
    "AdamWScheduleFree": ({"z", "exp_avg_sq"},),
    "SGDScheduleFree": ({"z"},),
}
OF_WHOLE_MATRICES = ("muon", "adafactor")
"""The optimizers whose step of one row of a matrix depends on its other rows."""
RATE = "byeori_rate"
"""The key of a group's learning rate as a factor of the step's."""
# of schedulefree, which keeps them with its groups; and the weights that it trains, beside those that it averages
_COUNTERS, _TRAINED = ("k", "weight_sum", "lr_max"), "y"


class Joined(torch.optim.Optimizer):
    """Several optimizers, each over its own parameters, that take their steps together."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts, self.state = list(parts), parts[0].state
        for part in parts[1:]:
            part.state = self.state
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        """Take a step with each of them."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)


def make(
    name: str,
    parameters: list[torch.nn.Parameter],
    *,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    momentum: float = 0.0,
    apart: Collection[int] = (),
    rates: Mapping[int, float] = MappingProxyType({}),
) -> torch.optim.Optimizer:
    """Return an optimizer by its name in the settings; the learning rate is set before every step.

    momentum: of sgd, muon and schedule_free_sgd. apart: ids of matrices that muon leaves to AdamW: embedding and head.
    rates: of parameters, by id, as a factor of the step's; 1 if it is left out.

    Raises:
        ConfigError: if its package is not installed.
    """
    everything: dict[str, Any] = {"lr": 0.0, "weight_decay": weight_decay}
    adam = everything | {"betas": betas, "eps": epsilon}
    device = parameters[0].device.type
    if name == "muon":
        matrices = [p for p in parameters if p.dim() == 2 and id(p) not in apart]
        others = [p for p in parameters if p.dim() != 2 or id(p) in apart]
        # a step of the size of AdamW's, so that learning rates and weight decay are those of AdamW
        muon = everything | {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
        parts = [torch.optim.Muon(_groups(matrices, rates), **muon)] if matrices else []
        parts += [torch.optim.AdamW(_groups(others, rates), fused=device == "cuda", **adam)] if others else []
        return parts[0] if len(parts) == 1 else Joined(parts)
    groups = _groups(parameters, rates)
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=device == "cuda", **adam)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, foreach=False, **everything)
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=momentum, **everything)
    if name.startswith("schedule_free"):
        return _schedule_free(name, groups, adam if name.endswith("adamw") else everything | {"momentum": momentum})
    quantize.check_installed(f"--optim {name}")
    from bitsandbytes import optim as bnb

    bits = {"optim_bits": 8 if name.endswith("8bit") else 32}
    bits |= {"is_paged": name.startswith("paged") and device == "cuda"}
    lion = everything | {"betas": betas}
    made: torch.optim.Optimizer = (
        bnb.Lion(groups, **lion, **bits) if "lion" in name else bnb.AdamW(groups, **adam, **bits)
    )
    return made


def _groups(parameters: list[torch.nn.Parameter], rates: Mapping[int, float]) -> list[dict[str, Any]]:
    """Matrices and vectors apart, which have no weight decay, and each learning rate apart."""
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for parameter in sorted(parameters, key=lambda parameter: parameter.dim() <= 1):
        groups.setdefault((parameter.dim() > 1, rates.get(id(parameter), 1.0)), []).append(parameter)
    return [
        {"params": members, RATE: rate} | ({} if many else {"weight_decay": 0.0})
        for (many, rate), members in groups.items()
    ]


def _schedule_free(name: str, groups: list[dict[str, Any]], how: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        import schedulefree
    except ImportError:
        raise ConfigError(
            f"--optim {name} needs schedulefree; pip install '.[schedulefree]' in byeori's checkout"
        ) from None
    kind = schedulefree.AdamWScheduleFree if name.endswith("adamw") else schedulefree.SGDScheduleFree
    optimizer: torch.optim.Optimizer = kind(groups, foreach=False, **how)
    optimizer.train()
    return optimizer


def averages(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the weights to use are not those that are trained, but an average of them."""
    return "train_mode" in optimizer.param_groups[0]


@contextmanager
@torch.no_grad()
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give the model the weights to evaluate and to save, and the trained ones back, with the same bits."""
    if not averages(optimizer):
        yield
        return
    trained = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    optimizer.eval()
    try:
        yield
    finally:
        for parameter, values in trained:
            parameter.copy_(values)
        for group in optimizer.param_groups:
            group["train_mode"] = True


def paging_note(name: str, device: torch.device) -> str | None:
    """Return a note if paging is asked for and the device has none."""
    if not name.startswith("paged") or device.type == "cuda":
        return None
    return f"--optim {name}: {device.type.upper()} memory is not paged; the optimizer states stay in it"


# ---- states, in checkpoints -----------------------------------------------------------------------------------------


def tensors(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Return copies of a parameter's state on the CPU."""
    state = {key: value for key, value in optimizer.state.get(parameter, {}).items() if value is not None}
    if state and averages(optimizer):
        group, _ = _place(optimizer, parameter)
        state |= {key: torch.tensor(group[key], dtype=torch.float64) for key in _COUNTERS} | {_TRAINED: parameter}
    return {
        key: local(torch.as_tensor(value).detach()).to("cpu", copy=True).contiguous() for key, value in state.items()
    }


@torch.no_grad()
def restore(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, saved: dict[str, torch.Tensor]) -> None:
    """Restore a parameter's state from what `tensors` returned.

    Raises:
        CheckpointError: if it is the state of another optimizer.
    """
    owner = optimizer
    if isinstance(optimizer, Joined):
        owner = next(part for part in optimizer.parts if any(parameter is p for p in _all(part)))
    group, index = _place(owner, parameter)
    if (expected := _STATES.get(type(owner).__name__)) and not type(owner).__module__.startswith("bitsandbytes"):
        more = {*_COUNTERS, _TRAINED} if averages(owner) else set[str]()
        _check(set(saved), [names | more for names in expected if names or not more])
        if averages(owner):
            group |= {key: saved.pop(key).item() for key in _COUNTERS}
            group["k"] = int(group["k"])
            parameter.copy_(saved.pop(_TRAINED))
        counts = parameter.device if owner.defaults.get("fused") else "cpu"  # where the step count is read
        owner.state[parameter] = {
            key: tensor.to(counts if key == "step" else parameter.device) for key, tensor in saved.items()
        }
        return
    # bitsandbytes allocates its own buffers, which may be paged
    owner.init_state(group, parameter, owner.param_groups.index(group), index)
    fresh = owner.state[parameter]
    _check(set(saved), [{key for key, value in fresh.items() if value is not None}])
    for key, value in fresh.items():
        if isinstance(value, torch.Tensor):
            value.copy_(saved[key])
        elif value is not None:
            fresh[key] = int(saved[key])


def _all(optimizer: torch.optim.Optimizer) -> Iterator[torch.nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _place(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> tuple[dict[str, Any], int]:
    """The group of a parameter, and its number there."""
    return next(
        (group, index)
        for group in optimizer.param_groups
        for index, other in enumerate(group["params"])
        if other is parameter
    )


def _check(saved: set[str], expected: list[set[str]]) -> None:
    if saved not in expected:
        raise CheckpointError(
            "the checkpoint's optimizer is not this run's; give the same --optim, or its adapter alone as a start"
        )
