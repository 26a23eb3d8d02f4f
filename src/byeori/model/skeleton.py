"""Models without weights, made of a config alone: what `byeori plan` rehearses."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from byeori.errors import ConfigError, ModelError
from byeori.kernels import forest_attention
from byeori.model import load
from byeori.model.text_model import auto_class, text_config
from byeori.support.suggestions import nearest
from byeori.support.text_files import one_line


def config_of(shape: Sequence[str]) -> Any:
    """Return a model's config from `name=number` items, as config.json names them; model_type is llama by default.

    Raises:
        ConfigError: if an item is malformed, transformers has no such model_type, or the sizes do not go together.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    values: dict[str, Any] = {}
    for item in shape:
        name, equals, text = item.partition("=")
        try:
            values[name] = text if name == "model_type" else json.loads(text)
            valid = equals and not (type(values[name]) is int and values[name] < 1)
        except (ValueError, RecursionError):
            valid = False
        if not valid:
            raise ConfigError(f"--shape {item!r}: write name=number, such as hidden_size=4096")
    kind = values.pop("model_type", "llama")
    if kind not in CONFIG_MAPPING:
        near = nearest(kind, list(CONFIG_MAPPING))
        raise ConfigError(
            f"--shape: transformers has no model_type {kind}{near}; give one that it has, or leave it out"
        )
    try:
        config = AutoConfig.for_model(kind, **values)
    except Exception as error:  # each config class has checks of its own
        raise ConfigError(f"--shape: no {kind} model has these sizes: {one_line(error, 200)}") from None
    known = {*type(config)().to_dict(), *type(config).attribute_map, "head_dim"}  # which models read if it is there
    if unknown := [name for name in values if name not in known]:
        raise ConfigError(f"--shape: a {kind} config has no {', '.join(unknown)}")
    return config


def check_sizes(config: Any) -> None:
    """Raise unless the sizes divide as attention needs; PyTorch would notice only in the middle of a step.

    Raises:
        ModelError: if the hidden size or the number of heads does not divide.
    """
    text = text_config(config)
    hidden, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
    groups = getattr(text, "num_key_value_heads", None)
    if hidden and heads and hidden % heads and getattr(text, "head_dim", None) in (None, hidden // heads):
        raise ModelError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    if heads and groups and heads % groups:
        raise ModelError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")


def frozen_model(config: Any, dtype: torch.dtype, device: str) -> Any:
    """Return a frozen causal model of a config; empty on the meta device, else with random weights.

    Raises:
        ModelError: if transformers cannot make it.
    """
    forest_attention.register()
    try:
        with torch.device(device):
            return auto_class(config).from_config(copy.deepcopy(config), dtype=dtype).requires_grad_(False)
    except ModelError:
        raise
    except Exception as error:  # a config can be wrong in as many ways as there are models
        raise ModelError(f"no model can be made of this {config.model_type} config: {one_line(error, 200)}") from None


@contextmanager
def masks_on_meta() -> Iterator[None]:
    """Inside, transformers makes masks without looking at the numbers of tensors on the meta device, which has none."""
    from transformers import masking_utils

    before = masking_utils.is_tracing

    def is_tracing(tensor: torch.Tensor | None = None) -> bool:
        return bool(before(tensor)) or (tensor is not None and tensor.is_meta)

    masking_utils.is_tracing = is_tracing
    try:
        yield
    finally:
        masking_utils.is_tracing = before


def with_layers(config: Any, count: int) -> Any:
    """Return the config with its first `count` layers only."""
    config = copy.deepcopy(config)
    text = text_config(config)
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == before:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return config


def small(config: Any, layers: int) -> Any:
    """Return a config of the same kind with its first layers, 64 wide: its code runs on a CPU in milliseconds."""
    config = with_layers(config, layers)
    text = config.get_text_config()
    heads, groups = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    text.hidden_size, text.num_attention_heads = 64, 4
    if groups:
        text.num_key_value_heads = max(1, 4 * groups // heads)
    for name, value in list(vars(text).items()):
        if isinstance(value, int) and not isinstance(value, bool):
            if name.endswith(("head_dim", "per_layer_input")):
                setattr(text, name, 16)
            if name.endswith("intermediate_size") or name.startswith("vocab_size"):
                setattr(text, name, 64)
    text.pad_token_id = None  # an index of the large vocabulary
    return config


def layers_of(model: Any) -> list[Any]:
    """Return the decoder's layers; none if the model has them under no common name."""
    backbone, _ = load.parts(model)
    for holder in (backbone, getattr(backbone, "language_model", None), getattr(backbone, "decoder", None)):
        for name in ("layers", "h", "blocks"):
            if isinstance(layers := getattr(holder, name, None), torch.nn.ModuleList):
                return list(layers)
    return []
