"""Trained rows and whole modules beside LoRA compute what PEFT's own code computes, with float32 parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.errors import ConfigError
from byeori.kernels import forest_attention, trained_modules
from byeori.model import adapter, embedding_rows, forward
from byeori.model.adapter import Variant
from tiny_models import tiny_llama
from zoo import ALL, Wide

IDS = torch.tensor([[3, 50, 15, 51, 26, 7, 35], [50, 50, 4, 9, 7, 51, 8]])
TOKENS = [51, 7, 50]


def gradients(model: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    logits.sin().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def peft(base: Any, **config: Any) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **config))
    for name, parameter in model.named_parameters():
        if "trainable_tokens" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


@pytest.mark.parametrize("kind", ["tied", "untied", "gemma3"])
def test_trained_rows_equal_pefts(kind: str) -> None:
    base = ALL["gemma3"]() if kind == "gemma3" else tiny_llama(52, tie_word_embeddings=kind == "tied")
    names = ["model.embed_tokens"] if kind != "untied" else ["model.embed_tokens", "lm_head"]
    words = base.config.vocab_size
    plain = peft(base, trainable_token_indices={name: [token % words for token in TOKENS] for name in names})
    model = copy.deepcopy(plain)
    trained_modules.prepare(model)
    ids = IDS % words
    found, expected = model(ids).logits, plain(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    right = gradients(plain, expected)
    for name, grad in gradients(model, found).items():
        torch.testing.assert_close(grad, right[name], rtol=1e-10, atol=1e-10)
    assert any("trainable_tokens" in name for name in right)
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_rows_through_the_forest(tied: bool) -> None:
    """Log-probs and gradients through the chunked head against PEFT's whole forward pass."""
    names = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    forest_attention.register()
    plain = peft(tiny_llama(52, tie_word_embeddings=tied), trainable_token_indices=dict.fromkeys(names, TOKENS))
    model = copy.deepcopy(plain)
    trained_modules.prepare(model)
    assert forward.use_forest_attention(model)
    ids = IDS[0].tolist()
    with Wide():
        found = -forward.forest_logprobs(model, forests.build([Example(token_ids=ids, targets=((2, 7),))])).sum()
        logp = plain(input_ids=IDS[:1]).logits[0].log_softmax(-1)
        expected = -sum(logp[at - 1, ids[at]] for at in range(2, 7))
        found.backward()
        expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(dict(model.named_parameters())[name].grad, parameter.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_modules_have_float32_masters(dtype: torch.dtype) -> None:
    variant = Variant(modules_to_save=("embed_tokens", "lm_head", "model.norm"))
    model = adapter.attach(
        tiny_llama(52).to(dtype), r=2, alpha=2, dropout=0, targets=["q_proj"], seed=0, variant=variant
    )
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert sum("modules_to_save" in name for name in trained) == 3
    logits = model(IDS).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits, tiny_llama(52).to(dtype)(IDS).logits, rtol=0, atol=0)
    assert all(grad is not None and grad.dtype == torch.float32 for grad in gradients(model, logits).values())


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_start_at_the_mean(tied: bool) -> None:
    model, before = tiny_llama(52, tie_word_embeddings=tied), tiny_llama(52, tie_word_embeddings=tied)
    embedding_rows.resize(model, 55)
    for one, other in zip(
        (model.get_input_embeddings(), model.get_output_embeddings()),
        (before.get_input_embeddings(), before.get_output_embeddings()),
        strict=True,
    ):
        assert torch.equal(one.weight[:52], other.weight)
        torch.testing.assert_close(one.weight[52:], other.weight.mean(0).expand(3, -1))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.vocab_size == 55
    embedding_rows.resize(model, 52)
    assert model.config.vocab_size == 55
    embedding_rows.resize(model, 52, shrink=True)
    assert model.config.vocab_size == 52


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"--modules_to_save: no module is called 'lm_haed' .did you mean lm_head"):
        adapter.attach(
            tiny_llama(52),
            r=2,
            alpha=2,
            dropout=0,
            targets=["q_proj"],
            seed=0,
            variant=Variant(modules_to_save=("lm_haed",)),
        )
