"""Every optimizer takes the steps of its name, and can be put back from a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from byeori.config import SftSettings
from byeori.config.base import check, choices
from byeori.errors import CheckpointError, ConfigError
from byeori.train import optim


def test_adamw_first_step_by_hand() -> None:
    """m = g/10, v = g^2/1000, both corrected to g and g^2: the first step is lr * (sign(g) + decay * w)."""
    weight = torch.nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    optimizer = optim.make("adamw", [weight], betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.01
    weight.grad = torch.tensor([[-3.0]], dtype=torch.float64)
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 - 0.01 * 0.1 * 2.0 + 0.01, rel=1e-8)


ADAMW = ["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]
NAMES = choices(SftSettings.model_fields["optim"].annotation)
NEEDED = {"base_model": "m", "data_path": "d", "output_dir": "o"}
HOW: dict[str, Any] = {"betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1, "momentum": 0.9}


def start() -> list[torch.nn.Parameter]:
    """One tensor large enough for moments in 8 bit, one that is not, and a vector, which does not decay."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (8, 8), (8,))]


def move(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()


@pytest.mark.parametrize("name", ADAMW)
def test_adamw_by_every_name(name: str) -> None:
    """8-bit moments round: their steps differ by some percent of a step, the others' by rounding."""
    found, expected = start(), start()
    move(optim.make(name, found, **HOW), found, range(6))
    groups = [{"params": expected[:2]}, {"params": expected[2:], "weight_decay": 0}]
    move(torch.optim.AdamW(groups, lr=0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), expected, range(6))
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
        optim.restore(other, parameter, found)
    move(optimizer, whole, range(5, 9))
    move(other, again, range(5, 9))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, whole, strict=True))
    with optim.averaged(optimizer), optim.averaged(other):
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
        optim.restore(other, parameter, state[index])
    move(optimizer, whole, range(5, 9))
    move(other, again, range(5, 9))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, whole, strict=True))
    away = torch.nn.Parameter(whole[0].detach().to("meta"))
    for fused, device in ((True, "meta"), (False, "cpu")):
        holder = torch.optim.AdamW([away], fused=fused)
        optim.restore(holder, away, state[0])
        assert holder.state[away]["step"].device.type == device


def test_another_optimizers_state_is_refused() -> None:
    parameters = start()
    optimizer = optim.make("adamw", parameters, **HOW)
    move(optimizer, parameters, range(1))
    state = optim.tensors(optimizer, parameters[0])
    with pytest.raises(CheckpointError, match="optimizer is not this run's; give the same --optim"):
        optim.restore(optim.make("adamw_8bit", parameters, **HOW), parameters[0], state)


def test_a_note_says_that_paging_has_no_effect() -> None:
    cpu = torch.device("cpu")
    assert optim.paging_note("adamw_8bit", cpu) is None
    assert optim.paging_note("paged_adamw_32bit", torch.device("cuda")) is None
    assert optim.paging_note("paged_adamw_32bit", cpu) == (
        "--optim paged_adamw_32bit: CPU memory is not paged; the optimizer states stay in it"
    )


def one_step(name: str, weight: torch.Tensor, gradient: torch.Tensor, **how: Any) -> torch.Tensor:
    """What a parameter is after its first step of a rate of 0.1, with the weights to use at the end."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = optim.make(name, [parameter], **HOW | {"weight_decay": 0.0} | how)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    parameter.grad = gradient.clone()
    optimizer.step()
    with optim.averaged(optimizer):
        return parameter.detach().clone()


def test_first_steps_by_hand() -> None:
    weight, gradient = torch.tensor([[2.0, -1.0]]), torch.tensor([[-3.0, 0.5]])
    assert one_step("lion", weight, gradient).tolist()[0] == pytest.approx([2.1, -1.1])
    assert one_step("sgd", weight, gradient).tolist()[0] == pytest.approx([2.3, -1.05])
    # the average after one step is that step alone
    assert one_step("schedule_free_sgd", weight, gradient).tolist()[0] == pytest.approx([2.3, -1.05])
    assert one_step("schedule_free_adamw", weight, gradient).tolist()[0] == pytest.approx([2.1, -1.1])
    # Adafactor: rate times the weights' root mean square, g / sqrt(row x column / mean) with an RMS of at most 1
    size = math.sqrt((4 + 1) / 2)
    assert one_step("adafactor", weight, gradient).tolist()[0] == pytest.approx([2 + 0.1 * size, -1 - 0.1 * size])


def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adamw() -> None:
    """U V^T of the gradient, of the size of AdamW's step: 0.2 sqrt(48); five Newton-Schulz steps come near it."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.zeros(32, 48), torch.randn(32, 48, generator=generator)
    step = -one_step("muon", weight, gradient) / (0.1 * 0.2 * math.sqrt(48))
    sizes = torch.linalg.svdvals(step)
    assert float(sizes.min()) > 0.6 and float(sizes.max()) < 1.3
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    assert float((step * (u @ v)).sum() / step.norm() / (u @ v).norm()) > 0.97
    parameters, plain = start(), start()
    optimizer = optim.make("muon", parameters, **HOW, apart={id(parameters[1])})
    move(optimizer, parameters, range(3))
    groups = [{"params": plain[1:2]}, {"params": plain[2:], "weight_decay": 0}]
    move(torch.optim.AdamW(groups, lr=0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), plain, range(3))
    assert not torch.equal(parameters[0], plain[0])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(parameters[1:], plain[1:], strict=True))


def test_the_average_is_the_mean_of_the_steps_and_what_is_trained_keeps_its_bits() -> None:
    """Schedule-free SGD with a constant rate: x is the mean of z_1 .. z_t, and y = 0.9 x + 0.1 z."""
    (parameter, *_) = parameters = start()
    optimizer = optim.make("schedule_free_sgd", parameters, **HOW | {"weight_decay": 0.0})
    z, x = parameter.detach().double().clone(), parameter.detach().double().clone()
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        for each in parameters:
            each.grad = torch.full_like(each, step + 1.0)
        optimizer.step()
        z -= 0.01 * (step + 1.0)
        x += (z - x) / (step + 1)
    assert torch.allclose(parameter.double(), 0.9 * x + 0.1 * z, atol=1e-6)
    before = parameter.detach().clone()
    with optim.averaged(optimizer):
        assert torch.allclose(parameter.double(), x, atol=1e-6)
    assert torch.equal(parameter, before)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"optim": "adamw", "momentum": 0.9}, "momentum does not apply to optim adamw"),
        ({"optim": "lion", "adam_epsilon": 1e-6}, "adam_epsilon does not apply to optim lion"),
        ({"optim": "adafactor", "adam_beta2": 0.95}, "adam_beta2 does not apply to optim adafactor"),
        ({"optim": "schedule_free_sgd", "lr_scheduler": "cosine"}, "schedule_free_sgd needs no lr_scheduler"),
    ],
)
def test_settings_without_effect_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(SftSettings, NEEDED | given)


def test_names_of_other_trainers_and_defaults_of_each_optimizer() -> None:
    named = {"adamw_torch": "adamw", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw": "paged_adamw_32bit"}
    assert {name: check(SftSettings, NEEDED | {"optim": name}).optim for name in named} == named
    muon, lion, free = (check(SftSettings, NEEDED | {"optim": name}) for name in ("muon", "lion", "schedule_free_sgd"))
    assert (muon.momentum_or_default, muon.betas, lion.betas) == (0.95, (0.9, 0.999), (0.9, 0.99))
    assert (free.momentum_or_default, free.lr_scheduler) == (0.9, "constant")
