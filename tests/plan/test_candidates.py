"""Candidates from rehearsals: what fits, in which order settings are tried, how fast and at what cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from byeori.data.tokenize import Example
from byeori.plan import candidates, machines
from byeori.plan.candidates import Candidate, PlanInput, SearchSpace
from byeori.plan.machines import GIB, Machine
from byeori.plan.prices import Price
from byeori.plan.rehearsal import PARTS, Rehearsal
from byeori.plan.speed import Cost
from byeori.plan.workload import MicroBatch, Workload

TABLE = replace(machines.read(), prices=(), start=(0.0, 0.0))


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
        "gather": (1e10, 1e10),
        "workspace": 0,
        "share": (0.4, 0.5),
        "share_source": "assumed",
        "skypilot": "GPU",
    }
    return Machine(**values | changes)


def _case(
    *, batch_size: int = 8, prices: dict[str, float] | None = None, layers: int = 1, **set_values: Any
) -> PlanInput:
    """A model of 16 GiB (4 in 4 bit) that keeps 4 GiB for a row, 1 with checkpointing; 1e12 operations a row."""

    def rehearse(micro: MicroBatch, recompute: str, four_bit: bool, device: str) -> Rehearsal:
        weights = (4 if four_bit else 16) * GIB
        activations = (micro.size or 1) * {"none": 4, "selective": 3, "full": 1, "offload": 1}[recompute] * GIB
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
            layers=layers,
            quantized=10**8 if four_bit else 0,
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
        table=replace(
            TABLE, prices=tuple(Price(gpu=g, provider="", usd_per_gpu_hour=p) for g, p in (prices or {}).items())
        ),
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
    candidate = candidates.all_machines(_case(prices={"GPU": 2.0}), [_machine(40)])[0]
    # 4 rows of 1,000 tokens: 4e12 operations at 0.5 or 0.4 of 1e14 a second, 900 times
    assert candidate.step_seconds == pytest.approx((9 * 0.08, 9 * 0.1))
    assert candidate.tokens_per_second == pytest.approx((4000 / 0.1, 4000 / 0.08))
    assert candidate.hours == pytest.approx((0.02, 0.025))
    assert candidate.cost == pytest.approx((2.0 * 0.02, 2.0 * 0.025))
    tall = candidates.all_machines(_case(layers=100), [_machine(40)])[0]
    assert tall.hours == pytest.approx((900 * 0.3 / 3600, 900 * 0.5 / 3600))  # 3 to 5 ms a layer, however few tokens
    slow = candidates.all_machines(_case(), [_machine(40, bandwidth=1e11)])[0]
    assert slow.hours == pytest.approx([3.6e6 / 4000 * 2 * 16 * GIB / 1e11 / 3600] * 2)


def test_starting_the_machine_is_paid_for() -> None:
    case = _case(prices={"GPU": 2.0})
    case = replace(case, table=replace(case.table, start=(0.1, 0.3)))
    found = candidates.all_machines(case, [_machine(40)])[0]
    assert found.cost == pytest.approx((2.0 * (0.02 + 0.1), 2.0 * (0.025 + 0.3)))


def test_where_layers_cost_more_than_tokens_a_large_micro_batch_is_recomputed() -> None:
    label = candidates.all_machines(_case(layers=30), [_machine(22.3)])[0].label
    assert label == "checkpointing, micro-batch 4"


def test_gathering_takes_its_time_and_the_best_case_hides_it() -> None:
    two = candidates.all_machines(_case(four_bit=False), [_machine(17)])[1]
    assert two.run_config is not None and two.run_config.sharded and two.gathering is not None and two.hours is not None
    gathered = two.gathering[0]
    assert two.gathering == (gathered, gathered)
    assert two.hours[0] == pytest.approx(gathered)  # slower than the computation, which it hides
    assert two.hours[1] > gathered


def test_more_of_a_machine_only_where_that_is_cheaper() -> None:
    found = candidates.all_machines(_case(prices={"GPU": 1.0}), [_machine(40)])
    assert [candidate.count for candidate in candidates.worth_showing(found)] == [1]
    checkpointing = candidates.all_machines(_case(prices={"GPU": 1.0}, four_bit=False), [_machine(18.5, flops=1e13)])
    assert candidates.worth_showing(checkpointing)[0].count == 1


def test_an_indivisible_batch_is_refused_as_in_training() -> None:
    results = _candidates(40, batch_size=4)
    assert [candidate.refused for candidate in results] == [
        "",
        "",
        "",
        "batch_size 4 is not a multiple of 8 processes",
    ]


def _ranked(by: str) -> list[Candidate]:
    cheap, dear = _machine(40, name="cheap"), _machine(60, name="dear", flops=1e15)
    free, cpu = _machine(20, name="unpriced"), _machine(64, name="CPU", device="cpu", gather=None)
    case = _case(prices={"cheap": 1.0, "dear": 90.0})
    return candidates.ranked(candidates.all_machines(case, [cpu, free, dear, cheap]), by)


@pytest.mark.parametrize(
    ("by", "order"),
    [
        ("cheapest", ["cheap", "dear", "unpriced", "CPU"]),
        ("fastest", ["dear", "cheap", "unpriced", "CPU"]),
        ("smallest", ["unpriced", "cheap", "dear", "CPU"]),
    ],
)
def test_the_best_first(by: str, order: list[str]) -> None:
    ranked = _ranked(by)
    assert list(dict.fromkeys(candidate.machine.name for candidate in ranked)) == order
    assert [candidate.count for candidate in ranked if candidate.machine.name == "CPU"] == [1]


def test_as_many_as_there_are() -> None:
    assert [found.count for found in candidates.all_machines(_case(), [_machine(40, most=3)])] == [1, 2, 3]
    assert [found.count for found in candidates.all_machines(_case(), [_machine(40, most=1)])] == [1]
