"""A rehearsal against the same step on real tensors, and two heights against the whole model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import zoo
from byeori.data.tokenize import Example
from byeori.errors import ConfigError, ModelError
from byeori.kernels import patch
from byeori.losses.base import Objective
from byeori.losses.preference import Preference, preference
from byeori.losses.sft import SFT
from byeori.model import forward, quantize, skeleton
from byeori.model.adapter import Variant
from byeori.plan import measured_step, meta_quantized, rehearsal
from byeori.plan.rehearsal import Adapter

DPO = preference(Preference(loss="sigmoid", beta=0.1))
CPU = torch.device("cpu")


def _adapter(kind: str, dropout: float = 0.0) -> Adapter:
    return Adapter(r=3, alpha=5, dropout=dropout, targets=tuple(zoo.TARGETS.get(kind, ["all-linear"])))


def _config(kind: str, **changes: Any) -> Any:
    config = zoo.ALL[kind]().config
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _rows(*lengths: int) -> list[Example]:
    return [Example(token_ids=[at + 3] * n, targets=((n - n // 4, n),)) for at, n in enumerate(lengths)]


def _pair(length: int) -> list[Example]:
    ids = [[5] * (length - 8) + [6 + side] * 8 for side in range(2)]
    return [Example(token_ids=each, targets=((length - 8, length),)) for each in ids]


def _measured(
    config: Any, adapter: Adapter, rows: list[Example], objective: Objective, **how: Any
) -> measured_step.Step:
    accumulates = how.pop("accumulates", False)
    fast_paths = patch.parts(how.pop("speed", ["auto"]), CPU)
    model = rehearsal.build(config, adapter, torch.float32, fast_paths=fast_paths, device="cpu", **how)
    one_sequence = not forward.use_forest_attention(model)
    optimizer = measured_step.make_optimizer(model)
    return measured_step.run(
        model, optimizer, rows, objective=objective, ends=(1, 1), accumulates=accumulates, one_sequence=one_sequence
    )


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gemma2", "gpt2", "mistral", "phi", "cohere", "mamba"])
def test_a_rehearsal_matches_the_real_step(kind: str, recompute: str) -> None:
    rows = _rows(60) if kind in zoo.STATEFUL else zoo.tree()
    config = _config(kind)
    architecture = rehearsal.architecture(config)
    found = rehearsal.rehearse(
        architecture, _adapter(kind), rows, dtype=torch.float32, recompute=recompute, device="cpu"
    )
    real = _measured(config, _adapter(kind), rows, SFT, recompute=recompute)
    peak = max(each.total for each in real.peaks.values())
    assert found.peak == pytest.approx(peak, rel=0.01)  # a few tables of indices, in a model of 10 kB
    assert found.flops == real.flops


@pytest.mark.parametrize(
    "variant",
    [Variant(use_dora=True), Variant(init="pissa", rank_pattern=(("q_proj", 5),)), Variant(layers_to_transform=(1,))],
    ids=["dora", "pissa", "layers"],
)
def test_variants_of_the_adapter(variant: Variant) -> None:
    """What a start adds to the weights, and DoRA's lengths, are in the plan."""
    config = _config("llama")
    adapter = replace(_adapter("llama"), variant=variant)
    found = rehearsal.rehearse(rehearsal.architecture(config), adapter, zoo.tree(), dtype=torch.float32, device="cpu")
    real = _measured(config, adapter, zoo.tree(), SFT)
    assert found.peak == pytest.approx(max(each.total for each in real.peaks.values()), rel=0.01)
    assert found.resident == real.resident
    assert found.flops == real.flops
    plain = rehearsal.rehearse(
        rehearsal.architecture(config), _adapter("llama"), zoo.tree(), dtype=torch.float32, device="cpu"
    )
    more = found.resident["weights"] - plain.resident["weights"]
    assert (more > 0) == (variant.init == "pissa")
    assert (found.resident["adapters"] < plain.resident["adapters"]) == bool(variant.layers_to_transform)


@pytest.mark.parametrize("bits", [4, 8])
def test_experts_in_few_bits(bits: int) -> None:
    """What a mixture's step needs less than in float32: as much as one whose weights are really quantized."""
    config, adapter, speed = _config("mixtral"), _adapter("mixtral"), ["norms"]  # the last layer as it is
    found, plain = (
        rehearsal.rehearse(
            rehearsal.architecture(config),
            adapter,
            zoo.tree(),
            dtype=torch.float32,
            bits=each,
            device="cpu",
            speed=speed,
        )
        for each in (bits, None)
    )
    real, real_plain = (
        _measured(config, adapter, zoo.tree(), SFT, bits=each, speed=speed, quantize_layers=quantize.quantize_loaded)
        for each in (bits, None)
    )
    peaks = [max(each.total for each in step.peaks.values()) for step in (real, real_plain)]
    assert found.resident["weights"] == real.resident["weights"]
    assert found.peak - plain.peak == pytest.approx(peaks[0] - peaks[1], rel=0.02)
    experts = [parameter.numel() for name, parameter in zoo.ALL["mixtral"]().named_parameters() if "experts" in name]
    assert found.quantized > sum(experts) > 0
    assert found.resident["weights"] < plain.resident["weights"] - 2 * sum(experts)


@pytest.mark.parametrize("target", ["layers.9.self_attn.q_proj", r".*layers\.(0|15)\..*q_proj"])
def test_layers_that_are_adapted_by_their_numbers(target: str) -> None:
    """Lower models than the whole do not have them, or have them twice."""
    architecture = rehearsal.architecture(_config("llama", num_hidden_layers=16))
    adapter = replace(_adapter("llama"), targets=(target,))
    found, whole = (
        rehearsal.rehearse(architecture, adapter, _rows(40), dtype=torch.float32, device="cpu", every_layer=every_layer)
        for every_layer in (False, True)
    )
    assert found == whole


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("objective", [SFT, DPO])
def test_both_objectives(objective: Objective, accumulates: bool, dropout: float) -> None:
    config, rows = _config("llama"), _pair(48) if objective is DPO else _rows(40, 21)
    adapter = _adapter("llama", dropout)
    found = rehearsal.rehearse(
        rehearsal.architecture(config),
        adapter,
        rows,
        dtype=torch.float32,
        objective=objective,
        device="cpu",
        accumulates=accumulates,
    )
    real = _measured(config, adapter, rows, objective, accumulates=accumulates)
    name = max(real.peaks, key=lambda key: real.peaks[key].total)
    assert found.peak == pytest.approx(real.peaks[name].total, rel=0.01)
    assert sum(found.parts.values()) == found.peak
    assert found.resident == real.resident


KINDS = ["llama", "gemma3", "gpt2"]
CHANGES = [{}, {"recompute": "full"}, {"recompute": "selective"}, {"bits": 4}, {"accumulates": True}]
DEVICES = ["cpu", "cuda"]


@pytest.mark.parametrize(
    ("kind", "how", "device"),
    [  # `make test` runs a sixth of them, with each kind, change and device among them
        pytest.param(kind, how, device, marks=[pytest.mark.slow] * ((i + 2 * j + 3 * k) % 6 > 0))
        for i, kind in enumerate(KINDS)
        for j, how in enumerate(CHANGES)
        for k, device in enumerate(DEVICES)
    ],
)
def test_two_heights_give_the_whole_model(kind: str, how: dict[str, Any], device: str) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 14}
    if kind == "gemma3":
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 7
    architecture = rehearsal.architecture(_config(kind, **changes))
    assert (architecture.layers, architecture.period) == (14, 2 if kind == "gemma3" else 1)
    rows: dict[str, Any] = {"dtype": torch.float32, "device": device, "explain": True, **how}
    few = rehearsal.rehearse(architecture, _adapter(kind), zoo.tree(), **rows)
    whole = rehearsal.rehearse(architecture, _adapter(kind), zoo.tree(), every_layer=True, **rows)
    for name in (
        "segment",
        "flops",
        "forward_flops",
        "tokens",
        "resident",
        "layer",
        "outside",
        "quantized",
    ):
        assert getattr(few, name) == getattr(whole, name), name
    slack = 2 * 512 if device == "cuda" else 0  # a list of norms, one for each matrix, is rounded up to blocks
    assert few.peak == pytest.approx(whole.peak, abs=slack)
    assert few.parts == pytest.approx(whole.parts, abs=slack)
    assert sum(size for size, _ in few.sources.values()) == few.peak


def test_the_parts_worked_out_by_hand() -> None:
    config = _config("llama", tie_word_embeddings=False)
    architecture = rehearsal.architecture(config)
    found = rehearsal.rehearse(
        architecture, _adapter("llama"), _rows(20), dtype=torch.float32, device="cpu", accumulates=True
    )
    # 16 wide, 40 words, heads of 4 (4 for queries, 2 for keys), 24 inside the feed-forward layer, 2 layers
    attention, feed = 16 * 16 * 2 + 16 * 8 * 2, 3 * 16 * 24
    assert architecture.weight_count == 2 * (attention + feed + 2 * 16) + 16 + 2 * 40 * 16
    adapters = 2 * 3 * ((16 + 16) * 2 + (16 + 8) * 2 + (16 + 24) * 3)
    assert found.parts["adapters"] == found.parts["gradients"] == 4 * adapters
    assert found.parts["optimizer"] == 2 * 4 * adapters + 4 * 2 * 2 * 7  # and a step count for each matrix


def test_bytes_of_a_4_bit_layer() -> None:
    layer = meta_quantized.MetaQuantizedLinear(torch.nn.Linear(96, 1024, bias=False), 4)
    numbers = 96 * 1024
    assert layer.weight.nbytes == numbers // 2
    assert layer.scales.nbytes == numbers // 64
    assert layer.scale_scales.nbytes == 4 * numbers // 64 // 256


def test_experts_in_bfloat16() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    config = _config("mixtral", **sizes)
    found = rehearsal.rehearse(rehearsal.architecture(config), _adapter("mixtral"), _rows(32), dtype=torch.bfloat16)
    experts = 3 * 2 * 32 * 64 * 2 * 2 * 31  # two of the experts for every token, in both layers
    assert found.flops > experts


def test_a_model_whose_code_needs_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs(*args: Any, **kwargs: Any) -> Any:
        return torch.empty(1, device="meta").item()

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", needs)
    with pytest.raises(ModelError, match="the model type llama cannot be rehearsed without numbers"):
        rehearsal.rehearse(rehearsal.architecture(_config("llama")), _adapter("llama"), _rows(16), dtype=torch.float32)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("kind", zoo.HYBRIDS)
def test_layers_with_states(kind: str, recompute: str) -> None:
    """A prefix of 40 tokens with three branches: the layers run node by node in the rehearsal as they will in a run."""
    rows = [Example(token_ids=[5] * 40 + [6 + at] * (9 + at), targets=((44, 48),)) for at in range(3)]
    config = _config(kind)
    how: dict[str, Any] = {"dtype": torch.float32, "recompute": recompute, "device": "cpu"}
    found = rehearsal.rehearse(rehearsal.architecture(config), _adapter(kind), rows, **how)
    real = _measured(config, _adapter(kind), rows, SFT, recompute=recompute)
    assert found.peak == pytest.approx(max(each.total for each in real.peaks.values()), rel=0.01)
    assert found.flops == real.flops
    assert found.tokens == 40 + 3 * 7


def test_a_config_of_no_model() -> None:
    with pytest.raises(ModelError, match="no model can be made of this llama config"):
        rehearsal.architecture(_config("llama", hidden_act="no_such_thing"))


def test_a_shape_by_the_names_of_config_json() -> None:
    """Qwen3-30B-A3B's file has num_experts and head_dim, which its class keeps under another name and not at all."""
    config = skeleton.config_of(["model_type=qwen3_moe", "num_experts=16", "head_dim=64"])
    assert (config.num_local_experts, config.head_dim) == (16, 64)
    with pytest.raises(ConfigError, match="a qwen3_moe config has no num_expert"):
        skeleton.config_of(["model_type=qwen3_moe", "num_expert=16"])
