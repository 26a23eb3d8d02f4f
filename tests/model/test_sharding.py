"""What a process holds of sharded weights; the group is PyTorch's fake one, in which nobody else has to be there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from byeori.distributed import processes as parallel
from byeori.model import adapter, load_streamed, quantize, sharding
from zoo import KINDS

WORLD, RANK = 4, 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny models, written before there is a group: of that only the first process would write."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "gemma3", "mixtral"):
        torch.manual_seed(0)
        KINDS[kind]().float().save_pretrained(folder / kind)
    return folder


@pytest.fixture
def mine(models: Path) -> Iterator[parallel.Processes]:
    """The last of four processes (PyTorch remembers a mesh's rank, so that a test process can be only one of them)."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=WORLD)
    yield parallel.Processes(rank=RANK, world=WORLD, device=torch.device("cpu"), shards=WORLD)
    dist.destroy_process_group()


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return state


def part(tensor: torch.Tensor, processes: parallel.Processes) -> torch.Tensor:
    """The rows of a process, as torch.chunk parts them; the last ones may have fewer, or none."""
    size = math.ceil(len(tensor) / processes.shards)
    rank = processes.rank % processes.shards
    return tensor[rank * size : (rank + 1) * size]


# gemma3's embeddings are tied; mixtral's experts are stored one by one and read by transformers
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mixtral"])
def test_a_process_holds_its_rows_only(
    kind: str, mine: parallel.Processes, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loaded(models / kind)
    reader, read = load_streamed._reader, [0]

    def counting(stored: Any) -> load_streamed.Read:
        inner = reader(stored)

        def count(name: str, start: int, end: int | None) -> torch.Tensor:
            rows = inner(name, start, end)
            read[0] += rows.numel()
            return rows

        return count

    monkeypatch.setattr(load_streamed, "_reader", counting)
    causal = load_streamed.load_streamed(str(models / kind), dtype=torch.float32, processes=mine)
    held = 0
    for name, parameter in causal.named_parameters():
        if parameter.dim() < 2:
            assert not isinstance(parameter, DTensor) and torch.equal(parameter, whole[name]), name
        else:
            assert isinstance(parameter, DTensor) and parameter.shape == whole[name].shape
            assert torch.equal(parameter.to_local(), part(whole[name], mine)), name
            held += parameter.to_local().numel()
    matrices = {t.data_ptr(): t.numel() for t in whole.values() if t.dim() > 1}
    assert held < 1.2 * sum(matrices.values()) / WORLD
    if kind != "mixtral":
        assert read[0] < 1.4 * sum(matrices.values()) / WORLD  # it reads no other rows either


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_rows(bits: int, kind: str, mine: parallel.Processes, models: Path) -> None:
    alone = parallel.Processes(rank=0, world=1, device=torch.device("cpu"))
    whole = load_streamed.load_streamed(str(models / kind), dtype=torch.float32, processes=alone, bits=bits)
    causal = load_streamed.load_streamed(str(models / kind), dtype=torch.float32, processes=mine, bits=bits)
    held, codes = 0, dict(whole.named_parameters())
    for name, layer in causal.named_modules():
        for short, parameter in layer.named_parameters(recurse=False):
            if (scales := quantize.holder(layer, short)) is not None:
                expected = quantize.holder(whole.get_submodule(name), short)
                assert expected is not None and torch.equal(scales.scales, expected.scales)
                assert torch.equal(parameter.to_local(), part(codes[f"{name}.{short}"], mine)), name
                held += 1
    assert held >= 8


def test_machines_of_two(models: Path, mine: parallel.Processes) -> None:
    """hsdp: the rows are those of a machine's two processes."""
    whole = loaded(models / "llama")
    pair = parallel.Processes(rank=mine.rank, world=WORLD, device=mine.device, local_world=2, shards=2)
    causal = load_streamed.load_streamed(str(models / "llama"), dtype=torch.float32, processes=pair)
    for name, parameter in causal.named_parameters():
        if parameter.dim() > 1:
            assert torch.equal(parameter.to_local(), part(whole[name], pair)), name


def test_adapters_stay_whole(mine: parallel.Processes, models: Path) -> None:
    """They are those that one process would draw."""
    how: dict[str, Any] = {"r": 3, "alpha": 5, "dropout": 0.0, "targets": ["all-linear"], "seed": 1}
    plain = adapter.attach(AutoModelForCausalLM.from_pretrained(models / "llama", dtype=torch.float32), **how)
    base = load_streamed.load_streamed(str(models / "llama"), dtype=torch.float32, processes=mine)
    with sharding.whole_shapes(base, mine.device):
        model = adapter.attach(base, **how)
    expected = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert type(parameter) is torch.nn.Parameter and torch.equal(parameter, expected[name]), name
    assert isinstance(base.model.layers[0].mlp.up_proj.base_layer.weight, DTensor)


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines of four, each process with 100 bytes, of which weights may take 60."""
    monkeypatch.setattr(parallel, "_memory", lambda processes: 100.0)
    eight = parallel.Processes(rank=0, world=8, device=torch.device("cpu"), local_world=4)
    assert [parallel.choose_sharding("auto", size, eight).shards for size in (60, 61, 240, 241, 9999)] == [
        1,
        4,
        4,
        8,
        8,
    ]
    assert [parallel.choose_sharding(kind, 9999, eight).shards for kind in ("ddp", "hsdp", "fsdp")] == [1, 4, 8]
    one = parallel.Processes(rank=0, world=4, device=torch.device("cpu"), local_world=4)
    assert parallel.choose_sharding("auto", 9999, one).shards == 4
