"""Storages are counted from allocation to release, by part and by segment; operations are counted too."""

from __future__ import annotations

import gc

import pytest
import torch

from byeori.plan.memory_tracker import Tracker


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_peak_worked_out_by_hand(device: str) -> None:
    x = torch.ones(10, 10, device=device)  # 400 bytes
    with Tracker() as tracker:
        tracker.assign("weights", [x])
        tracker.part = "activations"
        tracker.enter("first")
        y = x + 1
        z = y * 2  # 1,200 alive
        del y
        tracker.enter("second")
        w = z.view(100)[:50]  # a view has no storage of its own
        v = w.double()  # 400: 1,200 again
        del v, w, z
        tracker.enter("third")
    assert {name: peak.total for name, peak in tracker.peaks.items()} == {
        "before": 400,
        "first": 1200,
        "second": 1200,
        "third": 400,
    }
    assert tracker.peaks["first"].parts == {"weights": 400, "activations": 800}
    assert tracker.total == 400


def test_a_storage_is_counted_while_a_view_lives() -> None:
    with Tracker() as tracker:
        view = torch.ones(1000, device="meta")[:1]
        gc.collect()
        assert tracker.total == 4000
        del view
        assert tracker.total == 0


def test_blocks_are_rounded_up() -> None:
    with Tracker(block=512) as tracker:
        kept = [torch.ones(1, device="meta"), torch.ones(128, device="meta"), torch.ones(129, device="meta")]
    assert tracker.total == 512 + 512 + 1024
    del kept


def test_a_part_can_be_assigned_later() -> None:
    with Tracker() as tracker:
        tracker.part = "workspace"
        grad = torch.ones(25, device="meta")
        tracker.assign("gradients", [grad])
    assert +tracker.parts == {"gradients": 100}


def test_operations_of_products_and_experts() -> None:
    a, b = torch.ones(6, 4, device="meta"), torch.ones(4, 8, device="meta")
    with Tracker() as tracker:
        product = a @ b
        assert tracker.flops == 2 * 6 * 4 * 8
        product.addmm_(a, b, alpha=2.0)
        assert tracker.flops == 2 * 2 * 6 * 4 * 8
        tracker.flops = 0
        torch.baddbmm(product[None], a[None], b[None]).baddbmm_(a[None], b[None])
        assert tracker.flops == 2 * 2 * 6 * 4 * 8
        tracker.flops = 0
        rows, experts = (torch.ones(*size, device="meta", dtype=torch.bfloat16) for size in ((32, 16), (4, 16, 24)))
        torch.nn.functional.grouped_mm(rows, experts, offs=torch.ones(4, device="meta", dtype=torch.int32))
    assert tracker.flops == 2 * 32 * 16 * 24


def test_the_sources_of_a_peak_add_up_to_it() -> None:
    with Tracker(explain=True) as tracker:
        x = torch.ones(10, device="meta")
        x = x + 1
        x * 2
    peak = tracker.peaks["before"]
    sizes, counts = peak.sources()
    assert sum(sizes.values()) == peak.total == 80
    assert sum(counts.values()) == 2
    assert {source[3] for source in sizes} == {"10 float32"}
