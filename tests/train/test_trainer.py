"""A run of byeori.sft is the run of a plain PyTorch loop, however it is cut up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, RwkvConfig, RwkvForCausalLM, get_scheduler

from byeori.commands import train
from byeori.errors import TrainingError
from byeori.losses.base import Sums, Targets
from byeori.losses.sft import SFT, sft_sum
from byeori.train import trainer
from plain_loop import examples, sequence_loss
from runs import checkpoints, command, log, losses, settings, sft, sha
from tiny_models import byte_level_tokenizer


def plain_run(values: dict[str, Any], order: list[int]) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """The same training in plain PyTorch, transformers and PEFT: one sequence at a time, no padding."""
    rows = examples(values)
    base = AutoModelForCausalLM.from_pretrained(values["base_model"], dtype=torch.float32, attn_implementation="eager")
    lora = LoraConfig(
        r=values["lora_r"], lora_alpha=values["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(42)
    model = get_peft_model(base, lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=values["learning_rate"], weight_decay=values["weight_decay"])
    batches = [order[start : start + 4] for start in range(0, len(order), 4)]
    scheduler = get_scheduler("linear", optimizer, values["warmup_steps"], len(batches))
    found = []
    for batch in batches:
        weight = sum(rows[row].target_count for row in batch)
        optimizer.zero_grad()
        loss = 0.0
        for row in batch:
            part = sequence_loss(model, rows[row]) / weight
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(trained, values["max_grad_norm"])
        optimizer.step()
        scheduler.step()
        found.append(loss)
    names = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    return found, {name.replace(".default", ""): tensor for name, tensor in names}, model


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@pytest.fixture(scope="module")
def reference(tiny_model: Path, title_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps."""
    output = tmp_path_factory.mktemp("reference")
    sft(tiny_model, title_rows, output)
    return output


@pytest.fixture(scope="module")
def plain(reference: Path, tiny_model: Path, title_rows: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    order = json.loads((reference / "order.json").read_text())
    found, weights, _ = plain_run(settings(tiny_model, title_rows, reference), order)
    return found, weights


def test_equals_a_plain_loop(reference: Path, plain: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    expected, weights = plain
    assert len(expected) == 12
    assert losses(reference) == pytest.approx(expected, rel=1e-5)
    assert furthest(adapter(reference), weights) < 1e-4  # of steps of 0.01: AdamW divides small gradients by themselves
    clipped = [line["grad_norm"] > 0.5 for line in log(reference)]
    assert any(clipped)  # the clipping was used


CUTS: list[dict[str, Any]] = [
    {"micro_batch_size": 1},
    {"micro_batch_size": 2},
    {"micro_batch_size": 4},
    {"micro_batch_tokens": 150},
    {"share_prefixes": "off"},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": "selective"},
    {"gradient_checkpointing": "offload"},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_result_does_not_depend_on_the_cut(
    cut: dict[str, Any], reference: Path, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    sft(tiny_model, title_rows, tmp_path / "out", **cut)
    assert losses(tmp_path / "out") == pytest.approx(losses(reference), rel=1e-5)
    assert furthest(adapter(tmp_path / "out"), adapter(reference)) < 1e-4


def test_two_processes_make_the_same_run(reference: Path, tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    process = command(settings(tiny_model, title_rows, tmp_path / "out"), processes=2)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert losses(tmp_path / "out") == pytest.approx(losses(reference), rel=1e-6)
    for mine, theirs in zip(log(tmp_path / "out"), log(reference), strict=True):
        assert mine["tokens"] == theirs["tokens"] and mine["target_tokens"] == theirs["target_tokens"]
    assert told.count("Done: 12 steps") == 1  # one process speaks


def test_shared_prefixes_save_tokens_and_nothing_else(reference: Path, tiny_model: Path, title_rows: Path) -> None:
    lines = log(reference)
    assert all(line["unique_tokens"] < line["tokens"] for line in lines)
    lengths = {row: e.targets[-1][1] - 1 for row, e in examples(settings(tiny_model, title_rows, reference)).items()}
    order = json.loads((reference / "order.json").read_text())
    assert [line["tokens"] for line in lines] == [
        sum(lengths[row] for row in order[start : start + 4]) for start in range(0, 48, 4)
    ]


def test_one_seed_makes_the_same_bits(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    how = {"lora_dropout": 0.1, "neftune_noise_alpha": 5.0, "num_epochs": 1, "group_by_length": True}
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        sft(tiny_model, title_rows, tmp_path / name, seed=seed, **how)
    hashes = [sha(tmp_path / name / "adapter_model.safetensors") for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]
    assert log(tmp_path / "a", timeless=True) == log(tmp_path / "b", timeless=True)


@pytest.mark.parametrize("how", [{"lora_dropout": 0.5}, {"neftune_noise_alpha": 50.0}], ids=str)
def test_noise_is_there_in_training_and_not_in_evaluation(
    how: dict[str, Any], tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    quiet = {"num_epochs": 1, "val_set_size": 4, "eval_steps": 1, "warmup_steps": 5}
    sft(tiny_model, title_rows, tmp_path / "plain", **quiet)
    sft(tiny_model, title_rows, tmp_path / "noisy", **quiet, **how)
    first, noisy = log(tmp_path / "plain")[:2], log(tmp_path / "noisy")[:2]
    assert first[0]["grad_norm"] != pytest.approx(noisy[0]["grad_norm"], rel=1e-3)
    # the first step of a warmup has rate 0: the weights are those at the start, and evaluation sees no noise
    assert first[1]["eval_loss"] == noisy[1]["eval_loss"]


def test_bf16_follows_float32(reference: Path, tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    sft(tiny_model, title_rows, tmp_path / "out", dtype="bfloat16")
    assert losses(tmp_path / "out") == pytest.approx(losses(reference), rel=1e-2)
    assert {tensor.dtype for tensor in adapter(tmp_path / "out").values()} == {torch.float32}


def test_the_result_says_what_the_log_says(reference: Path, tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    result = sft(tiny_model, title_rows, tmp_path / "out")
    lines = log(tmp_path / "out")
    assert (result.steps, result.first_loss, result.last_loss) == (12, lines[0]["loss"], lines[-1]["loss"])
    saved = 1 - sum(line["unique_tokens"] for line in lines) / sum(line["tokens"] for line in lines)
    assert result.shared_tokens == pytest.approx(saved)
    assert result.best_eval_loss is None
    assert [line["epoch"] for line in lines[:6]] == [0.1667, 0.3333, 0.5, 0.6667, 0.8333, 1.0]
    assert lines[0]["learning_rate"] == 0 and lines[3]["learning_rate"] == 1e-2


# ---- evaluation --------------------------------------------------------------------------------------------------


def independent_eval(values: dict[str, Any], folder: Path) -> float:
    rows = examples(values, held_out=True)
    base = AutoModelForCausalLM.from_pretrained(values["base_model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        total = sum(sequence_loss(model, example).item() for example in rows.values())
    return total / sum(example.target_count for example in rows.values())


def test_evaluation_is_the_mean_loss_of_the_held_out_rows(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    values = settings(tiny_model, title_rows, tmp_path / "out", val_set_size=7, eval_steps=2, max_steps=5)
    sft(tiny_model, title_rows, tmp_path / "out", val_set_size=7, eval_steps=2, max_steps=5)
    found = {line["step"]: line["eval_loss"] for line in log(tmp_path / "out") if "eval_loss" in line}
    assert list(found) == [2, 4, 5]  # every two steps, and the last
    assert found[5] == pytest.approx(independent_eval(values, tmp_path / "out"), rel=1e-5)
    assert found[2] == pytest.approx(independent_eval(values, tmp_path / "out" / "checkpoint-2"), rel=1e-5)


def evaluations(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Let the evaluations of a run come out as we want them."""
    found = iter(values)
    monkeypatch.setattr(trainer, "evaluate", lambda *_: {"loss": next(found)})


EVERY_STEP: dict[str, Any] = {"val_set_size": 6, "eval_steps": 1, "save_steps": 1}


def test_early_stopping_restores_the_best(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    output, how = tmp_path / "out", EVERY_STEP | {"early_stopping_patience": 2, "save_total_limit": 1, "max_steps": 9}
    evaluations(monkeypatch, [3.0, 2.5, 2.8, 2.4, 2.6, 2.4])
    result = sft(tiny_model, title_rows, output, **how)
    assert (result.steps, result.best_eval_loss) == (6, 2.4)  # 2.4 again is no improvement
    best = output / "checkpoint-4" / "adapter_model.safetensors"
    assert checkpoints(output) == [4, 6]  # the best is never deleted, whatever save_total_limit says
    assert sha(output / "adapter_model.safetensors") == sha(best)
    evaluations(monkeypatch, [])
    again = sft(tiny_model, title_rows, output, **how, resume_from_checkpoint="latest")
    assert again.steps == 6  # a run that was stopped stays stopped
    assert sha(output / "adapter_model.safetensors") == sha(best)


def test_early_stopping_survives_a_resume(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    """One evaluation without gain before the stop, one after it: two."""
    output, how = tmp_path / "out", EVERY_STEP | {"early_stopping_patience": 2, "save_total_limit": "none"}
    evaluations(monkeypatch, [3.0, 3.1, 2.0, 2.1, 2.2])
    sft(tiny_model, title_rows, output, **how)
    evaluations(monkeypatch, [2.0, 2.1, 2.2])
    folder = str(output / "checkpoint-2")
    result = sft(tiny_model, title_rows, output, **how, resume_from_checkpoint=folder)
    assert (result.steps, result.best_eval_loss) == (5, 2.0)
    assert [line["eval_loss"] for line in log(output) if "eval_loss" in line] == [3.0, 3.1, 2.0, 2.1, 2.2]


def test_the_best_checkpoint_is_not_pruned(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    evaluations(monkeypatch, [3.0, 2.0, 2.5, 2.6, 2.7, 2.8])
    sft(tiny_model, title_rows, tmp_path / "out", **EVERY_STEP, save_total_limit=2, max_steps=6)
    assert checkpoints(tmp_path / "out") == [2, 5, 6]


# ---- how long, and in which order ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "steps", "saved"),
    [
        ({"max_steps": 3}, 3, [3]),
        ({"num_epochs": 1.5}, 9, [6, 9]),
        ({"num_epochs": 0.1}, 1, [1]),
        ({"num_epochs": 1, "save_steps": 4}, 6, [4, 6]),
        ({"num_epochs": 1, "save_steps": 1, "save_total_limit": 2}, 6, [5, 6]),
    ],
    ids=str,
)
def test_steps_and_checkpoints(
    how: dict[str, Any], steps: int, saved: list[int], tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    result = sft(tiny_model, title_rows, tmp_path / "out", **how)
    assert result.steps == steps == len(losses(tmp_path / "out"))
    assert checkpoints(tmp_path / "out") == saved


def test_the_last_batch_may_be_smaller(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """22 rows: the sixth step has two, and its loss is the mean over their tokens alone."""
    values = settings(tiny_model, title_rows, tmp_path / "out", num_epochs=1, max_rows=22)
    sft(tiny_model, title_rows, tmp_path / "out", num_epochs=1, max_rows=22)
    order = json.loads((tmp_path / "out" / "order.json").read_text())
    assert sorted(order) == list(range(22))
    rows = examples(values)
    assert log(tmp_path / "out")[-1]["target_tokens"] == sum(rows[row].target_count for row in order[20:])
    expected, weights, _ = plain_run(values, order)
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=1e-5)
    assert furthest(adapter(tmp_path / "out"), weights) < 1e-4


def test_group_by_length_trains_all_rows_in_another_order(
    reference: Path, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    sft(tiny_model, title_rows, tmp_path / "out", group_by_length=True, num_epochs=1)
    order = json.loads((tmp_path / "out" / "order.json").read_text())
    assert sorted(order) == list(range(24))
    rows = examples(settings(tiny_model, title_rows, reference))
    lengths = np.array([len(rows[row].token_ids) for row in order]).reshape(6, 4)
    ranked = np.sort(lengths.reshape(-1))[::-1].reshape(6, 4)
    assert sorted(map(tuple, lengths.tolist())) == sorted(map(tuple, ranked.tolist()))


def test_logging_steps_thin_the_log(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    sft(tiny_model, title_rows, tmp_path / "out", logging_steps=4, max_steps=10)
    assert [line["step"] for line in log(tmp_path / "out")] == [4, 8, 10]


# ---- a model that cannot be packed --------------------------------------------------------------------------------


def test_a_model_with_states_of_its_own_trains_one_row_at_a_time(
    title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2}
    RwkvForCausalLM(RwkvConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    how = {"max_rows": 4, "num_epochs": 1, "lora_target_modules": "key", "warmup_steps": 0}
    sft(tmp_path / "base", title_rows, tmp_path / "out", **how)
    assert "one at a time" in capsys.readouterr().err
    rows = examples(settings(tmp_path / "base", title_rows, tmp_path / "out", **how))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():  # an adapter's B starts at zero: the first loss is the base's
        expected = sum(sequence_loss(model, example).item() for example in rows.values())
    weight = sum(example.target_count for example in rows.values())
    assert losses(tmp_path / "out") == pytest.approx([expected / weight], rel=1e-5)


# ---- steps that are not finite ------------------------------------------------------------------------------------


def break_steps(monkeypatch: pytest.MonkeyPatch, bad: set[int], value: float = math.nan) -> None:
    """Make the loss of some steps (counted from 1; one micro-batch a step) not finite."""
    calls = [0]

    def sums(logprobs: torch.Tensor, targets: Targets) -> Sums:
        calls[0] += 1
        return Sums(total=sft_sum(logprobs, targets).total * (value if calls[0] in bad else 1.0), logged={})

    monkeypatch.setattr(train, "objective_of", lambda _: replace(SFT, sums=sums))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_step_is_skipped_and_its_rows_are_named(
    value: float,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    title_rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_steps(monkeypatch, {2, 4}, value)
    output = tmp_path / "out"
    result = sft(
        tiny_model, title_rows, output, micro_batch_size=4, num_epochs=1, save_steps=1, save_total_limit="none"
    )
    assert result.steps == 6 and math.isfinite(result.last_loss)
    named = ", ".join(str(row + 1) for row in json.loads((output / "order.json").read_text())[4:8])
    told = " ".join(capsys.readouterr().err.split())
    assert f"step 2: the loss or its gradient is not finite; the step is skipped (rows {named})" in told
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        hashes = [sha(output / f"checkpoint-{step}" / name) for step in range(1, 7)]
        assert hashes[0] == hashes[1] != hashes[2] == hashes[3] != hashes[4]


def test_three_bad_steps_in_a_row_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    break_steps(monkeypatch, {1, 2, 4, 5, 6})
    with pytest.raises(
        TrainingError, match=r"not finite in 3 steps in a row, last with rows \d+, \d+, \d+, \d+; lower"
    ):
        sft(tiny_model, title_rows, tmp_path / "out", micro_batch_size=4, save_steps=2)
    assert checkpoints(tmp_path / "out") == [2, 3, 4]  # 3 holds the run from before the bad steps


@pytest.mark.parametrize(("keep", "step"), [("auto", 2), ("best", 2), ("last", 4)])
def test_the_adapter_of_the_best_or_of_the_last_step(
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    title_rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    keep: str,
    step: int,
) -> None:
    evaluations(monkeypatch, [3.0, 2.0, 2.5, 2.6])
    output = tmp_path / "out"
    sft(tiny_model, title_rows, output, **EVERY_STEP, max_steps=4, keep=keep)
    name = "adapter_model.safetensors"
    assert sha(output / name) == sha(output / f"checkpoint-{step}" / name)
    words = "the last" if step == 4 else "the best; see --keep"
    assert f"Adapter in {output} (step {step}, {words})" in capsys.readouterr().err
