"""A rehearsal of what will run: every setting and every GPU that changes a step's memory changes the rehearsal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import zoo
from byeori import config
from byeori.commands import plan
from byeori.data.tokenize import Example
from byeori.kernels import last_layer, patch
from byeori.losses.sft import SFT
from byeori.model import activation_offload, forward, quantize, skeleton, wrap
from byeori.plan import candidates, machines, measured_step, meta_quantized, rehearsal
from byeori.plan.machines import GIB, Machine
from byeori.plan.rehearsal import Adapter
from byeori.train import optim
from shrunk import shrunk

ALL = Adapter(r=3, alpha=5, dropout=0.0, targets=("all-linear",))
HEADER = [5] * 40
ROWS = [Example(token_ids=[*HEADER, *[6 + at] * 8], targets=((40, 48),)) for at in range(4)]
MIB = 2**20


def _llama(**changes: Any) -> Any:
    return AutoConfig.for_model(
        "llama",
        **{"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2}
        | {"intermediate_size": 512, "vocab_size": 1000, "head_dim": 32, "max_position_embeddings": 4096}
        | changes,
    )


def _rehearsed(model: Any, examples: list[Example], **how: Any) -> rehearsal.Rehearsal:
    how = {"dtype": torch.bfloat16} | how
    return rehearsal.rehearse(rehearsal.architecture(model), ALL, examples, **how)


def _long(length: int = 1024) -> list[Example]:
    return [Example(token_ids=[7] * length, targets=((length - 16, length),))]


def test_prefixes_that_are_not_shared_are_rehearsed_one_by_one() -> None:
    how: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    shared, alone = (_rehearsed(_llama(), ROWS, share=share, **how) for share in (True, False))
    assert (shared.tokens, alone.tokens) == (40 + 4 * 7, 4 * 47)
    fast_paths = patch.parts(["auto"], torch.device("cpu"))
    model = rehearsal.build(_llama(), ALL, torch.float32, device="cpu", fast_paths=fast_paths)
    forward.use_forest_attention(model)
    real = measured_step.run(model, measured_step.make_optimizer(model), ROWS, objective=SFT, ends=(1, 1), share=False)
    assert alone.peak == pytest.approx(max(peak.total for peak in real.peaks.values()), rel=0.02)


def test_the_setting_reaches_the_rehearsal(tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"document": "a " * 60, "title": f"{at} b"}) for at in range(8)]
    rows.write_text("\n".join(lines), encoding="utf-8")
    how = {"base_model": str(tiny_model), "data_path": str(rows), "gpu": "L4", "micro_batch_size": 8, "num_epochs": 1}
    on, off = (plan.plan(config.check(config.PlanSettings, how | {"share_prefixes": share})) for share in ("on", "off"))
    assert on is not None and off is not None
    assert off.workload.tokens > 3 * on.workload.tokens
    assert off.best and on.best and off.best.parts["activations"] > 3 * on.best.parts["activations"]


def test_without_flash_attention_scores_are_written_out() -> None:
    """On a T4, with fewer heads for keys than for queries: in float32, and kept for the backward pass."""
    flash, old = (_rehearsed(_llama(), _long(), dtype=torch.float16, capability=each) for each in (8.0, 7.5))
    scores = 8 * 1024 * 1024 * 4
    assert old.peak - flash.peak > 3 * scores  # one in every layer at least
    many = _llama(num_key_value_heads=8)
    flash, old = (_rehearsed(many, _long(), dtype=torch.float16, capability=each) for each in (8.0, 7.5))
    assert old.peak - flash.peak < scores  # the memory-efficient kernel needs no Ampere, but as many heads for keys


@pytest.mark.parametrize(("head", "written_out"), [(128, False), (256, False), (512, True)])
def test_heads_that_fit_no_fused_kernel_are_written_out(head: int, written_out: bool) -> None:
    found, small = (_rehearsed(_llama(head_dim=head), _long(length)) for length in (1024, 512))
    held = sum(found.resident.values())
    grows_with_the_square = (found.peak - held) - 2 * (small.peak - held)
    assert (grows_with_the_square > 8 * 1024 * 1024 * 4) == written_out


def test_the_machine_decides_what_is_rehearsed() -> None:
    old, new = (Machine(name="GPU", device="cuda", memory=GIB, workspace=0, capability=each) for each in (7.5, 8.0))
    assert (old.kind, new.kind) == (machines.OLD_CUDA, "cuda")
    how: dict[str, Any] = {"shape": "hidden_size=256 num_hidden_layers=4 num_attention_heads=8 num_key_value_heads=2"}
    how["shape"] += " intermediate_size=512 vocab_size=1000"
    result = plan.plan(config.check(config.PlanSettings, how | {"gpu": "T4, L4", "micro_batch_size": 1}))
    assert result is not None
    t4, l4 = (next(c for c in result.candidates if c.machine.name == name) for name in ("T4", "L4"))
    assert t4.parts["activations"] > 2 * l4.parts["activations"]


@pytest.mark.parametrize("kind", ["llama", "gemma4_text"])
def test_the_last_layer_is_pruned_where_a_run_would_prune_it(kind: str) -> None:
    """Gemma 4 hands its layers more than hidden states, so a run declines."""
    own = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    own |= {"intermediate_size": 64, "vocab_size": 100}
    more = {"layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": 100}
    model = AutoConfig.for_model(kind, **own | (more if kind == "gemma4_text" else {}))
    real = rehearsal.build(model, ALL, torch.float32, device="cpu", fast_paths=("norms", "mlp", "heads", "last_layer"))
    pruned = last_layer.is_pruned(skeleton.layers_of(real)[-1])
    assert rehearsal.architecture(model).prunes == pruned == (kind == "llama")


def test_trained_prompts_without_rows() -> None:
    how = {"shape": "hidden_size=256 num_hidden_layers=2 num_attention_heads=4 intermediate_size=512 vocab_size=64000"}
    found = [
        plan.plan(
            config.check(config.PlanSettings, how | {"gpu": "L4", "micro_batch_size": 8, "train_on_inputs": each})
        )
        for each in (False, True)
    ]
    answers, everything = (each.candidates[0] for each in found if each)
    assert everything.parts["activations"] > 1.3 * answers.parts["activations"]  # the last layer at every row
    assert found[1] and "all of it trained" in found[1].workload.source


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, ("awq", 16)),
        ({"quant_method": "gptq", "bits": 8}, ("gptq", 16)),
        ({"quant_method": "mxfp4"}, ("mxfp4", 16)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8", 16)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("bitsandbytes", 4)),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
         ("compressed-tensors", 16)),
        (None, None),
    ],
)  # fmt: skip
def test_weights_that_are_stored_quantized(stored: dict[str, Any] | None, found: tuple[str, int] | None) -> None:
    model = _llama(**({"quantization_config": stored} if stored else {}))
    assert quantize.stored(model) == found


def test_a_plan_for_stored_quantized_weights_says_so(tmp_path: Path) -> None:
    model = _llama(quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True})
    (tmp_path / "config.json").write_text(model.to_json_string(), encoding="utf-8")
    result = plan.plan(config.check(config.PlanSettings, {"base_model": str(tmp_path), "gpu": "L4"}))
    assert result is not None and result.best is not None
    assert "the weights are stored quantized (awq); a run opens them to 16 bit when it loads them" in result.notes
    assert result.best.parts["weights"] >= 2 * result.weights and not result.best.settings["load_in_4bit"]
    four_bit = {"base_model": str(tmp_path), "gpu": "L4", "load_in_4bit": True}
    result = plan.plan(config.check(config.PlanSettings, four_bit))
    assert result is not None and result.best is not None
    assert any(note.endswith("when it loads them, then held in 4 bit") for note in result.notes)
    assert result.best.parts["weights"] < 0.7 * 2 * result.weights


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_of_a_quantized_layer_are_those_of_bitsandbytes(bits: int) -> None:
    real = quantize.QuantizedLinear(torch.nn.Linear(192, 320, bias=False, dtype=torch.bfloat16), bits)
    real.weight = torch.nn.Parameter(real.quantize(torch.randn(320, 192, dtype=torch.bfloat16)), requires_grad=False)
    planned = meta_quantized.MetaQuantizedLinear(torch.nn.Linear(192, 320, bias=False, dtype=torch.bfloat16), bits)
    held = [sum(t.nbytes for t in (m.weight, *m.buffers())) for m in (real, planned)]
    assert held[0] == held[1]
    assert planned.dequantize(planned.weight.to("meta")).shape == (320, 192)


def test_8_bit_is_between_16_and_4() -> None:
    weights = [_rehearsed(_llama(), _long(64), bits=bits).resident["weights"] for bits in (None, 8, 4)]
    assert weights[0] > weights[1] > weights[2]
    linear = 3 * (256 * 256 * 2 + 256 * 64 * 2 + 3 * 256 * 512)
    assert weights[0] - weights[1] == pytest.approx(linear, rel=0.02)  # less a scale for each row


@pytest.mark.parametrize("name", config.choices(config.SftSettings.model_fields["optim"].annotation))
def test_states_of_every_optimizer_are_those_of_the_real_one(name: str) -> None:
    how: dict[str, Any] = {"betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.0, "momentum": 0.9}
    sizes = [(100,), (4096,), (70_001,), (64, 70)]
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    real = optim.make(name, parameters, **how)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    real.step()
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes])
    planned = measured_step.make_optimizer(model, name, 0.9)

    def held(optimizer: torch.optim.Optimizer) -> int:
        states = [value for state in optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in states if isinstance(value, torch.Tensor))

    assert held(planned) == held(real)


def test_offloaded_checkpoints() -> None:
    model, rows = _llama(num_hidden_layers=12), _long(4096)
    full, offload = (_rehearsed(model, rows, recompute=kind) for kind in ("full", "offload"))
    inputs = 4096 * 256 * 2
    assert offload.offloaded == pytest.approx(12 * inputs, rel=0.01)
    assert (
        full.peak - offload.peak > 7 * inputs
    )  # all but the two on their way, and what the peak's segment held anyway
    assert offload.parts["weights"] == full.parts["weights"]
    whole = _rehearsed(model, rows, recompute="offload", every_layer=True)
    assert (whole.peak, whole.offloaded) == (pytest.approx(offload.peak, rel=0.01), offload.offloaded)


def test_a_rehearsed_offload_keeps_as_much_as_a_real_one() -> None:
    """On a CPU with a link that keeps copies out of the count, as a GPU's would be in another memory."""

    class Elsewhere(activation_offload.Link):
        def accepts(self, tensor: torch.Tensor) -> bool:
            return not isinstance(tensor, torch.nn.Parameter) and tensor.nbytes >= activation_offload.LEAST

        def empty_like(self, like: torch.Tensor) -> torch.Tensor:
            return torch.empty((), dtype=like.dtype).expand(like.shape)

        def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
            return None

        def wait(self, copied: Any) -> None:
            pass

    model, rows = _llama(num_hidden_layers=6), _long(2048)
    planned = _rehearsed(model, rows, recompute="offload", dtype=torch.float32, device="cpu", every_layer=True)
    fast_paths = patch.parts(["auto"], torch.device("cpu"))
    real = rehearsal.build(model, ALL, torch.float32, device="cpu", fast_paths=fast_paths)
    forward.use_forest_attention(real)
    wrap.recompute_layers(real.get_base_model(), "offload", Elsewhere())
    step = measured_step.run(real, measured_step.make_optimizer(real), rows, objective=SFT, ends=(1, 1))
    assert planned.peak == pytest.approx(max(peak.total for peak in step.peaks.values()), rel=0.01)


def test_offload_is_recommended_before_4_bit() -> None:
    """A long row: its checkpoints are what does not fit."""
    how = {
        "shape": "hidden_size=2048 num_hidden_layers=40 num_attention_heads=16 intermediate_size=4096 vocab_size=1000"
    }
    how["shape"] += " max_position_embeddings=131072"
    more: dict[str, Any] = {"cutoff_len": 50_000, "micro_batch_size": 1, "batch_size": 1, "gpu": "T4, L4"}
    result = plan.plan(config.check(config.PlanSettings, how | more))
    assert result is not None
    labels = {c.label: c.fits for c in result.candidates if c.count == 1}
    assert labels.get("offloaded checkpoints, micro-batch 1"), labels


def test_sharded_weights_in_the_cpus_memory() -> None:
    found = _rehearsed(_llama(num_hidden_layers=40, hidden_size=1024, head_dim=128), _long(64))
    gpu, table = Machine(name="GPU", device="cuda", memory=GIB, workspace=0), machines.read()
    here, away = (candidates.memory(found, table, gpu, 8, cpu_offload=each) for each in (False, True))
    assert here["weights"] - away["weights"] == found.parts["weights"] // 8
    result = plan.plan(
        config.check(
            config.PlanSettings,
            {"base_model": "examples/plan/Qwen1.5-72B", "gpu": "L40S", "load_in_4bit": False, "cutoff_len": 512}
            | {"micro_batch_size": 1, "cpu_offload": True, "parallel": "fsdp", "gradient_checkpointing": "full"},
        )
    )
    assert (
        result is not None and result.best is not None and result.best.count == 2
    )  # 34 GiB a card do not fit otherwise


def test_the_zoo_prunes_in_a_rehearsal_as_it_does_in_a_run() -> None:
    for kind in ("qwen3", "gemma3", "mixtral", "phi", "gpt2"):
        model = zoo.ALL[kind]().config
        adapter = Adapter(r=2, alpha=2, dropout=0.0, targets=tuple(zoo.TARGETS.get(kind, ["all-linear"])))
        real = rehearsal.build(model, adapter, torch.float32, device="cpu", fast_paths=("norms", "heads", "last_layer"))
        if last_layer.is_pruned(skeleton.layers_of(real)[-1]):
            assert rehearsal.architecture(model).prunes


@pytest.mark.parametrize("kind", ["gemma3n_text", "glm5_next"])
def test_code_that_writes_in_place_or_selects_by_a_mask(kind: str) -> None:
    """Gemma 3n scales a projection in place; GLM 5's indexer takes what a mask selects, which counts as all of it."""
    model = shrunk(skeleton.config_of([f"model_type={kind}"]))
    assert _rehearsed(model, _long(64)).flops > 0
