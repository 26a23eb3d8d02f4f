"""Short runs on the tiny model, and what they leave."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import fsspec
import pytest

import byeori
import forks
from byeori.train import trainer

# Rows of 24: 6 steps an epoch of 4 rows.
DEFAULTS: dict[str, Any] = {
    "batch_size": 4,
    "num_epochs": 2,
    "cutoff_len": 256,
    "dtype": "float32",
    "learning_rate": 1e-2,
    "lora_r": 4,
    "lora_alpha": 8,
    "max_grad_norm": 0.5,
    "weight_decay": 0.1,
    "warmup_steps": 3,
}


def settings(model: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return DEFAULTS | {"base_model": str(model), "data_path": str(rows), "output_dir": str(output)} | changes


def sft(model: Path, rows: Path, output: Path, **changes: Any) -> Any:
    return byeori.sft(**settings(model, rows, output, **changes))


def flags(values: dict[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def command(values: dict[str, Any], *program: object, processes: int = 0, restarts: int = 0) -> forks.Forked:
    """`byeori sft` in a process of its own, or in a group of them under torchrun's agent; or another program."""
    program = program or ("-m", "byeori")
    return forks.start(*program, "sft", *flags(values), env=environment(), processes=processes, restarts=restarts)


def log(output: Path, *, timeless: bool = False) -> list[dict[str, Any]]:
    """The lines of train_log.jsonl; timeless: without what no two runs share."""
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    gone = {"seconds", "peak_memory_bytes"} if timeless else set()
    return [{key: value for key, value in line.items() if key not in gone} for line in lines]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in log(output) if "loss" in line]


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checkpoints(output: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))


def leftovers(output: Path) -> list[str]:
    return [path.name for path in output.rglob("*") if path.name.endswith(".tmp")]


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run asks itself to stop (Ctrl-C) in the middle of a step."""
    real = trainer._update
    calls = [0]

    def update(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == step:
            signal.raise_signal(signal.SIGINT)
        real(*arguments)

    monkeypatch.setattr(trainer, "_update", update)


def same(one: Path, other: Path, last: int) -> None:
    """Adapter, optimizer, counters, order and log are equal to the bit."""
    assert sha(one / "adapter_model.safetensors") == sha(other / "adapter_model.safetensors")
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json"):
        assert sha(one / f"checkpoint-{last}" / name) == sha(other / f"checkpoint-{last}" / name), name
    assert log(one, timeless=True) == log(other, timeless=True)
    assert (one / "order.json").read_text() == (other / "order.json").read_text()


def names(url: str) -> set[str]:
    system, root = fsspec.core.url_to_fs(url)
    return {str(path).rpartition(f"{root.strip('/')}/")[2] for path in system.find(root)}
