"""Small models of random weights: to try accelerations, and how an architecture runs, without downloading anything."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import torch

from byeori.data.tokenize import Example
from byeori.errors import CheckpointError, ModelError
from byeori.kernels import forest_attention, lora_linear, state_layers
from byeori.model import adapter, forward, quantize, skeleton
from byeori.model.text_model import text_config
from byeori.support import atomic_files
from byeori.support.cache_folder import cache_folder
from byeori.support.text_files import visible

_VOCABULARY, _LENGTH = 8192, 512
_LAYERS = 8  # of a hybrid, which has every kind of layer among its first


def trial_model(device: torch.device, dtype: torch.dtype, bits: int | None = None) -> tuple[Any, Any]:
    """Return a Llama of 22M random weights with an adapter on every layer, switched to forests, and its base.

    bits: 4 or 8 to quantize it.

    Raises:
        ModelError: if not even this model runs on forests.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    forest_attention.register()
    base = LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()
    if bits:
        quantize.quantize_loaded(base, bits)
    model = adapter.attach(base, r=8, alpha=16, dropout=0.0, targets=["all-linear"], seed=0)
    lora_linear.fuse(model)
    if not forward.use_forest_attention(model):
        raise ModelError("transformers does not let attention be replaced; install a tested version of it")
    return model, model.get_base_model()


def trial_rows() -> list[Example]:
    """Return rows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, _VOCABULARY, (2, _LENGTH), generator=generator).tolist()
    return [Example(token_ids=row, targets=((_LENGTH // 2, _LENGTH),)) for row in ids]


def sharing_note(config: Any) -> str | None:
    """Return a sentence on an architecture that does not share every prefix in every layer, as far as its code shows.

    Nothing is computed: the first layers are made without numbers. Whether sharing is exact is tried when a run starts.
    The sentence is kept in the cache, since making the layers imports the model's code, a third of a preview's time.
    """
    import transformers

    parts = [version("byeori"), transformers.__version__, config.to_json_string(use_diff=False)]
    kept = cache_folder() / "sharing" / hashlib.sha256("\0".join(parts).encode()).hexdigest()
    with suppress(OSError, ValueError):
        return visible(kept.read_text(encoding="utf-8")) or None
    note = _sharing_note(config)
    with suppress(OSError, CheckpointError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write(kept, note or "")
    return note


def _sharing_note(config: Any) -> str | None:
    layers = min(_LAYERS, getattr(text_config(config), "num_hidden_layers", _LAYERS))
    try:
        model = skeleton.frozen_model(skeleton.with_layers(config, layers), torch.bfloat16, "meta")
        if not forward.use_forest_attention(model):
            return "Rows of this model are computed one at a time, since its attention cannot be replaced"
    except ModelError:  # a run says what is wrong with it
        return None
    note = state_layers.note(model)
    return note and re.sub(r"^\d+ layers", "Layers of this model", note)
