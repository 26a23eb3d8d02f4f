"""What a preview says of an architecture, from its structure alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Lfm2Config, LlamaConfig

from byeori.model import trial

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_the_sentence_on_sharing_is_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path))
    hybrid = Lfm2Config(**SIZES, num_hidden_layers=2, layer_types=["conv", "full_attention"])
    plain = LlamaConfig(**SIZES, num_hidden_layers=2)
    said = [trial.sharing_note(config) for config in (hybrid, plain)]
    assert said[0] is not None and said[0].startswith("Layers of this model") and said[1] is None
    monkeypatch.setattr(trial.skeleton, "frozen_model", lambda *_: pytest.fail("made again"))
    assert [trial.sharing_note(config) for config in (hybrid, plain)] == said
