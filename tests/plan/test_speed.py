"""Speeds measured here: what a finished run and a calibration leave behind, and what a later plan makes of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from byeori import config
from byeori.commands import plan
from byeori.plan import autotune, machines, speed
from byeori.plan.candidates import Candidate, RunConfig
from byeori.plan.machines import GIB, Machine
from byeori.plan.workload import MicroBatch
from byeori.train import memory

TABLE = machines.read()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "cache"))


def _record(share: float, device: str = "RTX 4090", four_bit: bool = False) -> None:
    speed.record(speed.Measured(device=device, four_bit=four_bit, flops=share * 1e12, seconds=1.0, peak=1e12))


def test_runs_here_replace_public_shares() -> None:
    gpu = next(machine for machine in TABLE.machines if machine.name == "RTX 4090")
    assert speed.with_measured(gpu, False, speed.recorded()) is gpu
    _record(0.5)
    assert speed.with_measured(gpu, False, speed.recorded()).share_source == "measured here on 1 run"
    _record(0.6)
    found = speed.with_measured(gpu, False, speed.recorded())
    assert found.share == pytest.approx((0.45, 0.66))
    assert found.share_source == "measured here on 2 runs"
    assert speed.with_measured(gpu, True, speed.recorded()) is gpu  # 4-bit runs are another kind
    for _ in range(30):
        _record(0.7)
    assert speed.with_measured(gpu, False, speed.recorded()).share == pytest.approx((0.63, 0.77))  # the last 20


def test_a_damaged_file_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "measured_speed.json").write_text("{")
    assert speed.with_measured(TABLE.machines[0], False, speed.recorded()) is TABLE.machines[0]
    _record(0.5)
    assert json.loads((tmp_path / "cache" / "measured_speed.json").read_text()) == {"RTX 4090": [0.5]}


def _forecast(device: str, tokens: int) -> autotune.Forecast:
    micro = MicroBatch(size=1, tokens=tokens, largest=(), typical=(), accumulates=False)
    return autotune.Forecast(
        candidate=Candidate(
            machine=Machine(name="here", device=device, memory=GIB, workspace=0),
            count=1,
            run_config=RunConfig(micro_batch=micro, recompute="none", four_bit=False, sharded=False),
        ),
        peak=GIB,
        flops=2e9,
        tokens=tokens,
        dtype=torch.float32,
    )


def test_what_a_finished_run_leaves_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "measured_peak", lambda dtype: 1e12)
    cpu = Machine(name="CPU", device="cpu", memory=GIB, workspace=0, flops=1e12, share=(0.1, 0.4))
    first = {"seconds": 60.0, "unique_tokens": 100}
    _forecast("cpu", 512).record_speed([first, {"seconds": 1.0, "unique_tokens": 100}], 1)
    assert speed.with_measured(cpu, False, speed.recorded()) is cpu  # too short
    _forecast("cpu", 512).record_speed([first, *[{"seconds": 3.0, "unique_tokens": 600}] * 2], 2)
    # 1,200 tokens of 2e9 operations in 6 s are 0.4 of the peak, 0.2 for each of two processes
    assert speed.with_measured(cpu, False, speed.recorded()).share == pytest.approx((0.18, 0.22))


def test_small_micro_batches_on_a_gpu_say_nothing(tmp_path: Path) -> None:
    _forecast("cuda", 512).record_speed([{"seconds": 9.0, "unique_tokens": 600}] * 3, 1)
    assert not (tmp_path / "cache").exists()


def test_a_plan_says_on_how_many_runs(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "hidden_size=256 num_hidden_layers=4 num_attention_heads=4 intermediate_size=512 vocab_size=1000"
    how: dict[str, Any] = {"shape": shape, "gpu": "4090", "table": True}
    _record(0.5)
    plan.plan(config.check(config.PlanSettings, how))
    assert "RTX 4090 45% to 55% (measured here on 1 run)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "expanded"),
    [({}, True), ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, False), ({"PYTORCH_CUDA_ALLOC_CONF": "x"}, False)],
)
def test_runs_on_a_gpu_expand_segments(given: dict[str, str], expanded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    memory.expand_segments()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == given.get("PYTORCH_CUDA_ALLOC_CONF")  # no GPU here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory.expand_segments()
    assert memory.expandable_segments() == expanded
