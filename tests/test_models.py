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
        pytest.skip(f"transformers makes no tiny model of it: {row.trains[:80]}")
    for text in (row.trains, *row.cells.values()):
        assert "Traceback" not in text and "\n" not in text and not text.startswith("no (")
    if row.exact is not None:
        assert row.exact < 2e-5
    if name in SHORT - {"bert"}:  # whether adapters on experts can be merged is said in a sentence
        assert {cell for key, cell in row.cells.items() if key != "merge"} == {model_table.YES}, row.cells
