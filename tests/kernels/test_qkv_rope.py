"""The table of attention modules against the modules' own code."""

from __future__ import annotations

import pytest
import torch

import attention_probe
import zoo
from byeori.kernels import patch, qkv_rope

# modules that compute the fused form with some configs only, which the table leaves to their own code
_LEFT_OUT = {"CohereCompassAttention", "Glm4MoeAttention", "MiniMaxM3VLAttention", "NemotronAttention"}


@pytest.mark.slow
def test_every_entry_of_the_table_equals_its_module_and_none_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All causal models of the installed transformers, each attention class in two layers."""
    table, checked, missing = set(qkv_rope.KNOWN), set(), set()
    for name, module in attention_probe.modules():
        if name in table:
            if qkv_rope.fuse_attention(torch.nn.ModuleList([module])):
                del module.forward
                assert attention_probe.equals_the_fused_form(module), name
                checked.add(name)
        elif qkv_rope._projections(module):
            norms = hasattr(module, "q_norm") and hasattr(module, "k_norm")
            monkeypatch.setitem(qkv_rope.KNOWN, name, qkv_rope._NORMS_WINDOW if norms else qkv_rope._WINDOW)
            module.sliding_window = getattr(module, "sliding_window", None)
            try:
                if attention_probe.equals_the_fused_form(module):
                    missing.add(name)
            except Exception:  # any model's code, which may need other arguments
                pass
    assert checked == table
    assert missing <= _LEFT_OUT, "these compute what the table's entries do; add a line for each"


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gemma2", "mistral", "mixtral", "granite", "hyperclovax"])
def test_a_models_attention_equals_the_fused_form(kind: str) -> None:
    model, _ = zoo.tiny(kind, torch.float32)
    attention = [module for module in model.modules() if type(module).__name__ in qkv_rope.KNOWN]
    assert len(attention) == 2
    for module in attention:
        for name in (*qkv_rope.NAMES, "o_proj"):  # without the adapters
            setattr(module, name, getattr(module, name).base_layer)
        assert attention_probe.equals_the_fused_form(module.float())


def test_heads_that_rotate_in_part_run_their_own_code() -> None:
    model, _ = zoo.tiny("llama")
    config = model.get_base_model().config
    config.rope_parameters = config.rope_parameters | {"partial_rotary_factor": 0.5}
    assert qkv_rope.fuse_attention(model) == 0


def test_a_class_of_the_same_name_elsewhere_is_not_the_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = zoo.tiny("llama")
    module = next(module for module in model.modules() if type(module).__name__ == "LlamaAttention")
    monkeypatch.setattr(type(module), "__module__", "transformers_modules.somebody")
    assert qkv_rope.fuse_attention(model) == 0
    notes = patch.notes(model, ["heads"], torch.float32, torch.device("cpu"))
    assert notes == ["LlamaAttention has no fused form and runs its own code, which is slower"]
