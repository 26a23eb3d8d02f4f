"""Offers from rehearsals: what fits, in which order ways are tried, how fast and for how much."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from byeori.data.tokenize import Example
from byeori.errors import ConfigError
from byeori.kernels import bf16_matmul
from byeori.plan import candidates, machines, report, skypilot, workload
from byeori.plan.candidates import Candidate, Cost, PlanInput, SearchSpace
from byeori.plan.machines import GIB, Machine
from byeori.plan.rehearsal import PARTS, Rehearsal
from byeori.plan.workload import MicroBatch, Workload

TABLE = machines.read()


def _micro(size: int) -> MicroBatch:
    rows = tuple(Example(token_ids=[1] * 9, targets=((4, 9),)) for _ in range(size))
    return MicroBatch(size=size, tokens=4096, largest=rows, typical=rows, accumulates=size < 8)


def _machine(memory: float, **changes: Any) -> Machine:
    values: dict[str, Any] = {
        "name": "GPU",
        "device": "cuda",
        "memory": int(memory * GIB),
        "bandwidth": 1e12,
        "flops": 1e14,
        "link": "PCIe",
        "link_speed": 1e10,
        "workspace": 0,
        "utilisation": 0.5,
        "utilisation_source": "assumed",
        "skypilot": "GPU",
    }
    return Machine(**values | changes)


def _case(*, batch_size: int = 8, **set_values: Any) -> PlanInput:
    """A model of 16 GiB (4 in 4 bit) that keeps 4 GiB for a row, 1 with checkpointing; 1e12 operations a row."""

    def rehearse(micro: MicroBatch, recompute: str, four_bit: bool, device: str) -> Rehearsal:
        weights = (4 if four_bit else 16) * GIB
        activations = (micro.size or 1) * {"none": 4, "selective": 3, "full": 1}[recompute] * GIB
        parts = dict.fromkeys(PARTS, 0) | {"weights": weights, "activations": activations}
        return Rehearsal(
            peak=weights + activations,
            parts=parts,
            segment="forward",
            flops=10**12,
            forward_flops=10**12 // 3,
            tokens=1000,
            resident={"weights": weights},
            layer=GIB // 2,
            outside=GIB,
            layers=30,
            quantized=8 * 10**9 if four_bit else 0,
        )

    work = Workload(
        micro_batches=tuple(_micro(size) for size in (4, 2, 1)),
        tokens=3.6e6,
        reference_tokens=0.0,
        steps=100,
        batch_size=batch_size,
        rows=800,
        source="",
    )
    given: dict[str, Any] = {"recompute": None, "four_bit": None, "sharding": None} | set_values

    def typical_cost(micro_batch: MicroBatch) -> Cost:
        size = micro_batch.size or 1
        return Cost(1e12 * size, 1e12 / 3 * size, 1000.0 * size)

    return PlanInput(
        workload=work,
        search_space=SearchSpace(**given),
        table=TABLE,
        rehearse=rehearse,
        typical_cost=typical_cost,
    )


def _candidates(memory: float, **changes: Any) -> list[Candidate]:
    return candidates.all_machines(_case(**changes), [_machine(memory, bandwidth=1e13)])


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (40, "micro-batch 4"),  # 16 + 16 and what lies outside
        (30, "micro-batch 2"),
        (22.3, "micro-batch 1"),
        (18.5, "checkpointing, micro-batch 1"),
        (12, "4-bit, micro-batch 1"),
        (6.5, "4-bit, checkpointing, micro-batch 1"),
    ],
)
def test_the_fastest_settings_that_fit(memory: float, words: str) -> None:
    alone = _candidates(memory)[0]
    assert alone.fits
    assert alone.run_config is not None
    assert alone.run_config.label == words
    assert alone.need == sum(alone.parts.values())


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    alone = _candidates(5)[0]
    assert not alone.fits
    assert alone.run_config is not None
    assert alone.run_config.label == "4-bit, checkpointing, micro-batch 1"
    assert alone.lacks == alone.need - int(5 * GIB * (1 - TABLE.headroom))


def test_several_share_the_weights_where_one_cannot_hold_them() -> None:
    four = _candidates(12, four_bit=False)[2]
    assert (four.count, four.fits) == (4, True)
    assert four.run_config is not None
    assert four.run_config.settings["parallel"] == "fsdp"
    assert four.parts["weights"] == 4 * GIB + GIB + 2 * GIB // 2  # a quarter, what is in no layer, two whole layers


def test_weights_are_rounded_only_where_they_do_not_fit_shared_either() -> None:
    words = [candidate.run_config.label for candidate in _candidates(12) if candidate.run_config]
    assert words[0] == "4-bit, micro-batch 1"
    assert words[1] == "checkpointing, micro-batch 1, FSDP2"  # 8 GiB of its shard, and 2 that are whole
    assert [candidate.run_config.label for candidate in _candidates(10) if candidate.run_config][
        1
    ] == "4-bit, micro-batch 1"


def test_the_embeddings_of_shared_weights_are_there_more_than_once_while_they_are_gathered() -> None:
    case = _case()
    found = replace(case.rehearse(case.workload.micro_batches[-1], "full", False, "cuda"), outside=6 * GIB)
    found = replace(found, resident=found.resident | {"optimizer": GIB})
    for device, times in (("cuda", 2), ("cpu", 3)):
        parts = candidates.memory(found, TABLE, _machine(24, device=device), 2)
        del parts[candidates.OUTSIDE]
        assert sum(parts.values()) == (8 + times * 6 + 1) * GIB  # its shard, the embeddings, the optimizer's state
    working = candidates.memory(replace(found, outside=GIB // 4), TABLE, _machine(24), 2)
    assert working["workspace"] == 0 and working["weights"] == (8 + 0.25 + 1) * GIB


def test_what_is_set_is_not_changed() -> None:
    alone = _candidates(40, recompute="full")[0]
    assert alone.run_config is not None
    assert alone.run_config.settings == {"gradient_checkpointing": "full", "micro_batch_size": 4, "load_in_4bit": False}


def test_time_and_cost_by_hand() -> None:
    candidate = candidates.all_machines(_case(), [_machine(40, price=2.0)])[0]
    # a row of 1,000 tokens: 1e12 operations at half of 1e14 a second; reading the weights twice takes 0.034 s of 0.08
    assert candidate.tokens_per_second == pytest.approx(50_000)
    assert candidate.hours == pytest.approx(3.6e6 / 50_000 / 3600)
    assert candidate.cost == pytest.approx(2.0 * candidate.hours)
    slow = candidates.all_machines(_case(), [_machine(40, bandwidth=1e11)])[0]
    assert slow.tokens_per_second == pytest.approx(4000 / (2 * 16 * GIB / 1e11))


def test_a_batch_that_cannot_be_divided_is_refused_as_training_refuses_it() -> None:
    results = _candidates(40, batch_size=4)
    assert [candidate.refused for candidate in results] == [
        "",
        "",
        "",
        "batch_size 4 is not a multiple of 8 processes",
    ]


def test_best_value_first() -> None:
    cheap, dear = _machine(40, name="cheap", price=1.0), _machine(40, name="dear", price=9.0)
    free, cpu = _machine(20, name="unpriced"), _machine(64, name="CPU", device="cpu", link_speed=None)
    ranked = candidates.ranked(candidates.all_machines(_case(), [cpu, free, dear, cheap]))
    names = list(dict.fromkeys(candidate.machine.name for candidate in ranked))
    assert names == ["cheap", "dear", "unpriced", "CPU"]
    assert [candidate.count for candidate in ranked if candidate.machine.name == "CPU"] == [1]
    assert report.sentence(ranked[0]).startswith("cheap x 1 is enough: micro-batch 4, about 1 min, $0.02")


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
def test_part_of_a_word_names_no_machine(name: str, meant: str) -> None:
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
def test_prices_that_are_wrong(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        machines.read(prices=str(file))
    assert words in str(error.value)


def test_prices_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("H100: {usd_per_hour: 2.5, source: my contract, date: 2026-11-24}\nT4: 0.3\n")
    found = {machine.name: machine for machine in machines.read(prices=str(file)).machines}
    assert (found["H100"].price, found["H100"].price_source) == (2.5, "my contract, 2026-11-24")
    assert found["T4"].price == 0.3
    assert found["L4"].price is None


def test_a_table_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "machines.yaml"
    file.write_text("machines: {X: {memory_mib: 1}}\nassumptions: {}\n")
    with pytest.raises(ConfigError, match=r"is not a table of machines"):
        machines.read(str(file))


def test_rows_that_are_made_up() -> None:
    from byeori.batch import forest, loader

    schedule = loader.schedule(100, batch_size=8, num_epochs=2, max_steps=None, seed=0)
    rows: dict[str, Any] = {"cutoff_len": 512, "mean": 256, "rows": 100, "schedule": schedule, "tokens": 4096}
    single = workload.assumed(**rows, per_row=1, size=4)
    assert [micro.size for micro in single.micro_batches] == [4, 2, 1]
    assert forest.build(single.micro_batches[0].largest).unique_tokens == 4 * 511
    assert single.tokens == 200 * 255
    pairs = workload.assumed(**rows, per_row=2, size=2)
    assert forest.build(pairs.micro_batches[-1].largest).unique_tokens == 512 - 64 + 2 * 63  # the prompt counts once
    budget = workload.assumed(**rows, per_row=1, size=None)
    assert [micro.tokens for micro in budget.micro_batches] == [4096, 2048, 1024, 512]
    assert [len(micro.largest) for micro in budget.micro_batches] == [8, 4, 2, 1]


def test_a_task_for_skypilot() -> None:
    candidate = _candidates(12, four_bit=False)[2]

    def task(candidate: Candidate, **settings: Any) -> dict[str, Any]:
        how: dict[str, Any] = {"objective": "sft", "text": "batch_size: 8\n", "weight_bytes": 16 * 10**9}
        return skypilot.task(candidate, settings=settings, mounts={"/a": "b"}, **how)

    made = task(candidate)
    assert made["resources"]["accelerators"] == "GPU:4"
    assert made["file_mounts"] == {"/a": "b"}
    assert made["run"].endswith("byeori sft --config run.yaml\n")
    assert made["setup"].endswith("bin/python .\n")
    assert task(candidate, load_in_4bit=True)["setup"].endswith("'.[quant]'\n")
    assert task(candidate, load_in_8bit=True)["setup"].endswith("'.[quant]'\n")
    assert task(candidate, optim="paged_adamw_8bit", report_to=["wandb"])["setup"].endswith("'.[quant,wandb]'\n")
    with pytest.raises(ConfigError, match="SkyPilot rents no CPU"):
        task(Candidate(machine=_machine(1, name="CPU", skypilot=None), count=1))


def test_a_task_is_not_made_of_what_cannot_go_along(tmp_path: Path) -> None:
    settings = {"base_model": str(tmp_path), "data_path": ["user/rows"]}
    assert skypilot.mounted(settings) == (
        settings | {"base_model": f"/tmp/byeori/0/{tmp_path.name}"},
        {f"/tmp/byeori/0/{tmp_path.name}": str(tmp_path)},
    )
    with pytest.raises(ConfigError, match="copy it to a URL"):
        skypilot.mounted(settings | {"resume_from_checkpoint": str(tmp_path)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ConfigError, match=r"the adapter .* needs its base model in the local folder .* byeori merge"):
        skypilot.mounted(settings)


def test_byeori_is_installed_from_where_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Path(skypilot.checkout()) / "src" / "byeori").is_dir()
    monkeypatch.setattr(skypilot, "__file__", "/usr/lib/python3/site-packages/byeori/plan/skypilot.py")
    record = {"url": tmp_path.as_uri(), "dir_info": {}}

    class Installed:
        def read_text(self, name: str) -> str:
            return json.dumps(record)

    monkeypatch.setattr(skypilot.metadata, "distribution", lambda name: Installed())
    assert skypilot.checkout() == "."  # it is gone
    (tmp_path / "pyproject.toml").touch()
    assert skypilot.checkout() == str(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "units", "besides"),
    [(torch.float32, True, 0), (torch.bfloat16, False, bf16_matmul._WORKSPACE), (torch.bfloat16, True, 79_360_000)],
)
def test_a_processor_needs_room_for_its_products(
    dtype: torch.dtype, units: bool, besides: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks in float32 where there are no units for bf16; where there are, the code that oneDNN keeps."""
    monkeypatch.setattr(bf16_matmul, "units", lambda: units)
    monkeypatch.setattr(bf16_matmul, "install", lambda: None)
    monkeypatch.setattr(machines.memory, "resident_bytes", lambda: 1000)
    monkeypatch.setattr(machines, "measured_peak", lambda dtype: 1e11)
    assert machines.this_cpu(TABLE, dtype).workspace == 1000 + besides
