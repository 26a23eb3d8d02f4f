"""Candidates from rehearsals: what fits, in which order settings are tried, how fast and at what cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from byeori.data.tokenize import Example
from byeori.plan import candidates, machines, report
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


def test_missing_bytes_where_nothing_fits() -> None:
    alone = _candidates(5)[0]
    assert not alone.fits
    assert alone.run_config is not None
    assert alone.run_config.label == "4-bit, checkpointing, micro-batch 1"
    assert alone.lacks == alone.need - int(5 * GIB * (1 - TABLE.headroom))


def test_weights_are_sharded_where_one_gpu_cannot_hold_them() -> None:
    four = _candidates(12, four_bit=False)[2]
    assert (four.count, four.fits) == (4, True)
    assert four.run_config is not None
    assert four.run_config.settings["parallel"] == "fsdp"
    assert four.parts["weights"] == 4 * GIB + GIB + 2 * GIB // 2  # a quarter, what is in no layer, two whole layers


def test_4_bit_only_where_sharded_weights_do_not_fit_either() -> None:
    words = [candidate.run_config.label for candidate in _candidates(12) if candidate.run_config]
    assert words[0] == "4-bit, micro-batch 1"
    assert words[1] == "checkpointing, micro-batch 1, FSDP2"  # 8 GiB of its shard, and 2 that are whole
    assert [candidate.run_config.label for candidate in _candidates(10) if candidate.run_config][
        1
    ] == "4-bit, micro-batch 1"


def test_embeddings_of_sharded_weights_are_counted_more_than_once_while_gathered() -> None:
    case = _case()
    found = replace(case.rehearse(case.workload.micro_batches[-1], "full", False, "cuda"), outside=6 * GIB)
    found = replace(found, resident=found.resident | {"optimizer": GIB})
    for device, times in (("cuda", 2), ("cpu", 3)):
        parts = candidates.memory(found, TABLE, _machine(24, device=device), 2)
        del parts[candidates.OUTSIDE]
        assert sum(parts.values()) == (8 + times * 6 + 1) * GIB  # its shard, the embeddings, the optimizer's state
    working = candidates.memory(replace(found, outside=GIB // 4), TABLE, _machine(24), 2)
    assert working["workspace"] == 0 and working["weights"] == (8 + 0.25 + 1) * GIB


def test_given_settings_are_not_changed() -> None:
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


def test_an_indivisible_batch_is_refused_as_in_training() -> None:
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
