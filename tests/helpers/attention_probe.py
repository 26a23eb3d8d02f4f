"""What a module of transformers hands to the attention interface, against the fused form of the table's entry."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from byeori.kernels import qkv_rope
from byeori.kernels.lora_linear import Projection

_NAME = "byeori_probe"
_SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "vocab_size": 64,
    "head_dim": 16,
    "sliding_window": 7,
    "use_sliding_window": True,
    "position_embedding_type": "rope",
}


def modules() -> Iterator[tuple[str, Any]]:
    """(class name, a small attention module with random weights) of every causal model that can be built like this."""
    for model_type, names in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        try:
            config = transformers.CONFIG_MAPPING[model_type]().get_text_config()
            name = names if isinstance(names, str) else names[0]
            code = importlib.import_module(getattr(transformers, name).__module__)
            for key, value in _SIZES.items():
                if hasattr(config, key):
                    setattr(config, key, value)
            if types := getattr(config, "layer_types", None):
                config.layer_types = [*dict.fromkeys(types), "full_attention", "sliding_attention", "full_attention"][
                    :4
                ]
        except Exception:  # configs that do not allow these sizes, models without their libraries
            continue
        for name, kind in vars(code).items():
            if inspect.isclass(kind) and "Attention" in name and kind.__module__ == code.__name__:
                for layer in (0, 1):
                    if (module := _built(kind, config, layer)) is not None:
                        yield name, module


def _built(kind: Any, config: Any, layer: int) -> Any:
    for arguments in ((config, layer), (config,)):
        try:
            module = kind(*arguments).requires_grad_(False).eval()
        except Exception:
            continue
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        return module
    return None


@torch.no_grad()
def equals_the_fused_form(module: Any) -> bool:
    """Whether a module's own code and the fused form compute the same, and hand the interface the same options."""
    seen: list[Any] = []

    def probe(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        seen[:] = [query, key, value, options]
        return query.transpose(1, 2).contiguous(), None

    transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[_NAME] = probe
    known, size = qkv_rope.KNOWN[type(module).__name__], module.head_dim
    small, parts = _narrow(module)
    norms = [qkv_rope.head_norm(module, name) if known.norms else None for name in ("q_norm", "k_norm")]
    generator = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(1, 5, d, generator=generator) for d in (6, size, size))
    out = type(module).forward(small, hidden_states=x, position_embeddings=(cos, sin), attention_mask=None)[0]
    fused = qkv_rope.compute(x[0], None, ((cos[0], sin[0]), (cos[0], sin[0])), size, parts, tuple(norms))
    expected = [states[0].transpose(0, 1) for states in seen[:3]]
    same = [torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(fused, expected, strict=True)]
    same.append(torch.allclose(out, small.o_proj(seen[0].transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5))
    options = {name: value for name, value in seen[3].items() if value is not None and name != "dropout"}
    stated = {"scaling": module.scaling, "sliding_window": known.window(module), "softcap": known.softcap(module)}
    return all(same) and options == {name: value for name, value in stated.items() if value is not None}


def _narrow(module: Any) -> tuple[Any, list[Projection]]:
    """The module with 6 columns instead of the hidden size, and its projections."""
    small = copy.copy(module)
    small.config = copy.deepcopy(module.config)
    small.config._attn_implementation = _NAME
    layers: dict[str, Any] = {}
    for name in (*qkv_rope.NAMES, "o_proj"):
        whole = getattr(module, name)
        shape = (whole.in_features, 6) if name == "o_proj" else (6, whole.out_features)
        layers[name] = torch.nn.Linear(*shape, bias=False).requires_grad_(False)
        torch.nn.init.normal_(layers[name].weight)
    small._modules = {**module._modules, **layers}
    return small, [Projection(weight=layers[name].weight, bias=None) for name in qkv_rope.NAMES]
