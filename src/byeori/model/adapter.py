"""A new LoRA adapter on a base model."""

from __future__ import annotations

import torch

from byeori.errors import ConfigError, ModelError
from byeori.model.light import without_bitsandbytes
from byeori.support.suggestions import nearest

with without_bitsandbytes():
    from peft import LoraConfig, PeftModel, get_peft_model


def target_names(model: torch.nn.Module, wanted: list[str]) -> list[str] | str:
    """Check target modules against the layers that are there.

    Raises:
        ConfigError: a name that ends no layer's name; the sentence lists the names there are.
    """
    if wanted == ["all-linear"]:
        return "all-linear"
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    names = [
        name for name, module in model.named_modules() if isinstance(module, kinds) or hasattr(module, "quant_state")
    ]
    there = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    for name in wanted:
        if not any(full == name or full.endswith("." + name) for full in names):
            raise ConfigError(
                f"--lora_target_modules names {name!r}, which ends no layer's name{nearest(name, there)}; "
                f"the layers are {', '.join(there)}"
            )
    return wanted


def attach(
    model: torch.nn.Module,
    *,
    r: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    seed: int,
    revision: str | None = None,
) -> PeftModel:
    """Put a new LoRA adapter on the model; its parameters are float32, everything else is frozen.

    revision: of the base on the Hub; the adapter's configuration names it.

    Raises:
        ConfigError: a target that is not there. ModelError: one that PEFT refuses.
    """
    torch.manual_seed(seed)  # A is drawn at random; B starts at zero
    config = LoraConfig(
        r=r,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=dropout,
        target_modules=target_names(model, targets),
        task_type="CAUSAL_LM",
        revision=revision,
    )
    try:
        with without_bitsandbytes(model):
            return get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError) as error:
        raise ModelError(f"PEFT cannot put an adapter on {', '.join(targets)}: {error}") from None
