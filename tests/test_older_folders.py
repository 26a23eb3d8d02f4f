"""Folders that byeori 0.1 wrote still work: fixtures/v0_1 was made before files, folders and records had their names.

`byeori.yaml` of that time does not record the kind of its rows, and every path in it is relative to the folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import byeori
from byeori import cli
from runs import losses, sha

FIXTURE = Path(__file__).parent / "fixtures" / "v0_1"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folders; the current folder, as it was for the runs."""
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "v0_1"))
    monkeypatch.chdir(folder)
    return folder


def go_on(command: str, *more: str) -> None:
    assert cli.main([command, "--config", f"{command}/byeori.yaml", *more]) == 0


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_checkpoint_is_resumed_to_the_recorded_losses(command: str, old: Path) -> None:
    recorded = losses(old / command)
    assert len(recorded) == 4 and "row_kind" not in (old / command / "byeori.yaml").read_text(encoding="utf-8")
    go_on(command, "--resume_from_checkpoint", f"{command}/checkpoint-2")
    assert losses(old / command) == pytest.approx(recorded, rel=1e-5)
    state = json.loads((old / command / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["step"] == 4
    kind = yaml.safe_load((old / command / "byeori.yaml").read_text(encoding="utf-8"))["row_kind"]
    assert kind == {"sft": "answer", "dpo": "preference"}[command]


def test_its_yaml_starts_the_same_run(old: Path) -> None:
    go_on("sft", "--output_dir", "again")
    assert losses(old / "again") == pytest.approx(losses(old / "sft"), rel=1e-5)


def test_a_checkpoint_of_dpo_is_no_checkpoint_of_sft(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", "sft/byeori.yaml", "--output_dir", "other", "--resume_from_checkpoint", "dpo/checkpoint-2"]
    assert cli.main(["sft", *flags]) == 2
    assert "was written by byeori dpo" in capsys.readouterr().err


@pytest.mark.parametrize("adapter", ["sft", "dpo", "sft/checkpoint-2"])
def test_generate_and_merge_read_its_adapters(adapter: str, old: Path) -> None:
    row = json.loads((old / "rows.jsonl").read_text(encoding="utf-8").splitlines()[0])
    column = {"sft": "document", "dpo": "prompt"}[adapter.partition("/")[0]]
    tuned = byeori.generate(model=adapter, columns={column: row["document"]}, max_new_tokens=8)
    weights = sha(old / adapter / "adapter_model.safetensors")
    byeori.merge(peft_model_path=adapter, output_dir="merged")
    report = json.loads((old / "merged" / "merge_report.json").read_text(encoding="utf-8"))
    assert (report["verdict"], report["adapter_sha256"]) == ("equal", weights)
    assert byeori.generate(model="merged", columns={column: row["document"]}, max_new_tokens=8) == tuned


@pytest.mark.parametrize(("adapter", "rows", "pairs"), [("sft", "rows.jsonl", False), ("dpo", "pairs.jsonl", True)])
def test_compare_reads_its_adapters(adapter: str, rows: str, pairs: bool, old: Path) -> None:
    result = byeori.compare(adapter=adapter, data_path=rows, output_dir="report", max_rows=3, max_new_tokens=8)
    assert result.metrics["rows"] == 3 and ("preference_accuracy" in result.metrics["tuned"]) == pairs
