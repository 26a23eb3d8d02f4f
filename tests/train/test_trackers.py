"""Trackers get every number of the log, and cost no run.

Of the four, the development environment has tensorboard; the others are tested where they are installed. To run all
of them: `pip install '.[dev,wandb,trackio,mlflow]'`, then this file. It was run so with accelerate 1.15, wandb 0.31,
trackio 0.43 and mlflow 3.17 on one process. By hand: wandb and tensorboard on two, wandb without a login, and mlflow
without its server.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from byeori.errors import ConfigError
from byeori.train.log import Trackers
from runs import checkpoints, command, log, settings, sft

Series = list[tuple[int, float]]


def in_tensorboard(folder: Path) -> dict[str, Series]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "out" / "runs" / "out"))
    events.Reload()
    return {name: [(p.step, p.value) for p in events.Scalars(name)] for name in events.Tags()["scalars"]}


def in_wandb(folder: Path) -> dict[str, Series]:
    """Its offline files have no reader that it promises; numbers stand in them as text. A run continued is one more."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    report = folder / "report" / "metrics.json"
    assert len(files) == 1 + report.exists() and len({file.name for file in files}) == 1
    lines = log(folder / "out")
    found: dict[str, Series] = {}
    for name in ("loss", "eval_loss"):
        said = [(line["step"], line[name]) for line in lines if name in line]
        found[name] = [(step, value) for step, value in said if repr(value).encode() in files[0].read_bytes()]
    if report.exists():
        ends = {"low": "low", "high": "high", "difference": "mean"}
        numbers = json.loads(report.read_text(encoding="utf-8"))["difference"]
        named = {f"compare/{name}/{end}": item[key] for name, item in numbers.items() for end, key in ends.items()}
        found |= {name: [(3, value)] for name, value in named.items() if name.encode() in files[1].read_bytes()}
    return found


def in_trackio(folder: Path) -> dict[str, Series]:
    with sqlite3.connect(folder / "store" / "out.db") as base:
        (runs,) = base.execute("SELECT COUNT(DISTINCT run_name) FROM metrics").fetchone()
        assert runs == 1
        lines = base.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    found: dict[str, Series] = {}
    for step, text in lines:
        for name, value in json.loads(text).items():
            found.setdefault(name, []).append((step, value))
    return found


def in_mlflow(folder: Path) -> dict[str, Series]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("out").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["lora_r"] == "4"
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: [(p.step, p.value) for p in points] for name, points in histories.items()}


READERS: dict[str, Callable[[Path], dict[str, Series]]] = {
    "tensorboard": in_tensorboard,
    "wandb": in_wandb,
    "trackio": in_trackio,
    "mlflow": in_mlflow,
}


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trackers that write where a run is started write here, and none asks its service."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    return tmp_path


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_gets_what_the_log_gets(name: str, tiny_model: Path, title_rows: Path, inside: Path) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    values = settings(tiny_model, title_rows, inside / "out", max_steps=3, val_set_size=4, report_to=name)
    process = command(values)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    found = READERS[name](inside)
    loss = found["loss"]
    lines = log(inside / "out")
    assert loss == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines if "loss" in line]
    assert found["eval_loss"] == [(3, pytest.approx(lines[-1]["eval_loss"], rel=1e-6))]
    assert len(loss) == 3


@pytest.mark.parametrize("name", READERS)
def test_a_comparison_is_logged_to_the_run_of_the_training(
    name: str, tiny_model: Path, title_rows: Path, inside: Path
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    process = command(settings(tiny_model, title_rows, inside / "out", max_steps=3, report_to=name))
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    words = [sys.executable, "-m", "byeori", "compare", "out", str(title_rows), "--output_dir", "report"]
    few = ["--max_rows", "5", "--max_new_tokens", "4", "--few_shots", "0", "--dtype", "float32"]
    done = subprocess.run([*words, *few], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "not logged" not in done.stderr, done.stderr
    numbers = json.loads((inside / "report" / "metrics.json").read_text(encoding="utf-8"))
    found = READERS[name](inside)
    for end, key in (("low", "low"), ("high", "high"), ("difference", "mean")):
        expected = numbers["difference"]["loss"][key]
        assert found[f"compare/loss/{end}"] == [(3, pytest.approx(expected, rel=1e-6))]


def test_a_tracker_that_does_not_start_is_one_sentence(tiny_model: Path, title_rows: Path, inside: Path) -> None:
    """There is a file where tensorboard wants its folder."""
    sft(tiny_model, title_rows, inside / "out", max_steps=1)
    (inside / "out" / "runs").write_text("mine")
    with pytest.raises(ConfigError, match=r"--report_to tensorboard: it did not start \(.*runs.*\); fix it or leave"):
        sft(
            tiny_model,
            title_rows,
            inside / "out",
            max_steps=2,
            report_to="tensorboard",
            resume_from_checkpoint="latest",
        )
    assert checkpoints(inside / "out") == [1]


def test_a_tracker_that_fails_is_dropped_and_the_run_continues(inside: Path) -> None:
    """A real tracker whose writer is closed behind its back, as a connection that ends."""
    said: list[str] = []
    line: dict[str, Any] = {"step": 1, "loss": 2.0}
    with Trackers(["tensorboard"], folder=inside / "out", settings={"lora_r": 4}, say=said.append) as trackers:
        trackers.write(line)
        trackers._trackers["tensorboard"].writer.file_writer.event_writer._async_writer.close()
        trackers.write(line | {"step": 2})
        trackers.write(line | {"step": 3})
    assert len(said) == 1 and said[0].startswith("tensorboard failed and is no longer used (")
    assert said[0].endswith("the run continues, and train_log.jsonl has every line")
