"""Tiny mixtures of experts of any kind, in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 24,
    "intermediate_size_mlp": 24,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


def saved(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """Save a model of these sizes, as far as its kind has them, with weights of which none is negligible."""
    torch.manual_seed(0)
    known = transformers.CONFIG_MAPPING[kind]().to_dict()
    config = transformers.CONFIG_MAPPING[kind](**{name: n for name, n in (SIZES | sizes).items() if name in known})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder
