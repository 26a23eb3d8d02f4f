"""An adapter is attached without importing bitsandbytes, and nothing of PEFT is changed by that."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from byeori.errors import ModelError
from byeori.model import adapter, text_model
from byeori.model.adapter import without_bitsandbytes
from shrunk import shrunk
from tiny_models import tiny_llama

ATTACH = """
import sys
import torch
from transformers import CONFIG_MAPPING
from byeori.model import adapter, text_model
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


@pytest.mark.parametrize(
    ("tied", "targets", "names"),
    [(True, ["lm_head", "q_proj"], ["lm_head"]), (False, ["lm_head"], []), (True, ["q_proj"], [])],
)
def test_targets_with_a_shared_weight(tied: bool, targets: list[str], names: list[str]) -> None:
    model = adapter.attach(tiny_llama(20, tie_word_embeddings=tied), r=2, alpha=4, dropout=0, targets=targets, seed=0)
    assert adapter.tied_targets(model) == names


def test_gguf_converters_that_drop_the_head() -> None:
    """By the source of llama.cpp's converter."""
    converter = importlib.util.find_spec("conversion")
    assert converter is not None and converter.origin is not None
    source = (Path(converter.origin).parent / "gemma.py").read_text(encoding="utf-8")
    dropping = set()
    for part in re.split(r"\n(?=@ModelBase.register)", source):
        if re.search(r'if name == "lm_head.weight":\n\s+logger.debug', part):
            dropping |= set(re.findall(r"model_arch = gguf.MODEL_ARCH\.(\w+)", part))
    assert dropping == {kind.upper() for kind in adapter.GGUF_WITHOUT_HEAD}


@pytest.mark.parametrize("kind", ["laguna", "deepseek_ocr2"])
def test_names_that_look_like_those_of_old_checkpoints(kind: str, tmp_path: Path) -> None:
    """PEFT renames an adapter as transformers renames old files of a model; new names match some of their patterns."""
    config = shrunk(CONFIG_MAPPING[kind]())
    models = []
    for seed in (1, 2):
        base = text_model.auto_class(config).from_config(config)
        models.append(adapter.attach(base, r=2, alpha=4, dropout=0.0, targets=["all-linear"], seed=seed))
    saved = adapter.state(models[0])
    missing, unexpected = adapter.load_state(models[1], saved)
    assert not unexpected and not [name for name in missing if "lora_" in name]
    assert all(torch.equal(value, saved[name]) for name, value in adapter.state(models[1]).items())
    models[0].save_pretrained(tmp_path)
    base = text_model.auto_class(config).from_config(config)
    tuned, lacking, unexpected = adapter.load_adapter(base, tmp_path)
    assert not lacking and not unexpected
    assert all(torch.equal(value, saved[name]) for name, value in adapter.state(tuned).items())


@pytest.mark.parametrize("kind", ["no head", "no embedding"])
def test_a_model_that_writes_no_text_is_a_sentence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(64)
    if kind == "no embedding":  # as pp_formulanet
        monkeypatch.setattr(type(model), "get_input_embeddings", PreTrainedModel.get_input_embeddings)
        del model.model.embed_tokens
    else:  # as pi0
        model = model.model
    with pytest.raises(ModelError, match="does not run on rows of text here"):
        adapter.attach(model, r=2, alpha=4, dropout=0.0, targets=["q_proj"], seed=0)
