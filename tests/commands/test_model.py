"""What a model is made faster by: fused functions, and compiled layers where there are none or they are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from byeori.commands import _model
from byeori.config import SftSettings, check
from byeori.distributed.processes import Processes
from byeori.kernels import rms_norm
from byeori.model import forward, wrap

NEEDED = {"base_model": "m", "data_path": "d", "output_dir": "o"}


@pytest.mark.parametrize(
    ("kind", "settings", "pays", "compiled"),
    [
        ("llama", {}, True, False),
        ("llama", {"speed": "norms"}, True, True),
        ("llama", {"compile": "on"}, False, True),
        ("gpt2", {}, True, True),
        ("gpt2", {}, False, False),
        ("gpt2", {"compile": "off"}, True, False),
    ],
)
def test_layers_are_compiled_where_none_is_fused(
    kind: str, settings: dict[str, Any], pays: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(wrap, "compiling_pays", lambda *_: pays)
    monkeypatch.setattr(wrap, "compile_layers", lambda base: 2)
    model, _ = zoo.tiny(kind)
    forward.use_forest_attention(model)
    alone = Processes(rank=0, world=1, device=torch.device("cpu"))
    _model.speed_up(model, check(SftSettings, NEEDED | settings), 100, alone, told.append)
    assert bool(told) == compiled
    fused = [
        module for module in model.modules() if getattr(module.forward, "__func__", None) is rms_norm.fused_forward
    ]
    assert bool(fused) == (kind == "llama" and settings.get("compile") != "on")
