"""Forest -> log-probs at its targets, through any causal model of transformers.

A model whose layers do not go through the attention interface is run one example at a time.
"""

from __future__ import annotations

from typing import Any

import torch

from byeori.batch import forest as forests
from byeori.batch.forest import Forest
from byeori.data.tokenize import Example
from byeori.errors import ModelError
from byeori.kernels import device_kind, forest_attention
from byeori.kernels.lm_head import SIZES, target_logprobs
from byeori.model import load, sharding
from byeori.model.device_batch import DeviceBatch, place

# Layers in which a token meets others through the attention interface alone.
_KINDS = {"full_attention", "sliding_attention"}


def use_forest_attention(model: Any) -> bool:
    """Switch the model to forest attention; False where its layers do not go through the interface."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = set(getattr(causal.config.get_text_config(), "layer_types", None) or ())
    if not getattr(causal, "_supports_attention_backend", False):
        return False
    if getattr(causal, "_is_stateful", False) or kinds - _KINDS:  # states or convolutions run on along the forest
        return False
    try:
        causal.set_attn_implementation(forest_attention.NAME)
    except (ValueError, ImportError):
        return False
    return True


def use_plain_attention(model: Any) -> None:
    """Switch back to PyTorch's attention (the model's own where it has none), for generation."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    causal.set_attn_implementation("sdpa" if getattr(causal, "_supports_sdpa", False) else "eager")


def compute_device(model: Any) -> torch.device:
    """Where the model computes: where its adapters are, since sharded weights may wait in the CPU's memory."""
    first = next((parameter for parameter in model.parameters() if parameter.requires_grad), None)
    device: torch.device = (next(model.parameters()) if first is None else first).device
    return device


def forest_logprobs(model: Any, forest: Forest | DeviceBatch, *, plain: bool = False) -> torch.Tensor:
    """log p of every target of a forest, [M] float32, with gradients where the mode has them.

    plain: one pass for each node, for a model that does not take forest attention; nothing may be shared then.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return sharding.through(causal, lambda: _forest_logprobs(model, forest, plain))


def _forest_logprobs(model: Any, forest: Forest | DeviceBatch, plain: bool) -> torch.Tensor:
    backbone, head = load.parts(model)
    batch = forest if isinstance(forest, DeviceBatch) else place(forest, compute_device(model))
    index = batch.index
    if plain:
        nodes = batch.forest.nodes
        parts = [backbone(input_ids=batch.ids[:, start:end], use_cache=False) for start, end, _ in nodes]
        hidden = torch.cat([part.last_hidden_state[0] for part in parts])
    else:
        output = backbone(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False, forest_layout=batch.layout
        )
        if not batch.layout.calls[0]:
            raise ModelError("this model's layers do not go through transformers' attention interface")
        hidden = output.last_hidden_state.squeeze(0)
        if len(hidden) < batch.forest.unique_tokens:  # the last layer computed the rows that predict something, alone
            index = batch.index_of_rows
    sizes = SIZES.get(device_kind.kind(hidden), SIZES["cuda"])
    return target_logprobs(head, hidden[index], batch.target_ids, **sizes)


@torch.no_grad()
def plain_logprobs(model: Any, tokens: list[int], at: list[int]) -> torch.Tensor:
    """log p of the tokens at the positions `at` [len(at)], by the model's own forward pass over one sequence."""
    device = compute_device(model)
    ids = torch.tensor([tokens], device=device)
    index = torch.tensor(at, device=device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=index - 1).logits[0]
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return wide.log_softmax(dim=-1).gather(1, ids[0, index][:, None])[:, 0]


def self_check(model: Any, examples: list[Example], *, plain: bool = False) -> float:
    """Compute some examples as training does and as the model itself does, one at a time; the mean difference of log p.

    plain: training runs one sequence at a time, because the model does not take forest attention.

    Raises:
        ModelError: they differ by more than rounding does (5e-4 in float32, 0.1 in 16 bit, relative to 1 + |log p|).
    """
    training = model.training
    model.eval()
    groups = [[example] for example in examples] if plain else [examples]
    with torch.no_grad():
        together = torch.cat([forest_logprobs(model, forests.build(group), plain=plain) for group in groups])
    if not plain:
        use_plain_attention(model)
    at = [[i for start, end in example.targets for i in range(start, end)] for example in examples]
    alone = [plain_logprobs(model, list(e.token_ids), where) for e, where in zip(examples, at, strict=True)]
    if not plain:
        use_forest_attention(model)
    model.train(training)
    expected = torch.cat(alone)
    difference = float(((together - expected).abs() / (1 + expected.abs())).mean())
    limit = 5e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.1
    if not difference <= limit:
        raise ModelError(
            f"byeori computes other log-probs than this model's own forward pass (mean relative difference "
            f"{difference:.2g}); it cannot train this model, please tell us which one it is"
        )
    return difference
