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
from byeori.model import attention, load
from byeori.objective.logprobs import target_logprobs

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
        causal.set_attn_implementation(attention.NAME)
    except (ValueError, ImportError):
        return False
    return True


def use_plain_attention(model: Any) -> None:
    """Switch back to PyTorch's attention (the model's own where it has none), for generation."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    causal.set_attn_implementation("sdpa" if getattr(causal, "_supports_sdpa", False) else "eager")


def forest_logprobs(model: Any, forest: Forest, *, plain: bool = False) -> torch.Tensor:
    """log p of every target of a forest, [M] float32, with gradients where the mode has them.

    plain: the forest is a single sequence, for a model that does not take forest attention.
    """
    backbone, head = load.parts(model)
    device = next(model.parameters()).device
    ids = torch.from_numpy(forest.token_ids).to(device)[None]
    if plain:
        output = backbone(input_ids=ids, use_cache=False)
    else:
        positions = torch.from_numpy(forest.positions).to(device)[None]
        layout = attention.layout(forest)
        output = backbone(input_ids=ids, position_ids=positions, use_cache=False, forest_layout=layout)
        if not layout.calls[0]:
            raise ModelError("this model's layers do not go through transformers' attention interface")
    hidden = output.last_hidden_state[0][torch.from_numpy(forest.target_index).to(device)]
    return target_logprobs(head, hidden, torch.from_numpy(forest.target_ids).to(device))


@torch.no_grad()
def plain_logprobs(model: Any, tokens: list[int], at: list[int]) -> torch.Tensor:
    """log p of the tokens at the positions `at` [len(at)], by the model's own forward pass over one sequence."""
    device = next(model.parameters()).device
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
