"""The language model inside a checkpoint: alone, or beside an image tower, projectors and audio.

checkpoint ── its own class (merged output loads as that) ──> text decoder + head are trained, the rest stays as it is
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

from byeori.errors import ModelError
from byeori.kernels.lm_head import Head
from byeori.model import quantize

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_ROUTERS = ("gate", "router", "gate_proj_router", "classifier")


def auto_class(config: Any) -> Any:
    """Return transformers' auto class for a checkpoint: the one of its own class, which keeps everything in it.

    Raises:
        ModelError: if this kind of model does not write text.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = config.model_type
    text, images = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind), MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    if images and text not in (config.architectures or ()):
        return AutoModelForImageTextToText
    if text or getattr(config, "auto_map", None):
        return AutoModelForCausalLM
    raise ModelError(f"{kind} is no language model that continues a text; give a decoder such as Qwen, Llama or Gemma")


def text_config(config: Any) -> Any:
    """Return the configuration of the part that writes text."""
    if not hasattr(config, "get_text_config"):  # of a model that is not transformers' own
        return config
    try:
        return config.get_text_config()
    except ValueError:  # an encoder of text besides
        return config.get_text_config(decoder=True)


def decoder(causal: Any) -> Any:
    """Return the stack of layers that computes the hidden states of text."""
    writer = _writer(causal)
    if writer is causal and text_config(causal.config) is not causal.config:
        return causal.get_decoder()
    return writer.model if writer.base_model is writer else writer.base_model


def _writer(causal: Any) -> Any:
    """The causal model inside a model with images, or the model itself."""
    inner = causal.get_decoder() if text_config(causal.config) is not causal.config else causal
    return inner if "ForCausalLM" in type(inner).__name__ else causal


def head(causal: Any) -> Head:
    """Return what turns hidden states into logits; a setting counts if the model's own code reads it."""
    config, writer = text_config(causal.config), _writer(causal)
    read = {
        name
        for method in (type(writer).forward, type(writer).__init__)
        for name in getattr(getattr(inspect.unwrap(method), "__code__", None), "co_names", ())
    }

    def setting(name: str) -> float | None:
        return getattr(config, name, None) if name in read else None

    divisor = float(setting("logits_scaling") or 1.0)
    if config.model_type == "hyperclovax":  # multiplies by what Granite divides by
        divisor = 1 / divisor
    scale = float(setting("logit_scale") or 1.0) / divisor
    output = causal.get_output_embeddings() or writer.get_output_embeddings()
    return Head(module=output, scale=scale, softcap=setting("final_logit_softcapping"))


def excluded(causal: Any) -> str | None:
    """Return PEFT's exclude_modules: a pattern of everything that is not the text decoder; None if all of it is."""
    if text_config(causal.config) is causal.config:
        return None
    stack, output = decoder(causal), causal.get_output_embeddings()
    path = next(name for name, module in causal.named_modules() if module is stack).split(".")
    prefixes, module = [], causal
    for depth, name in enumerate(path if path != [""] else []):
        for other, child in module.named_children():
            if other != name and child is not output:
                prefixes.append(".".join([*path[:depth], other]))
        module = getattr(module, name)
    return rf"({'|'.join(map(re.escape, prefixes))})(\..*)?" if prefixes else None


def ending(name: str) -> str:
    """Return the last word of a module's name, with the one before where it is a number, which layers have as well."""
    above, _, last = name.rpartition(".")
    return f"{above.rpartition('.')[2]}.{last}" if last.isdecimal() else last


def linear_targets(causal: Any) -> list[str] | None:
    """Return what all-linear means where PEFT's list has too much: the text decoder's layers, no router; else None."""
    config = text_config(causal.config)
    stack = causal if config is causal.config else decoder(causal)
    experts = next((count for name in _EXPERTS if isinstance(count := getattr(config, name, None), int)), 0)
    inside = {id(module) for module in stack.modules()}
    kept, never = set[str](), set[str]()
    for name, module in causal.named_modules():
        if not isinstance(module, torch.nn.Linear) or id(module) not in inside or name in ("lm_head", "output"):
            continue
        above, _, last = name.rpartition(".")
        router = last in _ROUTERS and experts > 1 and module.out_features == experts
        if router or quantize.reads_weight(causal.get_submodule(above), last):  # an adapter would be passed by
            never.add(last)
        else:
            kept.add(name)
    lasts = {name: ending(name) for name in kept}
    targets = {name if lasts[name] in never else lasts[name] for name in kept}
    return sorted(targets) if never or excluded(causal) else None


def writes_text(causal: Any) -> bool:
    """Return whether a model has what PEFT needs of one that writes text: inputs to generate from, embedded tokens."""
    try:
        getattr(causal, "get_input_embeddings", bool)()
    except NotImplementedError:  # transformers' word for none
        return False
    return hasattr(causal, "prepare_inputs_for_generation")


def not_for_text(causal: Any) -> str:
    """Return what is said of a model that does not run on rows of text."""
    return (
        f"transformers' {causal.config.model_type} does not run on rows of text here: it may need images, audio, a "
        "source text, or weights that are not quantized; give a decoder like Qwen or Llama"
    )
