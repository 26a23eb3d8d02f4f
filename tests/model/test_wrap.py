"""What recomputing layers keeps for the backward pass, in bytes, and that gradients are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from byeori import config
from byeori.batch import forest as forests
from byeori.config import flags
from byeori.model import forward, wrap
from zoo import gradients, tiny, tree, worst


def kept_bytes(kind: str) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that the forward pass leaves for the backward pass, weights left out; and the gradients."""
    model, _ = tiny("llama")
    if kind != "none":
        wrap.recompute_layers(model.get_base_model(), kind)
    forward.use_forest_attention(model)
    model.train()
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total = forward.forest_logprobs(model, forests.build(tree())).sum()
    return sum(kept.values()), gradients(model, total)


def test_each_kind_keeps_less_and_computes_the_same() -> None:
    found = {kind: kept_bytes(kind) for kind in ("none", "selective", "full")}
    sizes = {kind: size for kind, (size, _) in found.items()}
    assert sizes["full"] < sizes["selective"] < sizes["none"]
    # one of the two layers is recomputed: half of what all of them save
    saved = (sizes["none"] - sizes["selective"]) / (sizes["none"] - sizes["full"])
    assert 0.4 < saved < 0.6, sizes
    for kind in ("selective", "full"):
        assert worst(found[kind][1], found["none"][1]) < 1e-12


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_nothing_runs_back_below_the_lowest_adapter(kind: str) -> None:
    """transformers makes the embeddings' output want a gradient, for re-entrant checkpoints."""
    model, _ = tiny("llama")
    seen = []
    causal = model.get_base_model()
    for each in ("full", kind):
        wrap.recompute_layers(causal, each)
    causal.get_input_embeddings().register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
    forward.use_forest_attention(model)
    forward.forest_logprobs(model.train(), forests.build(tree())).sum().backward()
    assert seen == [False]


@pytest.mark.parametrize(
    ("given", "kind"),
    [(True, "full"), (False, "none"), ("True", "full"), ("false", "none"), ("selective", "selective")],
)
def test_true_and_false_are_still_taken(given: object, kind: str, tmp_path: Path) -> None:
    values = {"base_model": "m", "data_path": "d", "output_dir": "o", "gradient_checkpointing": given}
    assert config.check(config.SftSettings, values).gradient_checkpointing == kind


def test_the_flag_may_stand_alone() -> None:
    def chosen(*words: str) -> str:
        needed = ["--base_model=m", "--data_path=d", "--output_dir=o"]
        made = flags.settings_from(config.SftSettings, [*needed, "--gradient_checkpointing", *words])
        assert made.lora_r == (4 if "--lora_r" in words else 16)
        return made.gradient_checkpointing

    assert chosen("--lora_r", "4") == "full"
    assert chosen("selective") == "selective"
    assert chosen("True") == "full"
