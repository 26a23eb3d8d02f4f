"""Frozen weights in 4 or 8 bit: kept small, opened to the compute type once in forward and once in backward.

4 bit is NF4 with double quantisation (QLoRA, Dettmers et al., arXiv:2305.14314): blocks of 64 numbers share a scale,
and blocks of 256 scales share one. 8 bit is int8 with a scale for each row; activations stay as they are, so it is
closer to the weights than LLM.int8(), which rounds both. Both by bitsandbytes, on the CPU too.

    out, in: sizes of a layer. n: bytes of its packed weight, out * in / 2 for 4 bit.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from byeori.errors import ConfigError
from byeori.kernels.quantized_linear import QuantizedLinear

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nothing here uses


def check_installed(flag: str) -> None:
    """
    Raises:
        ConfigError: bitsandbytes, which the flag needs, is not there.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ConfigError(f"{flag} needs bitsandbytes; pip install '.[quant]' in byeori's checkout") from None


def plain_layers(causal: Any) -> list[tuple[Any, str, torch.nn.Linear]]:
    """Every plain linear layer but the output embedding: (its parent, its name there, itself)."""
    head = causal.get_output_embeddings()
    return [
        (parent, name, child)
        for parent in causal.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear and child is not head
    ]


def refuse_without_layers(causal: Any, bits: int) -> None:
    """
    Raises:
        ConfigError: the model has no layer that could be held in so many bits.
    """
    if not plain_layers(causal):
        raise ConfigError(
            f"{type(causal).__name__} has no plain linear layers to hold in {bits} bit; leave the flag out"
        )


def pack_layers(causal: Any, bits: int) -> int:
    """Put a QuantizedLinear, still empty, in the place of every plain linear layer; returns how many.

    Raises:
        ConfigError: the model has no such layer, or bitsandbytes is not installed.
    """
    check_installed(f"--load_in_{bits}bit")
    refuse_without_layers(causal, bits)
    found = plain_layers(causal)
    for parent, name, child in found:
        setattr(parent, name, QuantizedLinear(child, bits))
    return len(found)
