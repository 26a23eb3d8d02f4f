"""The tables of docs/plan.md about public runs are what benchmarks/public_runs.py says of them now."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from byeori.plan import machines

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

import public_runs  # noqa: E402

TABLE = replace(machines.read(), prices=())


def _block(page: str, name: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (found,) = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL)
    return found


def test_both_languages_show_the_same_tables() -> None:
    for name in ("public-time", "public-memory", "public-limits"):
        numbers = [re.findall(r"[+-]?\d[\d,.]*%?", _block(page, name)) for page in public_runs.PAGES]
        assert numbers[0] == numbers[1]


@pytest.mark.parametrize("run", ["B-llama2-13b-l-2", "C-llama3-8b-full-1", "I-hf-8", "A-qwen1-72b-qlora-8192"])
def test_what_the_plan_says_at_the_limit(run: str) -> None:
    """Of a few; the slow test is about all."""
    runs = [*public_runs.read("near_limits.csv"), *public_runs.read("measured_runs.csv")]
    found = public_runs.compare(next(each for each in runs if each["id"] == run), {}, TABLE)
    row = public_runs.markdown(public_runs.by_limit([found]), public_runs.PAGES["plan.md"]).splitlines()[-1]
    assert row in _block("plan.md", "public-limits")


def test_runs_that_fit_are_no_share_of_what_is_reported() -> None:
    fitted, held_out = public_runs.halves(public_runs.read("measured_runs.csv"))
    assert not {run["id"] for run in fitted} & {run["id"] for run in held_out}
    assert len(fitted) + len(held_out) == 111


@pytest.mark.slow
def test_shares_of_the_peak_are_those_of_the_runs_for_fitting() -> None:
    found = public_runs.shares(public_runs.halves(public_runs.read("measured_runs.csv"))[0], TABLE)
    public = {machine.name: machine.share for machine in TABLE.machines if machine.share_source == "public"}
    assert public == {name: pytest.approx(share, abs=0.0051) for name, share in found.items()}


def test_weights_arrive_over_pcie_as_slowly_as_in_public_runs() -> None:
    runs = [run for run in public_runs.read("measured_runs.csv") if run["id"] == "F-7l-3090-512"]
    ((low, high),) = public_runs.gathers(runs, TABLE).values()
    (card,) = (machine for machine in TABLE.machines if machine.name == "RTX 3090")
    assert low < 4.5 and card.gather and card.gather[0] / 1e9 == pytest.approx((low + high) / 2, rel=0.1)


@pytest.mark.parametrize("run", ["D-8b-lora-A6000", "D-8b-lora-4090"])
def test_what_decides_is_never_under_what_the_nearest_method_allocated(run: str) -> None:
    (published,) = (each for each in public_runs.read("measured_runs.csv") if each["id"] == run)
    assert public_runs.compare(published, {}, TABLE).need >= float(published["memory_gib"])


@pytest.mark.slow
def test_all_tables() -> None:
    for name, rows in public_runs.tables().items():
        assert public_runs.markdown(rows, public_runs.PAGES["plan.md"]) == _block("plan.md", name)
