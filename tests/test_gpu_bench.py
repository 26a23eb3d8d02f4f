"""benchmarks/gpu.py in its small form: contenders agree with float32 on the first loss; what it counts is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import forks

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in (BENCHMARKS, BENCHMARKS / "peers"):
        monkeypatch.syspath_prepend(str(folder))
    import gpu_common

    import gpu

    return SimpleNamespace(gpu=gpu, common=gpu_common)


def test_a_layer_moves_least_with_the_kernels() -> None:
    """Its table on few tokens: the models' own code, norms fused, all fused in PyTorch, all fused with kernels."""
    done = forks.run(BENCHMARKS / "traffic.py", "--tokens", 2048)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| llama3-8b")]
    plain, norms, in_pytorch, kernels = (float(row[3]) for row in rows)
    assert kernels < norms / 3 < plain / 3 < in_pytorch
    # 2,048 numbers of 4,096 and 14,336 in 16 bit: norms 2 and 2 x 3, activation 3 and 6, sums 3 and 3 of two residuals,
    # rotation of 32 and 8 heads 2 and 2
    by_hand = 2048 * 2 * (4096 * (4 + 6 + 12) + 14336 * (3 + 6) + 40 * 128 * 4) / 1e9
    assert kernels == pytest.approx(by_hand, rel=0.05)


@pytest.mark.slow
def test_small(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--small", "--only", "byeori,plain,byeori:compile=no"]
    command += ["--workloads", "packed,dpo1024", "--out", str(tmp_path), "--budget", "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gpu.md").read_text() == done.stdout[done.stdout.index("CPU, ") :]
    records = json.loads((tmp_path / "gpu.json").read_text())["records"]
    found = {(r["contender"], r["workload"]): r for r in records}
    for workload, share in (("packed", 1.0), ("dpo1024", 0.6)):
        exact = found["reference", workload]["first"]
        ours, theirs = found["byeori", workload], found["plain", workload]
        assert ours["first"] == pytest.approx(exact, rel=1e-5)
        assert theirs["first"] == pytest.approx(exact, rel=1e-5)
        assert ours["tokens"] == theirs["tokens"] == theirs["computed"]
        assert len(ours["seconds"]) == 2
        assert ours["computed"][0] < theirs["computed"][0] * share
    assert "compile" in found["byeori:compile=no", "packed"]["note"]  # what a contender cannot do is said in its row
    assert "| llama3-8b | packed | plain |" in done.stdout


def test_counts_of_a_row(modules: Any) -> None:
    record = modules.common.Record(contender="", workload="")
    rows = [{"prompt": [3, 4, 5], "chosen": [6, 7], "rejected": [8]}]
    modules.common.count_rows(record, rows)
    assert (record.tokens, record.computed, record.targets, record.pairs) == ([9], [9], [3], [15 + 10])
    modules.common.count_rows(record, rows, computed=6, pairs=18)
    assert (record.computed[1], record.pairs[1]) == (6, 18)


def test_work_in_a_step(modules: Any) -> None:
    """Forward and half a backward: 4 operations a weight; attention 12 a query, key and column; DPO reads once more."""
    record = {"shape": "llama3-8b", "workload": "packed", "computed": [10], "targets": [3], "pairs": [55]}
    expected = 4 * 6.98e9 * 10 + 4 * 128256 * 4096 * 3 + 12 * 32 * 4096 * 55
    assert modules.gpu.work_in(record, 0) == expected
    assert modules.gpu.work_in(record | {"workload": "dpo1024"}, 0) == 1.5 * expected


@pytest.mark.parametrize("shape", ["llama3-8b", "qwen3-8b"])
def test_the_weights_of_a_shape(shape: str, modules: Any) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(modules.common.config_of(shape, False))
    head = model.get_output_embeddings().weight.numel()
    linear = sum(m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear) - head
    weights, expected_head, layers, width = modules.gpu.SIZES[shape]
    assert linear == pytest.approx(weights, rel=1e-3)
    assert (head, layers) == (expected_head, model.config.num_hidden_layers)
    assert width == model.config.num_attention_heads * model.config.head_dim


def test_how_long_a_gpu_is_idle(modules: Any) -> None:
    """Kernels at 0 to 40 and 30 to 60 of 100 microseconds: busy for 60; what the host does does not count."""

    def event(start: float, end: float, name: str, kind: Any, marked: bool = False) -> Any:
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(device_type=kind, time_range=span, name=name, is_user_annotation=marked)

    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [event(30, 60, "b", gpu), event(0, 40, "a", gpu), event(0, 99, "c", cpu), event(0, 99, "d", gpu, True)]
    found = modules.common.summary(SimpleNamespace(events=lambda: events), 100e-6)
    assert found["gpu_idle_share"] == pytest.approx(0.4)
    assert [kernel["name"] for kernel in found["kernels"]] == ["a", "b"]


def test_bad_arguments_are_named() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--workloads", "packt", "--only", "byeori,unsloth"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no packt, no unsloth" in done.stderr
