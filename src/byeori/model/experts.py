"""Experts: weights of many feed-forward layers in one parameter [experts, ., .], which no linear layer holds.

PEFT adapts them by name (`target_parameters`): the adapter of a layer's experts is added to their weights for the
length of a forward pass, so that whatever transformers runs over them, one by one or by grouped products, sees
W + s B A. `all-linear` leaves them out; the sentences here say so.
"""

from __future__ import annotations

from typing import Any

import torch

from byeori.errors import ConfigError
from byeori.support.suggestions import nearest


def found(model: torch.nn.Module) -> dict[str, int]:
    """Return the endings of experts' parameters (`experts.down_proj`), and how many weights each has in all layers."""
    sizes: dict[str, int] = {}
    for path, _, short, parameter in stacks(model):
        ending = f"{path.rpartition('.')[2]}.{short}"
        sizes[ending] = sizes.get(ending, 0) + _count(parameter)
    return sizes


def stacks(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module, str, torch.nn.Parameter]]:
    """Return every parameter of experts: (its module's name, its module, its own name, itself)."""
    return [
        (path, module, short, parameter)
        for path, module in model.named_modules()
        for short, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and "expert" in f"{path}.{short}" and not short.endswith("bias")
    ]


def old_names(model: torch.nn.Module) -> set[str]:
    """Return the names of linear layers that PEFT takes for those of the experts in transformers 4.

    Shared experts and dense layers have such names now. PEFT adapts the experts instead of them, and could not load
    adapters on them.
    """
    linear = (module for module in model.named_modules() if isinstance(module[1], torch.nn.Linear))
    return {name for name in {full.rpartition(".")[2] for full, _ in linear} if _means_experts(model, name)}


def _means_experts(model: torch.nn.Module, name: str) -> bool:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config: Any = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # only together with another name
        return True
    return bool(config.target_parameters)


def parameters(model: torch.nn.Module, wanted: tuple[str, ...]) -> list[str] | None:
    """Return PEFT's target_parameters, checked.

    Raises:
        ConfigError: if the model has no such parameter.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.dim() in (2, 3)]
    for ending in wanted:
        if not any(name == ending or name.endswith(f".{ending}") for name in names):
            known = list(found(model)) or list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
            raise ConfigError(f"--lora_target_parameters: no parameter is called {ending!r}{nearest(ending, known)}")
    return list(wanted) or None


def notes(model: torch.nn.Module, adapted: tuple[str, ...], bits: int | None) -> list[str]:
    """Return what becomes of a model's experts. adapted: lora_target_parameters. bits: of its linear layers."""
    sizes = found(model)
    if not sizes:
        return []
    share = sum(sizes.values()) / max(1, sum(map(_count, model.parameters())))
    about = f"the experts ({', '.join(sizes)}; {share:.0%} of the weights)"
    lines = []
    if not any(ending.endswith(name) or name.endswith(ending) for ending in sizes for name in adapted):
        command = f"--lora_target_parameters {' '.join(sizes)}"
        lines.append(f"{about[0].upper()}{about[1:]} are left out of the adapter; {command} includes them")
    if old := sorted(old_names(model)):
        lines.append(
            f"{', '.join(old)} of shared experts and dense layers are left out of the adapter: PEFT takes these names "
            "for the experts"
        )
    if bits and any(parameter.is_floating_point() for *_, parameter in stacks(model)):
        lines.append(f"{bits} bit: {about} are stored in 16 bit and stay so")
    return lines


def _count(parameter: Any) -> int:
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
