"""Runs that begin where another run was: its checkpoints are neither taken for one's own nor lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

import byeori
from byeori.artifacts import layout
from byeori.errors import CheckpointError, ConfigError
from byeori.train import trainer
from byeori.train.state import Interrupted
from runs import checkpoints, log, names, settings, sft, sha, stop_after

ADAPTER = layout.ADAPTER
EVERY_STEP: dict[str, Any] = {"save_steps": 1, "eval_steps": 1, "val_set_size": 4, "lr_scheduler": "constant"}


def test_latest_resumes_the_branch_that_was_taken(
    tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes back to its second step with another learning rate, and is stopped before the first run's last."""
    how: dict[str, Any] = {"save_steps": 2, "save_total_limit": "none", "lr_scheduler": "constant", "warmup_steps": 0}
    output = tmp_path / "out"
    sft(tiny_model, title_rows, output, **how, max_steps=6)
    first, how = sha(output / "checkpoint-6" / ADAPTER), how | {"learning_rate": 2e-2, "max_steps": 8}
    stop_after(1, monkeypatch)
    with pytest.raises(Interrupted):
        sft(tiny_model, title_rows, output, **how, resume_from_checkpoint=str(output / "checkpoint-2"))
    monkeypatch.undo()
    assert checkpoints(output) == [2, 3]
    assert sha(output / "set-aside-checkpoint-6" / ADAPTER) == first
    sft(tiny_model, title_rows, output, **how, resume_from_checkpoint="latest")
    assert [line["learning_rate"] for line in log(output)] == [1e-2] * 2 + [2e-2] * 6
    sft(tiny_model, title_rows, output, **how, resume_from_checkpoint=str(output / "checkpoint-2"))
    assert sha(output / "set-aside-checkpoint-6" / ADAPTER) == first  # a second branch does not cost the first
    assert (output / "set-aside-checkpoint-6-2").is_dir()


def scripted(found: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    values: Iterator[float] = iter(found)
    monkeypatch.setattr(trainer, "evaluate", lambda *_: {"loss": next(values)})


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_best_step_comes_along(
    mirrored: bool, tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early stopping delivers the best step, though the run went on in another folder or on another machine."""
    one, two, url = tmp_path / "one", tmp_path / "two", str(tmp_path / "shared")
    how = EVERY_STEP | {"early_stopping_patience": 9, "save_total_limit": 1} | ({"mirror_to": url} if mirrored else {})
    scripted([3.0, 1.0, 2.0, 2.0], monkeypatch)
    sft(tiny_model, title_rows, one, **how, max_steps=4)
    best = sha(one / ADAPTER)
    assert best == sha(one / "checkpoint-2" / ADAPTER)
    if mirrored:
        shutil.rmtree(one)
    scripted([2.0, 2.0], monkeypatch)
    start = "latest" if mirrored else str(one / "checkpoint-4")
    sft(tiny_model, title_rows, two, **how, max_steps=6, resume_from_checkpoint=start)
    assert sha(two / ADAPTER) == best
    assert checkpoints(two) == [2, 6]
    if mirrored:
        assert {name.partition("/")[0] for name in names(url) if "/" in name} == {"checkpoint-2", "checkpoint-6"}


def test_without_the_best_step_the_last_one_is_delivered(
    tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    scripted([1.0, 2.0, 2.0, 2.0], monkeypatch)
    sft(tiny_model, title_rows, one, **EVERY_STEP, early_stopping_patience=9, max_steps=2)
    shutil.rmtree(one / "checkpoint-1")
    how = EVERY_STEP | {"early_stopping_patience": 9, "max_steps": 4}
    sft(tiny_model, title_rows, two, **how, resume_from_checkpoint=str(one / "checkpoint-2"))
    assert sha(two / ADAPTER) == sha(two / "checkpoint-4" / ADAPTER)


def test_an_evaluation_that_is_no_number_is_never_the_best(
    tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted([float("nan"), 2.0, 3.0], monkeypatch)
    result = sft(tiny_model, title_rows, tmp_path / "out", **EVERY_STEP, early_stopping_patience=9, max_steps=3)
    assert result.best_eval_loss == 2.0
    assert sha(tmp_path / "out" / ADAPTER) == sha(tmp_path / "out" / "checkpoint-2" / ADAPTER)


def test_copies_of_another_run_stay(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """A place for copies belongs to one run; those of another run are refused, or renamed if a run starts over."""
    url, how = f"memory://{tmp_path.name}/run", {"save_steps": 2, "max_steps": 4}
    sft(tiny_model, title_rows, tmp_path / "one", **how, mirror_to=url)
    before = names(url)
    with pytest.raises(CheckpointError, match=r"holds the checkpoints of another run; go on with --resume"):
        sft(tiny_model, title_rows, tmp_path / "two", **how, mirror_to=url)
    assert names(url) == before
    sft(tiny_model, title_rows, tmp_path / "two", max_steps=2, mirror_to=url, overwrite_output_dir=True)
    folders = {name.partition("/")[0] for name in names(url) if "/" in name}
    assert folders == {"checkpoint-2", "set-aside-checkpoint-2", "set-aside-checkpoint-4"}
    system, root = fsspec.core.url_to_fs(url)
    kept = system.cat_file(f"{root}/set-aside-checkpoint-4/{ADAPTER}")
    assert kept == (tmp_path / "one" / "checkpoint-4" / ADAPTER).read_bytes()


@pytest.mark.parametrize("start", [".", "checkpoint-2"])
def test_a_run_never_writes_over_what_it_begins_from(
    start: str, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    sft(tiny_model, title_rows, output, max_steps=2)
    before = {str(path): sha(path) for path in output.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="holds the weights that the run starts from; give another folder"):
        byeori.sft(base_model=output / start, data_path=title_rows, output_dir=output, overwrite_output_dir=True)
    assert {str(path): sha(path) for path in output.rglob("*") if path.is_file()} == before


def test_a_tracker_that_is_missing_costs_no_earlier_run(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sft(tiny_model, title_rows, output, max_steps=2)
    with pytest.raises(ConfigError, match=r"--report_to mlflow: it is not installed; pip install '.\[mlflow\]'"):
        sft(tiny_model, title_rows, output, max_steps=2, report_to="mlflow", overwrite_output_dir=True)
    assert checkpoints(output) == [2] and (output / ADAPTER).is_file()


def test_scores_of_an_earlier_adapter_go_with_it(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sft(tiny_model, title_rows, output, max_steps=2)
    (output / "metrics.json").write_text("{}")
    sft(tiny_model, title_rows, output, max_steps=3, resume_from_checkpoint="latest")
    assert not (output / "metrics.json").exists()
    (output / "metrics.json").write_text("{}")
    sft(tiny_model, title_rows, output, max_steps=2, overwrite_output_dir=True)
    assert not (output / "metrics.json").exists()


def test_a_card_of_the_users_own_stays(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """A folder with nothing but a README is free, and keeps it."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "README.md").write_text("mine")
    sft(tiny_model, title_rows, output, max_steps=1)
    sft(tiny_model, title_rows, output, max_steps=1, overwrite_output_dir=True)
    assert (output / "README.md").read_text() == "mine"


def test_a_settings_file_of_a_run_deletes_none(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sft(tiny_model, title_rows, output, max_steps=1, overwrite_output_dir=True)
    assert "overwrite_output_dir" not in (output / "byeori.yaml").read_text()


# ---- the same rows and the same base -----------------------------------------------------------------------------


def test_other_rows_are_refused(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    output, other = tmp_path / "out", tmp_path / "other.jsonl"
    sft(tiny_model, title_rows, output, max_steps=2)
    lines = title_rows.read_text(encoding="utf-8").splitlines()
    other.write_text("\n".join([*lines[:-1], json.dumps({"document": "가", "title": "나"})]), encoding="utf-8")
    (tmp_path / "moved.jsonl").write_text(title_rows.read_text(encoding="utf-8"), encoding="utf-8")
    how = {"max_steps": 3, "resume_from_checkpoint": "latest"}
    for rows, more in ((other, {}), (title_rows, {"template": "X{document}Y{title}"})):
        with pytest.raises(CheckpointError, match="the data or the template has changed; go on with the same, or give"):
            sft(tiny_model, rows, output, **how, **more)
    assert sft(tiny_model, tmp_path / "moved.jsonl", output, **how).steps == 3


def test_another_base_is_refused(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    output, other = tmp_path / "out", tmp_path / "other"
    sft(tiny_model, title_rows, output, max_steps=2)
    shutil.copytree(tiny_model, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(other)
    with pytest.raises(byeori.ByeoriError, match=r"and .* has other weights; give that base with --base_model$"):
        sft(other, title_rows, output, max_steps=3, resume_from_checkpoint="latest")
    with pytest.raises(byeori.ByeoriError, match=r"and .*other has other weights"):
        byeori.merge(
            peft_model_path=output / "checkpoint-2", base_model_name_or_path=other, output_dir=tmp_path / "merged"
        )
    shutil.copytree(tiny_model, tmp_path / "moved")
    assert sft(tmp_path / "moved", title_rows, output, max_steps=3, resume_from_checkpoint="latest").steps == 3


def test_a_checkpoint_of_another_trainer_is_an_adapter(
    trained: Path, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    """transformers' Trainer writes a trainer_state.json too; its weights can be trained further."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in (ADAPTER, "adapter_config.json"):
        shutil.copy(trained / name, folder / name)
    (folder / "trainer_state.json").write_text('{"log_history": []}')
    made = json.loads((trained / "adapter_config.json").read_text())
    how = {"lora_r": made["r"], "lora_alpha": made["lora_alpha"], "max_steps": 1}
    values = settings(tiny_model, title_rows, tmp_path / "out", **how, resume_from_checkpoint=str(folder))
    assert byeori.sft(**values).steps == 1
    (folder / "config.json").write_text("{}")  # some trainers leave the base's beside an adapter
    values = settings(folder, title_rows, tmp_path / "more", **how, template="title-ko")
    assert byeori.sft(**values).steps == 1


def test_a_merged_model_keeps_its_template(
    tiny_model: Path, title_rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = "P: {document}\nA:\n{title}"
    sft(tiny_model, title_rows, tmp_path / "one", max_steps=1, template=words)
    byeori.merge(peft_model_path=tmp_path / "one", output_dir=tmp_path / "merged")
    sft(tmp_path / "merged", title_rows, tmp_path / "two", max_steps=1)
    assert (tmp_path / "two" / "template.txt").read_text() == words
    rows = tmp_path / "alpaca.jsonl"
    rows.write_text(json.dumps({"instruction": "가", "input": "", "output": "나"}) + "\n", encoding="utf-8")
    capfd.readouterr()
    sft(tmp_path / "merged", rows, tmp_path / "three", max_steps=1)
    assert "names columns that the rows do not have" in " ".join(capfd.readouterr().err.split())
    assert "{instruction}" in (tmp_path / "three" / "template.txt").read_text()
