"""Every architecture of transformers that writes text: trained exactly, or refused with a sentence."""

from __future__ import annotations

import pytest

import model_table

# one of each kind: attention, experts, latent attention, states, states over whole rows, images, chunks, its own code
SHORT = {
    "llama",
    "mixtral",
    "deepseek_v3",
    "qwen3_5",
    "granitemoehybrid",
    "jamba",
    "gemma3",
    "llama4_text",
    "bloom",
    "bert",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in SHORT else pytest.mark.slow) for n in model_table.NAMES]
)
def test_trained_exactly_or_refused_with_a_sentence(name: str) -> None:
    row = model_table.row(name)
    if not row.built:
        assert name not in SHORT
        pytest.skip(f"transformers runs no tiny model of it: {row.trains[:80]}")
    assert "Traceback" not in row.trains
    assert "\n" not in row.trains
    if row.exact is not None:
        assert row.exact < 2e-5
