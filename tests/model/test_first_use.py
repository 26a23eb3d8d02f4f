"""Accelerations that fail on a machine are given up before the run begins, whatever they are and however they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional

import zoo
from byeori.distributed import processes
from byeori.errors import ModelError
from byeori.kernels import (
    cpu_attention,
    cpu_tiles,
    dispatch,
    forest_attention,
    gated_mlp,
    lora_linear,
    native,
    patch,
    qkv_rope,
    rms_norm,
)
from byeori.kernels.quantized_linear import QuantizedLinear
from byeori.model import adapter, first_use, forward, load_streamed, wrap
from runs import log, sft

ALONE = processes.Processes(rank=0, world=1, device=torch.device("cpu"))
FAULTS: dict[str, tuple[Any, str]] = {
    "mlp": (gated_mlp, "_gated_backward"),
    "norms": (rms_norm, "fused_forward"),
    "heads": (qkv_rope, "fused_forward"),
    "lora": (lora_linear, "fused_forward"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "first_use"


def adapted(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> tuple[Any, Any]:
    model = zoo.tiny("llama", dtype)[0]
    for module in model.modules():
        if dropout and hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(dropout)
    base = model.get_base_model()
    assert forward.use_forest_attention(model)
    patch.fuse(base, list(patch.PARTS))
    return model, base


def everything(base: Any) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in base.state_dict().values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_works_is_kept_and_noted(dtype: torch.dtype, own_cache: Path) -> None:
    model, base = adapted(dtype)
    used, weights = patch.in_use(base), everything(base)
    assert set(used) == {*patch.PARTS, "lora"}
    assert not first_use.known_to_work(model)
    assert first_use.give_up_broken(model, zoo.tree()) == []
    assert patch.in_use(base) == used and first_use.known_to_work(model)
    assert all(map(torch.equal, weights, everything(base)))  # the adapters are as before
    assert json.loads(next(own_cache.iterdir()).read_text(encoding="utf-8")) == used
    patch.drop(base, ["mlp"])
    assert not first_use.known_to_work(model)  # another combination


@pytest.mark.parametrize("part", FAULTS)
@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_what_fails_is_given_up(part: str, fault: str, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """It raises what a driver raises, or computes something else."""
    module, name = FAULTS[part]
    right = getattr(module, name)

    def broken(*given: Any, **named: Any) -> Any:
        if fault == "raises":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
        result = right(*given, **named)
        first = result[0] if isinstance(result, tuple) else result
        return (first * 1.5, *result[1:]) if isinstance(result, tuple) else first * 1.5

    if name == "fused_forward":
        monkeypatch.setitem(patch._FORWARDS, part, broken)
    monkeypatch.setattr(module, name, broken)
    model, base = adapted()
    used = set(patch.in_use(base))
    (line,) = first_use.give_up_broken(model, zoo.tree())
    words = "no kernel image is available" if fault == "raises" else "gives other"
    assert f"({part}) " in line and words in line and "this run does without" in line
    assert part not in patch.in_use(base) and not list(own_cache.glob("*"))
    assert set(patch.in_use(base)) == used - {part} - ({"last_layer"} if part == "heads" else set())
    assert first_use.give_up_broken(model, zoo.tree()) == []  # and what is left works


@pytest.mark.parametrize("part", ["attention", "kernels", "last_layer"])
def test_a_switch_that_fails(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **named: Any) -> Any:
        raise OSError("undefined symbol")

    if part == "attention":
        monkeypatch.setattr(cpu_attention, "attend", broken)
        monkeypatch.setattr(cpu_tiles, "supports", lambda *given: False)
    elif part == "kernels":
        monkeypatch.setattr(native, "call", broken)
    model, base = adapted()
    if part == "last_layer":  # which is not used where its own probe fails
        monkeypatch.setattr(forest_attention, "of_rows", broken)
    used = set(patch.in_use(base))
    (line,) = first_use.give_up_broken(model, zoo.tree())
    assert f"({part}) fails here (undefined symbol)" in line
    assert set(patch.in_use(base)) == used - {part}


@pytest.mark.parametrize("kernel", dispatch.KERNELS)
@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_a_kernel_that_fails_is_given_up_alone(fault: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It, or the one of its backward pass; the other kernels stay."""
    right, spoiled = native.call, kernel if kernel in ("dropout", "online_softmax") else f"{kernel}_back"

    def call(name: str, *given: Any) -> None:
        if name == spoiled and fault == "raises":
            raise RuntimeError("CompilationError: at 12:8: tl.load")
        right(name, *given)
        if name == spoiled:
            written = [each for each in given if isinstance(each, torch.Tensor)]
            written[0 if name == "online_softmax" else -1].mul_(1.5)

    monkeypatch.setattr(native, "call", call)
    model, base = adapted(dropout=0.1)
    used = patch.in_use(base)
    (line,) = first_use.give_up_broken(model, zoo.tree())
    assert f"the fused kernel {kernel} (kernels.{kernel}) ".lower() in line.lower()
    assert ("CompilationError" if fault == "raises" else "other") in line
    assert patch.in_use(base) == used and base.byeori_switches.without == {kernel}
    assert first_use.give_up_broken(model, zoo.tree()) == []


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_dequantizing_that_fails(fault: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bitsandbytes; the written-out form takes its place, forward and backward."""
    zoo.KINDS["llama"]().save_pretrained(tmp_path)
    base = load_streamed.load_streamed(str(tmp_path), dtype=torch.float32, processes=ALONE, bits=bits)
    model = adapter.attach(base, r=3, alpha=5, dropout=0.1, targets=["q_proj", "v_proj"], seed=1)
    lora_linear.fuse(model)
    assert forward.use_forest_attention(model)
    assert any(isinstance(layer, QuantizedLinear) for layer in base.modules()) and "quantized" in patch.in_use(base)
    assert first_use.give_up_broken(model, zoo.tree()) == []
    name = "dequantize_4bit" if bits == 4 else "int8_vectorwise_dequant"
    right = getattr(functional, name)

    def broken(*given: Any) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("Error named symbol not found at line 90 in file ops.cu")
        return right(*given) * 1.5

    monkeypatch.setattr(functional, name, broken)
    (line,) = first_use.give_up_broken(model, zoo.tree())
    assert line.startswith("Dequantizing by bitsandbytes (quantized) ") and "several times as long" in line
    assert ("named symbol not found" if fault == "raises" else "gives other") in line
    assert "quantized" not in patch.in_use(base) and first_use.give_up_broken(model, zoo.tree()) == []


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_compiled_layers_that_fail(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler ends with an error, or what it made computes something else; the layers then run uncompiled."""
    model, base = adapted()

    def compiled(self: Any, **options: Any) -> None:
        def call(*given: Any, **named: Any) -> Any:
            if fault == "raises":
                raise RuntimeError("InductorError: CalledProcessError: g++ returned non-zero exit status 1")
            return 1.5 * self._call_impl(*given, **named)

        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    assert wrap.compile_layers(base) == 2 and "compile" in patch.in_use(base)
    (line,) = first_use.give_up_broken(model, zoo.tree())
    assert line.startswith("Compiled layers (compile) ") and "steps take about a fifth longer" in line
    assert ("InductorError" if fault == "raises" else "gives other") in line
    assert "compile" not in patch.in_use(base) and first_use.give_up_broken(model, zoo.tree()) == []


def test_the_plain_form_keeps_no_more_than_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all layers at once it would be more than a step needs (0.5 GiB of Gemma 3 270M); the fast form is as ever."""
    right, seen = first_use.compute, list[set[bool]]()

    def compute(model: Any, *given: Any, **named: Any) -> Any:
        seen.append({layer.gradient_checkpointing for layer in wrap.layers(model.get_base_model())})
        return right(model, *given, **named)

    monkeypatch.setattr(first_use, "compute", compute)
    model, base = adapted()
    assert first_use.give_up_broken(model, zoo.tree()) == []
    assert seen == [{True}, {False}]
    wrap.recompute_layers(base, "selective")
    before = [dict(vars(layer)) for layer in wrap.layers(base)]
    with wrap.recomputed(base):
        assert all(layer.gradient_checkpointing for layer in wrap.layers(base))
    assert [dict(vars(layer)) for layer in wrap.layers(base)] == before


def test_layers_are_tried_as_they_train() -> None:
    """Recomputed and in training, or they would be compiled once more for it, but without anything random."""
    model, base = adapted(dropout=0.1)
    wrap.recompute_layers(base, "full")
    passes, drops = [], [module for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.p]
    layer = wrap.layers(base)[0]
    layer.mlp.register_forward_pre_hook(lambda module, _: passes.append(module.training))
    first = first_use.compute(model, [zoo.tree()], plain=False)
    assert passes == [True, True]  # the second time for the backward pass
    again = first_use.compute(model, [zoo.tree()], plain=False)
    assert drops and torch.equal(first.logprobs, again.logprobs)


def test_a_run_goes_on_without(
    tiny_model: Path,
    title_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sft(tiny_model, title_rows, tmp_path / "whole", max_steps=2, speed="attention,kernels,norms,heads,last_layer")
    right = gated_mlp._gated_backward
    monkeypatch.setattr(gated_mlp, "_gated_backward", lambda *given: [2 * grad for grad in right(*given)])
    capsys.readouterr()
    sft(tiny_model, title_rows, tmp_path / "out", max_steps=2)
    told = capsys.readouterr().err
    assert told.count("Fused feed-forward layers (mlp) gives other gradients here") == 1
    first, second = ([line["loss"] for line in log(tmp_path / name)] for name in ("whole", "out"))
    assert first == pytest.approx(second, rel=1e-5)


def test_a_wrong_plain_form_ends_the_run(
    tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = forward.plain_logprobs
    monkeypatch.setattr(forward, "plain_logprobs", lambda *given: right(*given) - 3)
    with pytest.raises(ModelError, match="byeori's log-probs differ from those of this model's own forward pass"):
        sft(tiny_model, title_rows, tmp_path / "out", max_steps=1)
