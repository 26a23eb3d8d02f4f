"""Adapters on the parameters of experts, merged: against PEFT's own merge, and against its unmerged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from byeori.errors import ModelError
from byeori.export.merge import merge
from byeori.model import adapter as adapters
from byeori.model import load, text_model
from byeori.model.adapter import Variant
from mixtures import saved
from shrunk import shrunk

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35]])
# experts one by one in the files; [experts, in, out]; [experts, out, in] in one tensor
KINDS = {
    "mixtral": ("experts.gate_up_proj", "experts.down_proj"),
    "qwen3_moe": ("experts.gate_up_proj", "experts.down_proj"),
    "gpt_oss": ("experts.gate_up_proj", "experts.down_proj"),
    "granitemoe": ("experts.gate_up_proj", "experts.down_proj"),
}


def tune(folder: Path, names: tuple[str, ...], output: Path, **more: Any) -> None:
    """Save an adapter whose numbers are not zero."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "o_proj"], target_parameters=[*names], **more)
    tuned = get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(output)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits.float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("both", [True, False], ids=["both", "one"])
def test_equals_peft(kind: str, both: bool, tmp_path: Path) -> None:
    saved(kind, tmp_path / "base")
    patterns = {"rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {"gate_up_proj": 5}, "use_rslora": True}
    tune(tmp_path / "base", KINDS[kind][: 1 + both], tmp_path / "adapter", **patterns)
    result = merge(adapter=tmp_path / "adapter", base=str(tmp_path / "base"), output_dir=tmp_path / "merged")
    assert result.verdict == "equal", result.notes
    plain = load_file(tmp_path / "base" / "model.safetensors")
    assert {key: t.shape for key, t in load_file(tmp_path / "merged" / "model.safetensors").items()} == {
        key: t.shape for key, t in plain.items()
    }
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    expected = logits(tuned)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))).abs().max() > 0.05
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    right = tuned.merge_and_unload().state_dict()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, right[key], rtol=1e-5, atol=1e-6)


def test_in_bfloat16_as_a_run_saves_it(tmp_path: Path) -> None:
    """Square experts, where only the model's own flag says which side is which, and an adapter in float32."""
    saved("gpt_oss", tmp_path / "base", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    variant = Variant(target_parameters=KINDS["gpt_oss"])
    tuned = adapters.attach(model, r=2, alpha=6, dropout=0, targets=["q_proj"], seed=1, variant=variant)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(tmp_path / "adapter")
    result = merge(adapter=tmp_path / "adapter", base=str(tmp_path / "base"), output_dir=tmp_path / "merged")
    assert result.verdict == "equal", result.notes


def test_layers_that_are_stored_in_parts_or_together(tmp_path: Path) -> None:
    """MiniMax M3's shared experts are one layer in the model and two in its files; HRM's layers the other way round."""
    for kind in ("minimax_m3_vl", "hrm_text"):
        torch.manual_seed(0)
        config = shrunk(transformers.CONFIG_MAPPING[kind]())
        text_model.auto_class(config).from_config(config).save_pretrained(tmp_path / kind)
        model = load.load_model(str(tmp_path / kind), dtype=torch.float32, device=torch.device("cpu"))
        name = "shared_experts.gate_up_proj" if kind == "minimax_m3_vl" else "mlp.gate_proj"
        tuned = adapters.attach(model, r=2, alpha=6, dropout=0, targets=[name], seed=1)
        for key, parameter in tuned.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        tuned.save_pretrained(tmp_path / f"{kind}-adapter")
        how: dict[str, Any] = {"adapter": tmp_path / f"{kind}-adapter", "base": str(tmp_path / kind)}
        if kind == "hrm_text":
            with pytest.raises(ModelError, match=r"together with other weights, and the adapter .* cannot be merged"):
                merge(**how, output_dir=tmp_path / "not")
            return
        merge(**how, output_dir=tmp_path / "merged", verify=False)
        merged = load.load_model(str(tmp_path / "merged"), dtype=torch.float32, device=torch.device("cpu"))
        right = tuned.merge_and_unload().state_dict()
        changed = [key for key in right if name in key]
        assert changed
        for key, value in merged.state_dict().items():
            torch.testing.assert_close(value, right[key], rtol=1e-5, atol=1e-6)
