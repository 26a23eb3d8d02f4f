"""The fused adapter equals PEFT's own, and stays PEFT's on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file

import byeori
from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.errors import ConfigError
from byeori.kernels import forest_attention, lora_linear
from byeori.kernels.dropout import DropoutMask, SeededDropout
from byeori.model import adapter, forward
from byeori.model.adapter import Variant
from byeori.train import checkpoint
from tiny_models import byte_level_tokenizer, tiny_llama
from zoo import Wide

WORDS = 50


def adapted(
    targets: list[str],
    *,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    variant: Variant = adapter.PLAIN,
    **model: Any,
) -> Any:
    base = tiny_llama(WORDS, **model).to(dtype)
    forest_attention.register()
    found = adapter.attach(base, r=3, alpha=7, dropout=dropout, targets=targets, seed=2, variant=variant)
    torch.manual_seed(3)
    for name, parameter in found.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return found


def fused(model: Any) -> Any:
    model = copy.deepcopy(model)
    assert lora_linear.fuse(model) > 0
    return model


def run(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.sin().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


IDS = torch.arange(3, 27).view(2, 12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "targets", [["all-linear"], ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]], ids=str
)
def test_fused_equals_peft(targets: list[str], bias: bool) -> None:
    plain = adapted(targets, attention_bias=bias, mlp_bias=bias)
    with Wide():
        logits, gradients = run(fused(plain), IDS)
        expected, right = run(plain, IDS)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    assert gradients.keys() == right.keys()
    for name in right:
        torch.testing.assert_close(
            gradients[name], right[name], rtol=1e-12, atol=1e-12 * float(right[name].abs().max())
        )


VARIANTS = [
    Variant(use_dora=True),
    Variant(use_dora=True, use_rslora=True, rank_pattern=(("q_proj", 5),)),
    Variant(lora_bias=True),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "dora" if variant.use_dora else "bias")
def test_fused_variants_equal_peft(variant: Variant, bias: bool) -> None:
    plain = adapted(["all-linear"], variant=variant, attention_bias=bias, mlp_bias=bias)
    with Wide():
        logits, gradients = run(fused(plain), IDS)
        expected, right = run(plain, IDS)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == right.keys()
    assert any("magnitude" in name or name.endswith("bias") for name in right)
    for name in right:
        scale = float(right[name].abs().max())
        torch.testing.assert_close(gradients[name], right[name], rtol=1e-10, atol=1e-10 * scale)
    note = lora_linear.note(fused(plain))
    kind = "DoRA" if variant.use_dora else "lora_bias"
    assert (
        note == f"{kind}: every layer is fused for itself, attention heads and feed-forward layers as a whole are not"
    )


def test_dora_with_dropout_equals_peft() -> None:
    """The mask is drawn by PEFT's own layer, so the same seed gives the same mask."""
    plain = adapted(["q_proj"], variant=Variant(use_dora=True), dropout=0.4).train()
    model = fused(plain)
    results = []
    for one in (plain, model):
        torch.manual_seed(7)
        results.append(run(one, IDS))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-10, atol=1e-10)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-9, atol=1e-10)


def test_dora_lengths_follow_the_adapter() -> None:
    """They are kept between the tokens of an answer, and computed again when the adapter changes."""
    plain = adapted(["q_proj"], variant=Variant(use_dora=True)).eval()
    model = fused(plain)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-10, atol=1e-10)
        for one in (model, plain):
            for name, parameter in one.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(2.0)
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-10, atol=1e-10)


def one_layer(dropout: float) -> tuple[Any, Any]:
    """(fused, PEFT's own) linear layer of a model, float64."""
    plain = adapted(["q_proj"], dropout=dropout)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    return fused(plain).get_submodule(name), plain.get_submodule(name)


def test_gradcheck_without_and_with_a_mask() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    w, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    a = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    keep = torch.empty_like(x).bernoulli_(0.6).div_(0.6)
    for drop in (None, DropoutMask(keep), SeededDropout(0.4, 3)):
        assert torch.autograd.gradcheck(
            lambda *t, m=drop: lora_linear._FusedLora.apply(t[0], w, bias, t[1], t[2], 1.5, m, None), (x, a, b)
        )


def test_dropout_is_right_on_average_and_off_in_evaluation() -> None:
    layer, plain = one_layer(0.4)
    x = torch.randn(4, 32, dtype=torch.float64)
    exact = plain.eval()(x).detach()
    torch.testing.assert_close(layer.eval()(x), exact, rtol=1e-12, atol=1e-12)
    layer.train()
    torch.manual_seed(0)
    draws = torch.stack([layer(x).detach() for _ in range(4000)])
    assert float(draws.std(0).mean()) > 0.1
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / 4000**0.5 + 1e-12)
    assert float(error.max()) < 5  # standard errors


def test_the_mask_of_the_forward_pass_is_the_backward_pass_mask() -> None:
    """Dropped inputs give A's columns no gradient, and x only the gradient through W."""
    layer, _ = one_layer(0.5)
    layer.train()
    x = torch.ones(1, 32, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(11)
    layer(x).sum().backward()
    torch.manual_seed(11)
    keep = SeededDropout(0.5, int(torch.randint(2**31, ()))).apply(torch.ones_like(x))
    assert 0 < int((keep == 0).sum()) < 32
    a, b, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    through = s * (torch.ones(1, b.shape[0], dtype=torch.float64) @ b) @ a
    torch.testing.assert_close(x.grad, layer.base_layer.weight.sum(0, keepdim=True) + keep * through)
    assert torch.equal((a.grad == 0).all(0), keep[0] == 0)


def test_disable_adapter_is_the_base() -> None:
    model = fused(adapted(["all-linear"]))
    base = tiny_llama(WORDS).double()
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, base(IDS).logits, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(IDS).logits, base(IDS).logits)


def test_bf16_keeps_float32_masters() -> None:
    model = fused(adapted(["all-linear"], dtype=torch.bfloat16))
    trained = [parameter for _, parameter in checkpoint.trainable(model)]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    logits, gradients = run(model, IDS)
    assert logits.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert all(not p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


def test_the_state_dict_is_pefts(tmp_path: Path) -> None:
    plain = adapted(["all-linear"], dtype=torch.float32)
    model = fused(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    checkpoint.save_adapter(tmp_path, model)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(tiny_llama(WORDS), str(tmp_path))
    torch.testing.assert_close(loaded(IDS).logits, plain(IDS).logits, rtol=1e-6, atol=1e-6)


def test_the_same_seed_draws_the_same_adapter() -> None:
    one, two = (
        adapter.attach(tiny_llama(WORDS), r=2, alpha=2, dropout=0, targets=["q_proj"], seed=5) for _ in range(2)
    )
    for left, right in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(left, right)
    layer = next(module for module in one.modules() if isinstance(module, LoraLinear))
    assert float(layer.lora_A["default"].weight.detach().abs().sum()) > 0
    assert float(layer.lora_B["default"].weight.detach().abs().sum()) == 0


def test_an_unknown_target_lists_the_layers() -> None:
    with pytest.raises(ConfigError) as error:
        adapter.attach(tiny_llama(WORDS), r=2, alpha=2, dropout=0, targets=["q_porj"], seed=0)
    assert str(error.value) == (
        "--lora_target_modules: no layer is called 'q_porj' (did you mean q_proj?); the layers are "
        "embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"
    )


def test_all_linear_leaves_the_head_alone() -> None:
    model = adapted(["all-linear"])
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


EMBEDDINGS = ["q_proj", "embed_tokens", "lm_head"]


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_train_as_peft_computes_them(tied: bool) -> None:
    """Gradients through the forest, the fused layers and the chunked head against PEFT's whole forward pass."""
    plain = adapted(EMBEDDINGS, tie_word_embeddings=tied)
    model = fused(plain)
    assert forward.use_forest_attention(model)
    ids = [5, 9, 3, 22, 31, 8, 40]
    examples = [Example(token_ids=ids, targets=((2, 7),)), Example(token_ids=[*ids[:4], 7, 6], targets=((4, 6),))]
    with Wide():
        loss = -forward.forest_logprobs(model, forests.build(examples, min_shared=1)).sum()
        expected = torch.zeros((), dtype=torch.float64)
        for example in examples:
            tokens = torch.tensor([list(example.token_ids)])
            logp = plain(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
            (start, end), *_ = example.targets
            for at in range(start, end):
                expected = expected - logp[at - 1, tokens[0, at]]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        loss.backward()
        expected.backward()
    right = dict(plain.named_parameters())
    trained = checkpoint.trainable(model)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in trained} == set(EMBEDDINGS)
    for name, parameter in trained:
        scale = float(right[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, right[name].grad, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("tied", [False, True])
def test_sft_with_embeddings_and_head(tied: bool, title_rows: Path, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tiny_llama(len(tokenizer), tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    result = byeori.sft(
        base_model=str(tmp_path / "base"),
        data_path=str(title_rows),
        output_dir=str(tmp_path / "out"),
        cutoff_len=256,
        max_rows=8,
        max_steps=3,
        batch_size=4,
        dtype="float32",
        learning_rate=1e-2,
        lora_target_modules="[q_proj, embed_tokens, lm_head]",
    )
    assert result.last_loss < result.first_loss
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any(".weight" in name and "lora_" not in name for name in saved)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in saved} == set(EMBEDDINGS)
    recorded = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(recorded["target_modules"]) == sorted(EMBEDDINGS)
    base = tiny_llama(len(tokenizer), tie_word_embeddings=tied)
    model = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    for name, tensor in saved.items():
        found = model.state_dict()[
            name.replace(".lora_A.", ".lora_A.default.")
            .replace(".lora_B.", ".lora_B.default.")
            .replace("lora_embedding_A", "lora_embedding_A.default")
            .replace("lora_embedding_B", "lora_embedding_B.default")
        ]
        assert torch.equal(found, tensor)


def test_what_a_layer_returns_may_be_written_into() -> None:
    """Gemma 3n multiplies it in place; autograd forbids that for a view made in a function of its own."""
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    layer, plain = one_layer(0.0)
    found = [
        [*torch.autograd.grad(each(x).mul_(3.0).square().sum(), [each.lora_A["default"].weight])]
        for each in (layer, plain)
    ]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
