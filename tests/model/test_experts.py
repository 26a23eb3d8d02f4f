"""Adapters on experts' bare parameters: what PEFT computes, and the sentences about experts that are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import byeori
from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.errors import ConfigError
from byeori.kernels import forest_attention, lora_linear
from byeori.model import adapter, experts, forward
from byeori.model.adapter import Variant
from byeori.train import checkpoint
from tiny_models import byte_level_tokenizer, tiny_llama

NAMES = ("experts.gate_up_proj", "experts.down_proj")


def mixtral(words: int) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=words, **sizes, **more))


def attached(**variant: Any) -> Any:
    forest_attention.register()
    model = adapter.attach(
        mixtral(50), r=2, alpha=4, dropout=0, targets=["all-linear"], seed=3, variant=Variant(**variant)
    )
    lora_linear.fuse(model)
    return model


def test_equals_peft_through_the_forest(tmp_path: Path) -> None:
    """Log-probs and gradients of rows that share a prefix against PEFT's whole forward pass, then saved and loaded."""
    model = attached(target_parameters=NAMES)
    trained = checkpoint.trainable(model)
    assert sum("experts" in name for name, _ in trained) == 8
    assert not any(".gate." in name for name, _ in trained)
    torch.manual_seed(4)
    for _, parameter in trained:
        torch.nn.init.normal_(parameter, std=0.2)
    torch.manual_seed(3)
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], target_parameters=[*NAMES]
    )
    plain = get_peft_model(mixtral(50), config)
    values = {name: parameter.detach() for name, parameter in trained}
    missing, _ = plain.load_state_dict(values, strict=False)
    assert not set(values) & set(missing)
    ids = [5, 9, 3, 22, 31, 8, 40]
    examples = [Example(token_ids=ids, targets=((2, 7),)), Example(token_ids=[*ids[:4], 7, 6], targets=((4, 6),))]
    assert forward.use_forest_attention(model)
    found = -forward.forest_logprobs(model, forests.build(examples, min_shared=1)).sum()
    expected = torch.zeros(())
    for example in examples:
        tokens = list(example.token_ids)
        logp = plain(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
        (start, end), *_ = example.targets
        expected = expected - sum(logp[at - 1, tokens[at]] for at in range(start, end))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    expected.backward()
    right = dict(plain.named_parameters())
    for name, parameter in trained:
        scale = float(right[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, right[name].grad, rtol=0, atol=1e-4 * scale)
    checkpoint.save_adapter(tmp_path, model)
    loaded = PeftModel.from_pretrained(mixtral(50), tmp_path)
    row = torch.tensor([ids])
    torch.testing.assert_close(loaded(row).logits, plain(row).logits, rtol=1e-5, atol=1e-5)


def test_what_is_said() -> None:
    model = mixtral(50)
    left_out, bits = experts.notes(model, (), 4)  # as in a checkpoint of bitsandbytes
    assert left_out.startswith("The experts (experts.gate_up_proj, experts.down_proj; ")
    assert left_out.endswith(
        "are left out of the adapter; --lora_target_parameters experts.gate_up_proj experts.down_proj includes them"
    )
    assert bits.startswith("4 bit: the experts") and bits.endswith("are stored in 16 bit and stay so")
    assert experts.notes(model, NAMES, None) == []
    assert experts.notes(tiny_llama(50), (), 4) == []
    names = [name for name, _ in checkpoint.trainable(attached())]
    assert names and not any("gate" in name or "experts" in name for name in names)
    with pytest.raises(ConfigError, match=r"--lora_target_parameters: no parameter is called 'experts.gate'"):
        attached(target_parameters=("experts.gate",))


def test_a_run(title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, resumed from a checkpoint and trained further."""
    tokenizer = byte_level_tokenizer()
    mixtral(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    how: dict[str, Any] = {
        "data_path": title_rows,
        "cutoff_len": 256,
        "dtype": "float32",
        "max_rows": 8,
        "batch_size": 4,
    }
    how |= {"lora_target_parameters": " ".join(NAMES), "learning_rate": 1e-2, "save_steps": 2}
    result = byeori.sft(base_model=tmp_path / "base", output_dir=tmp_path / "run", max_steps=4, num_epochs=2, **how)
    assert result.last_loss < result.first_loss
    assert "left out" not in capsys.readouterr().err
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned = PeftModel.from_pretrained(base, tmp_path / "run")
    assert any("experts" in name and "lora_B" in name and bool(p.any()) for name, p in tuned.named_parameters())
    del how["lora_target_parameters"]
    again = byeori.sft(base_model=tmp_path / "run", output_dir=tmp_path / "two", max_steps=1, **how)
    assert again.first_loss < result.first_loss
