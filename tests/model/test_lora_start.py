"""Adapters that start from the base's weights compute, train and convert as PEFT's own do; the base stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import Linear as LoraLinear

from byeori.data.tokenize import Example
from byeori.errors import ConfigError
from byeori.kernels import lora_linear
from byeori.kernels.quantized_linear import QuantizedLinear
from byeori.model import adapter, lora_start, quantize
from byeori.model.adapter import Variant
from byeori.train import checkpoint
from tiny_models import tiny_llama

IDS = torch.arange(3, 27).view(2, 12)
TAKEN_OUT = ["pissa", "olora"]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": (("q_proj", 2), ("down_proj", 6)), "alpha_pattern": (("up_proj", 3.0),)},
    {"use_dora": True},
    {"layers_to_transform": (1,)},
]


def base() -> Any:
    return tiny_llama(50).double()


def started(init: str, **variant: Any) -> Any:
    model = adapter.attach(
        base(), r=4, alpha=6, dropout=0.0, targets=["all-linear"], seed=5, variant=Variant(init=init, **variant)
    )
    lora_start.begin(model, init, bool(variant.get("use_dora")))
    assert lora_linear.fuse(model)
    return model


def of_peft(init: str, **variant: Any) -> Any:
    """PEFT's own, which changes the base."""
    targets: Any = "all-linear"
    if variant.get("layers_to_transform"):
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        variant["layers_to_transform"] = list(variant["layers_to_transform"])
    for name in ("rank_pattern", "alpha_pattern"):
        variant[name] = dict(variant.get(name, ()))
    whole = tiny_llama(50)  # PEFT starts from weights of at most 32 bits
    torch.manual_seed(5)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, init_lora_weights=init, task_type="CAUSAL_LM", **variant
    )
    return get_peft_model(whole, config).double()


def steps(model: Any, weight_decay: float = 0.1) -> list[float]:
    """The losses of four steps of AdamW."""
    trained = [parameter for _, parameter in checkpoint.trainable(model)]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.01, weight_decay=weight_decay), []
    for _ in range(4):
        loss = -model(IDS, use_cache=False).logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("init", TAKEN_OUT)
def test_trains_as_pefts_does(init: str, variant: dict[str, Any]) -> None:
    model, expected = started(init, **variant), of_peft(init, **variant)
    before = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}
    counts = [sum(p.numel() for _, p in checkpoint.trainable(one)) for one in (model, expected)]
    assert counts[0] == counts[1]
    found = steps(model)
    assert found == pytest.approx(steps(expected), rel=1e-5)
    assert found[-1] < found[0] - 0.2
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, base()(IDS).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("init", ["mica", "pissa_niter_64", "gaussian", "orthogonal"])
def test_other_starts(init: str) -> None:
    model = started(init)
    torch.testing.assert_close(model(IDS).logits, base()(IDS).logits, rtol=1e-4, atol=1e-4)
    layer = next(module for module in model.modules() if isinstance(module, LoraLinear))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if init == "mica":
        assert not b.requires_grad
        torch.testing.assert_close(b.T @ b, torch.eye(4).to(b), rtol=0, atol=1e-5)
        with model.disable_adapter():
            pass
        assert all("lora_A" in name for name, _ in checkpoint.trainable(model))
        torch.testing.assert_close(model(IDS).logits, of_peft(init)(IDS).logits)
    elif init == "pissa_niter_64":
        whole = layer.base_layer.weight
        singular = torch.linalg.svdvals(whole)
        left = torch.linalg.svdvals(whole - layer.scaling["default"] * b[:, :4] @ a[:4])
        torch.testing.assert_close(left[: len(singular) - 4], singular[4:], rtol=1e-3, atol=1e-3)
    elif init == "gaussian":
        assert float(a.detach().std()) == pytest.approx(1 / 4, rel=0.2)
    else:
        assert float(a.abs().max()) > 0 and float(b.abs().max()) > 0
        torch.testing.assert_close(b @ a, torch.zeros_like(b @ a), rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("init", TAKEN_OUT)
def test_what_is_saved_is_plain_lora_on_the_base(init: str, variant: dict[str, Any], tmp_path: Path) -> None:
    model = started(init, **variant)
    steps(model)
    expected = model(IDS).logits.detach()
    checkpoint.save_adapter(tmp_path, model)
    loaded = PeftModel.from_pretrained(base(), str(tmp_path))
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    again = started(init, **variant)
    checkpoint.load_adapter(tmp_path, again)
    assert torch.equal(again(IDS).logits, expected)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_is_what_peft_converts_to(tmp_path: Path) -> None:
    """`path_initial_model_for_weight_conversion` of PEFT, after the same steps."""
    model, expected = started("pissa"), of_peft("pissa")
    expected.peft_config["default"].init_lora_weights = True  # as PEFT's documentation has it
    expected.save_pretrained(tmp_path / "initial")
    expected.peft_config["default"].init_lora_weights = "pissa"
    steps(model), steps(expected)
    expected.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    checkpoint.save_adapter(tmp_path / "byeori", model)
    one, two = (PeftModel.from_pretrained(base(), str(tmp_path / name)) for name in ("peft", "byeori"))
    assert one.peft_config["default"].r == two.peft_config["default"].r == 8
    torch.testing.assert_close(two(IDS).logits, one(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_rank_above_the_layers_size() -> None:
    model = adapter.attach(base(), r=20, alpha=1, dropout=0, targets=["k_proj"], seed=0, variant=Variant(init="pissa"))
    with pytest.raises(ConfigError) as error:
        lora_start.begin(model, "pissa")
    assert str(error.value) == (
        "--lora_init pissa starts model.layers.0.self_attn.k_proj from 16 singular vectors, fewer than the rank 20; "
        "give --lora_r or its --rank_pattern 16 or less"
    )


@pytest.mark.filterwarnings("ignore:The following")
@pytest.mark.parametrize(
    ("variant", "sentence"),
    [
        (
            {"rank_pattern": (("q_porj", 2),)},
            "--rank_pattern: no adapted layer is called 'q_porj' (did you mean q_proj",
        ),
        ({"alpha_pattern": (("embed_tokens", 2.0),)}, "--alpha_pattern: no adapted layer is called 'embed_tokens'"),
        ({"layers_to_transform": (0, 2)}, "--layers_to_transform: layer 2 has none of the layers to adapt"),
    ],
    ids=str,
)
def test_patterns_without_an_effect(variant: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        adapter.attach(base(), r=2, alpha=1, dropout=0, targets=["all-linear"], seed=0, variant=Variant(**variant))
    assert str(error.value).startswith(sentence)


def test_a_regular_expression_as_target() -> None:
    pattern = r".*layers\.1\..*(q|v)_proj"
    model = adapter.attach(base(), r=2, alpha=1, dropout=0, targets=[pattern], seed=0)
    found = {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    assert found == {f"base_model.model.model.layers.1.self_attn.{letter}_proj" for letter in "qv"}


def test_a_pattern_that_names_layers_is_no_matter_of_kinds() -> None:
    assert not Variant(rank_pattern=(("q_proj", 2),)).differs_by_layer
    assert Variant(rank_pattern=(("layers.0.self_attn.q_proj", 2),)).differs_by_layer
    assert Variant(alpha_pattern=((r"layers\.\d*[02468]\..*", 2.0),)).differs_by_layer
    assert Variant(layers_to_transform=(0,)).differs_by_layer


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_on_quantized_weights(init: str, bits: int) -> None:
    """DoRA's lengths and the singular vectors are those of the weights as they compute."""
    model, opened = started_quantized(init, bits), tiny_llama(50)
    with torch.no_grad():
        for name, layer in quantized(model).items():
            opened.get_submodule(name).weight.copy_(layer.base_layer.dequantize(layer.base_layer.weight))
    variant = Variant(init=init, use_dora=True)
    expected = adapter.attach(opened, r=4, alpha=6, dropout=0, targets=["all-linear"], seed=5, variant=variant)
    lora_start.begin(expected, init, True)
    lora_linear.fuse(expected)
    for name, layer in quantized(model).items():
        right = expected.get_base_model().get_submodule(name).lora_magnitude_vector["default"].weight
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, right, rtol=1e-5, atol=1e-5)
    assert steps(model) == pytest.approx(steps(expected), rel=1e-4)


def quantized(model: Any) -> dict[str, Any]:
    layers = lora_start.adapted_layers(model)
    assert layers and all(isinstance(layer.base_layer, QuantizedLinear) for layer in layers.values())
    return layers


def started_quantized(init: str, bits: int, *, use_dora: bool = True, **more: Any) -> Any:
    whole = tiny_llama(50)
    weights = {name: module.weight.detach() for name, module in whole.named_modules() if hasattr(module, "weight")}
    quantize.quantize_layers(whole, bits)
    for name, module in whole.named_modules():
        if isinstance(module, QuantizedLinear):
            module.weight = torch.nn.Parameter(module.quantize(weights[name]), requires_grad=False)
    variant = Variant(init=init, use_dora=use_dora)
    model = adapter.attach(whole, r=4, alpha=6, dropout=0, targets=["all-linear"], seed=5, variant=variant)
    lora_start.begin(model, init, use_dora, **more)
    lora_linear.fuse(model)
    return model


def test_loftq_makes_up_for_what_quantizing_loses(tmp_path: Path) -> None:
    """Q + s B A is as near to W as its rank allows; what is saved changes nothing before the first step."""
    whole = tiny_llama(50)
    model = started_quantized("loftq", 4, use_dora=False, stored=lambda name: whole.get_parameter(name).detach())
    for name, layer in quantized(model).items():
        weight = whole.get_submodule(name).weight.detach().double()
        held = layer.base_layer.dequantize(layer.base_layer.weight).double()
        a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
        left = torch.linalg.matrix_norm(weight - held - layer.scaling["default"] * b @ a)
        rest = torch.linalg.svdvals(weight - held)[4:].norm()
        assert float(left) == pytest.approx(float(rest), rel=1e-4)
    expected = whole(IDS).logits
    checkpoint.save_adapter(tmp_path, model)
    torch.testing.assert_close(PeftModel.from_pretrained(tiny_llama(50), str(tmp_path))(IDS).logits, expected)
    with model.disable_adapter():
        rounded = model(IDS).logits
    assert (model(IDS).logits - expected).norm() < (rounded - expected).norm()
    steps(model)
    checkpoint.save_adapter(tmp_path, model)
    again = started_quantized("loftq", 4, use_dora=False, stored=lambda name: whole.get_parameter(name).detach())
    checkpoint.load_adapter(tmp_path, again)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_eva_starts_as_pefts_does() -> None:
    torch.manual_seed(0)
    rows = [Example(token_ids=torch.randint(3, 50, (n,)).tolist(), targets=((2, n),)) for n in (9, 14, 20, 31)]
    batches = lora_start.batches(iter(rows), rank=4, device=torch.device("cpu"))
    assert [batch["input_ids"].shape for batch in batches] == [(2, 14), (1, 20), (1, 31)]
    assert int((batches[0]["labels"] != -100).sum()) == 9 + 14 - 4
    model = adapter.attach(
        tiny_llama(50), r=4, alpha=6, dropout=0, targets=["all-linear"], seed=5, variant=Variant(init="eva")
    )
    lora_start.begin(model, "eva", batches=batches)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights="eva", task_type="CAUSAL_LM")
    config.eva_config = EvaConfig(rho=1.0)
    plain = get_peft_model(tiny_llama(50), config)
    initialize_lora_eva_weights(plain, batches, show_progress_bar=False)
    for name, layer in lora_start.adapted_layers(plain).items():
        own = lora_start.adapted_layers(model)[name]
        torch.testing.assert_close(own.lora_A["default"].weight, layer.lora_A["default"].weight)
        assert not own.lora_B["default"].weight.any()
    assert model.peft_config["default"].init_lora_weights is True
    with pytest.raises(ConfigError, match="fewer trained tokens than the rank 400"):
        lora_start.batches(iter(rows), rank=400, device=torch.device("cpu"))
