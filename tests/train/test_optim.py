"""Every optimizer is AdamW and can be put back from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from byeori.errors import CheckpointError
from byeori.train import optim


def test_adamw_first_step_by_hand() -> None:
    """m = g/10, v = g^2/1000, both corrected to g and g^2: the first step is lr * (sign(g) + decay * w)."""
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = optim.make("adamw", [weight], betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.01
    weight.grad = torch.tensor([-3.0], dtype=torch.float64)
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 - 0.01 * 0.1 * 2.0 + 0.01, rel=1e-8)


NAMES = ["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]
HOW: dict[str, Any] = {"betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1}


def start() -> list[torch.nn.Parameter]:
    """One tensor large enough for moments in 8 bit, one that is not."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (8, 8))]


def move(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_is_adamw(name: str) -> None:
    """8-bit moments round: their steps differ by some percent of a step, the others' by rounding."""
    found, expected = start(), start()
    move(optim.make(name, found, **HOW), found, range(6))
    move(torch.optim.AdamW(expected, lr=0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), expected, range(6))
    wide = start()
    for index, (mine, theirs, before) in enumerate(zip(found, expected, wide, strict=True)):
        step = float((theirs - before).detach().norm())
        limit = 0.05 if name.endswith("8bit") and index == 0 else 1e-5
        assert float((mine - theirs).detach().norm()) < limit * step


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_file(name: str, tmp_path: Path) -> None:
    whole = start()
    optimizer = optim.make(name, whole, **HOW)
    move(optimizer, whole, range(5))
    tensors = {f"{i}.{k}": t for i, p in enumerate(whole) for k, t in optim.tensors(optimizer, p).items()}
    save_file(tensors, tmp_path / "state.safetensors")
    again = [torch.nn.Parameter(parameter.detach().clone()) for parameter in whole]
    other = optim.make(name, again, **HOW)
    loaded = load_file(tmp_path / "state.safetensors")
    for index, parameter in enumerate(again):
        found = {key.partition(".")[2]: t for key, t in loaded.items() if key.startswith(f"{index}.")}
        optim.restore(other, parameter, index, found)
    move(optimizer, whole, range(5, 9))
    move(other, again, range(5, 9))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, whole, strict=True))


def test_one_kernels_step_count_is_put_back_where_it_is_read() -> None:
    """On a GPU one kernel takes the step, and reads its count there; here it is the CPU's, and its meta device."""
    whole = start()
    optimizer = torch.optim.AdamW(whole, lr=0, weight_decay=0.1, fused=True)
    move(optimizer, whole, range(5))
    state = [optim.tensors(optimizer, parameter) for parameter in whole]
    again = [torch.nn.Parameter(parameter.detach().clone()) for parameter in whole]
    other = torch.optim.AdamW(again, lr=0, weight_decay=0.1, fused=True)
    for index, parameter in enumerate(again):
        optim.restore(other, parameter, index, state[index])
    move(optimizer, whole, range(5, 9))
    move(other, again, range(5, 9))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, whole, strict=True))
    away = torch.nn.Parameter(whole[0].detach().to("meta"))
    for fused, device in ((True, "meta"), (False, "cpu")):
        holder = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=fused)
        optim.restore(holder, away, 0, state[0])
        assert holder.state[away]["step"].device.type == device


def test_another_optimizers_state_is_refused() -> None:
    parameters = start()
    optimizer = optim.make("adamw", parameters, **HOW)
    move(optimizer, parameters, range(1))
    state = optim.tensors(optimizer, parameters[0])
    with pytest.raises(CheckpointError, match="optimizer is not this run's; give the same --optim"):
        optim.restore(optim.make("adamw_8bit", parameters, **HOW), parameters[0], 0, state)


def test_a_note_says_that_paging_has_no_effect() -> None:
    cpu = torch.device("cpu")
    assert optim.paging_note("adamw_8bit", cpu) is None
    assert optim.paging_note("paged_adamw_32bit", torch.device("cuda")) is None
    assert optim.paging_note("paged_adamw_32bit", cpu) == (
        "--optim paged_adamw_32bit: CPU memory is not paged; the optimizer states stay in it"
    )
