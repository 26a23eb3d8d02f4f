"""Accelerations that fail on a machine are given up before the run begins, whatever they are and however they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from byeori.errors import ModelError
from byeori.kernels import (
    cpu_attention,
    cpu_tiles,
    forest_attention,
    gated_mlp,
    lora_linear,
    native,
    patch,
    qkv_rope,
    rms_norm,
)
from byeori.model import first_use, forward
from runs import log, sft

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


def adapted(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    model = zoo.tiny("llama", dtype)[0]
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
