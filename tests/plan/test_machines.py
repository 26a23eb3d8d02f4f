"""The table of machines: names, prices, this processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from byeori.errors import ConfigError
from byeori.kernels import bf16_matmul
from byeori.plan import machines

TABLE = machines.read()


@pytest.mark.parametrize("name", ["4090", "rtx4090", "RTX 4090", "rtx-4090"])
def test_machines_by_name(name: str) -> None:
    assert [machine.name for machine in machines.select(TABLE, [name])] == ["RTX 4090"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("A100", ["A100 40GB", "A100 80GB"]),
        ("a100-80", ["A100 80GB"]),
        ("h100-80gb", ["H100"]),
        ("RTX 4090 24 GB", ["RTX 4090"]),
        ("MI300X-192GB", ["MI300X"]),
        ("RTX 6000", ["RTX 6000 Ada"]),
        ("6000", ["RTX 6000 Ada"]),
        ("rtx pro", ["RTX PRO 6000"]),
        ("A6000", ["RTX A6000"]),
        ("H100 80GB", ["H100"]),
        ("h100 pcie", ["H100 PCIe"]),
        ("V100", ["V100 16GB", "V100 32GB"]),
        ("4080", ["RTX 4080"]),
        ("colab", ["T4"]),
        ("Kaggle", ["T4"]),
    ],
)
def test_machines_by_the_beginning_of_a_name(name: str, found: list[str]) -> None:
    assert [machine.name for machine in machines.select(TABLE, [name])] == found


@pytest.mark.parametrize(("name", "meant"), [("H10", "H100"), ("L4O", "L4"), ("A1", ""), ("4", ""), ("-", "")])
def test_part_of_a_word_is_no_machine_name(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no GPU '{name}'.*{meant}"):
        machines.select(TABLE, [name])


def test_the_table() -> None:
    assert len(TABLE.machines) == 28
    assert TABLE.date and TABLE.source
    assert all(low <= high <= 1 for low, high in (machine.share for machine in TABLE.machines))
    known = {machine.name for machine in TABLE.machines}
    assert {price.gpu for price in TABLE.prices} <= known
    assert {service.gpu for service in TABLE.services} <= known


def test_a_free_service_has_as_many_gpus_as_it_lends() -> None:
    assert [machines.select(TABLE, [name])[0].most for name in ("colab", "kaggle", "T4")] == [1, 2, 0]


def test_gpus_without_code_in_current_wheels_are_planned_only_by_name() -> None:
    assert not any(machine.name.startswith("V100") for machine in machines.select(TABLE, []))
    assert machines.select(TABLE, ["V100 32GB"])[0].capability < machines.OLDEST


@pytest.mark.parametrize(
    ("name", "gigabytes", "found"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "A100 40GB"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", 79.2, "H100"),
        ("NVIDIA H100 PCIe", 79.2, "H100 PCIe"),
        ("NVIDIA H100 NVL", 93.1, "H100 NVL"),
        ("Tesla T4", 14.6, "T4"),
        ("Tesla V100-SXM2-16GB", 15.8, "V100 16GB"),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, "RTX 6000 Ada"),
        ("NVIDIA L40S", 44.4, "L40S"),
        ("AMD Instinct MI300X", 191.5, "MI300X"),
        ("Quadro RTX 6000", 24, None),
        ("NVIDIA L40", 44.4, None),
        # as gpuhunt names them
        ("A100", 80, "A100 80GB"),
        ("RTX6000", 24, None),
        ("RTX6000Ada", 48, "RTX 6000 Ada"),
        ("RTX4070TiSUPER", 16, "RTX 4070 Ti SUPER"),
        ("A6000", 48, "RTX A6000"),
        ("RTXPRO6000", 96, "RTX PRO 6000"),
        ("H200NVL", 141, "H200"),
        ("MI325X", 288, "MI325X"),
    ],
)
def test_machines_by_the_name_of_a_driver(name: str, gigabytes: float, found: str | None) -> None:
    machine = machines.of_device(TABLE.machines, name, gigabytes)
    assert (machine and machine.name) == found


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    file = tmp_path / "machines.yaml"
    file.write_text("machines: {X: {memory_mib: 1}}\nassumptions: {}\n")
    with pytest.raises(ConfigError, match=r"is not a table of machines"):
        machines.read(str(file))


@pytest.mark.parametrize(
    ("dtype", "units", "besides"),
    [(torch.float32, True, 0), (torch.bfloat16, False, bf16_matmul._WORKSPACE), (torch.bfloat16, True, 79_360_000)],
)
def test_memory_that_matrix_products_take_on_a_cpu(
    dtype: torch.dtype, units: bool, besides: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks in float32 where there are no units for bf16; where there are, the code that oneDNN keeps."""
    monkeypatch.setattr(bf16_matmul, "units", lambda: units)
    monkeypatch.setattr(machines.memory, "resident_bytes", lambda: 1000)
    monkeypatch.setattr(machines, "measured_peak", lambda dtype: 1e11)
    assert machines.this_cpu(TABLE, dtype).workspace == 1000 + besides
