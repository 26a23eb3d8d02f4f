"""An adapter is attached without importing bitsandbytes, and nothing of PEFT is changed by that."""

from __future__ import annotations

import subprocess
import sys

import torch

from byeori.model.adapter import without_bitsandbytes

ATTACH = """
import sys
import torch
from byeori.model import adapter
assert "peft" not in sys.modules, "imported with byeori"

model = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4)})
model.config = type("Config", (), {"get": lambda *_: None, "to_dict": lambda _: {}})()
model.prepare_inputs_for_generation = None
adapter.attach(model, r=2, alpha=2, dropout=0.0, targets=["up"], seed=0)
assert "bitsandbytes" not in sys.modules, "imported"
from peft.import_utils import is_bnb_available
assert is_bnb_available(), "hidden for good"
import peft.helpers
assert peft.helpers.bnb is not None
assert "bitsandbytes" not in sys.modules
assert peft.helpers.bnb.functional.dequantize_4bit
assert "bitsandbytes" in sys.modules
"""


def test_an_adapter_is_attached_without_it_and_it_can_be_imported_after() -> None:
    done = subprocess.run([sys.executable, "-c", ATTACH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_layer_of_its_own_keeps_it() -> None:
    layer = type("Linear4bit", (torch.nn.Module,), {"__module__": "bitsandbytes.nn.modules"})()
    before = sys.modules.pop("bitsandbytes", None)
    try:
        with without_bitsandbytes(torch.nn.ModuleList([layer])):
            assert "bitsandbytes" not in sys.modules
        with without_bitsandbytes(torch.nn.ModuleList([torch.nn.Linear(1, 1)])):
            assert sys.modules["bitsandbytes"] is None
        assert "bitsandbytes" not in sys.modules
    finally:
        if before is not None:
            sys.modules["bitsandbytes"] = before
