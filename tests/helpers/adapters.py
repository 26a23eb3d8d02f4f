"""Small adapters whose weights and optimizer state can be saved."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from byeori.train import checkpoint
from tiny_models import tiny_llama


def small_adapter(seed: int = 0, **changes: Any) -> Any:
    values: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    base = tiny_llama(20)
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(**values | changes))


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for _, parameter in checkpoint.trainable(model)]


def stepped(seed: int = 0) -> tuple[Any, torch.optim.AdamW]:
    """An adapter whose optimizer has moments."""
    model = small_adapter(seed)
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    for _ in range(2):
        for parameter in trained(model):
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizer
