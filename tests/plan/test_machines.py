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
    assert [machine.name for machine in machines.select(TABLE.machines, [name])] == ["RTX 4090"]


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
        ("RTX", ["RTX 3090", "RTX 4090", "RTX 5090", "RTX 6000 Ada", "RTX PRO 6000"]),
    ],
)
def test_machines_by_the_beginning_of_a_name(name: str, found: list[str]) -> None:
    assert [machine.name for machine in machines.select(TABLE.machines, [name])] == found


@pytest.mark.parametrize(
    ("name", "meant"), [("H10", "H100"), ("h100-94gb", "mean H100"), ("A10", "A10G"), ("4", ""), ("-", "")]
)
def test_part_of_a_word_is_no_machine_name(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no GPU '{name}'.*{meant}"):
        machines.select(TABLE.machines, [name])


def test_the_table_has_every_machine_and_no_invented_price() -> None:
    names = [machine.name for machine in TABLE.machines]
    assert names == [
        *["T4", "L4", "A10G", "RTX 3090", "RTX 4090", "RTX 5090", "A100 40GB", "A100 80GB", "L40S", "RTX 6000 Ada"],
        *["RTX PRO 6000", "H100", "H200", "B200", "MI300X"],
    ]
    assert all(machine.price is None for machine in TABLE.machines)
    assert TABLE.date and TABLE.source


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("H1000: 2", "names an unknown GPU 'H1000' (did you mean H100?)"),
        ("H100: {usd_per_hour: -3}", "the price of H100 is -3; give dollars an hour"),
        ("H100: {usd_per_hour: cheap}", "the price of H100 is 'cheap'"),
        ("- 1", "holds no prices; start from a copy"),
        ("a: [", "is not valid YAML at line"),
    ],
)
def test_bad_prices(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        machines.read(prices=str(file))
    assert words in str(error.value)


def test_own_prices(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("H100: {usd_per_hour: 2.5, source: my contract, date: 2026-11-24}\nT4: 0.3\n")
    found = {machine.name: machine for machine in machines.read(prices=str(file)).machines}
    assert (found["H100"].price, found["H100"].price_source) == (2.5, "my contract, 2026-11-24")
    assert found["T4"].price == 0.3
    assert found["L4"].price is None


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
