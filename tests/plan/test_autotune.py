"""What a run chooses by the plan where its settings are auto, and the comparison at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import byeori
from byeori import config
from byeori.artifacts import layout
from byeori.batch import loader
from byeori.commands import _planned, _rows
from byeori.data import row_kinds, tokenized
from byeori.distributed import processes as parallel
from byeori.errors import ConfigError
from byeori.plan import autotune, machines
from byeori.train import memory
from tiny_models import tiny_llama

Runs = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Train two steps on a machine of so many bytes; plan.json. A process that holds nothing but the model."""
    monkeypatch.setattr(autotune, "_SMALL", 0)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)

    def train(has: float, **changes: Any) -> dict[str, Any]:
        monkeypatch.setattr(memory, "total_bytes", lambda: int(has))
        how: dict[str, Any] = {"batch_size": 8, "max_steps": 2, "cutoff_len": 256, "learning_rate": 1e-3}
        how |= {"base_model": str(tiny_model), "data_path": str(title_rows), "dtype": "float32"}
        byeori.sft(**how | {"output_dir": str(tmp_path / "out"), "overwrite_output_dir": True} | changes)
        found: dict[str, Any] = json.loads((tmp_path / "out" / layout.PLAN).read_text(encoding="utf-8"))
        return found

    return train


def test_no_more_recomputation_than_needed(run: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    roomy = run(1e12)
    assert roomy["chosen"] == {"gradient_checkpointing": "none", "micro_batch_tokens": 2048, "load_in_4bit": False}
    assert roomy["fits"]
    said = capfd.readouterr().err
    assert "Plan: 2,048 tokens at once, which takes about " in said
    assert f"Peak memory {roomy['measured']['peak_bytes'] / 2**30:.2f} GiB" in said
    needs = [roomy["predicted"]["need_bytes"]]
    ways = [("none", 2048)]
    while (less := run(needs[-1], load_in_4bit=False))["fits"]:  # what the last run needed, and no headroom
        needs.append(less["predicted"]["need_bytes"])
        ways.append((less["chosen"]["gradient_checkpointing"], less["chosen"]["micro_batch_tokens"]))
    assert needs == sorted(needs, reverse=True)
    assert {tokens for _, tokens in ways} > {2048}
    assert {recompute for recompute, _ in ways} > {"none"}
    assert less["chosen"]["gradient_checkpointing"] == "full"
    assert "the run may run out of memory" in capfd.readouterr().err


def test_memory_is_held_up_to_the_plan(run: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits = []
    monkeypatch.setattr(memory, "give_back", lambda device, *, above=0: limits.append(above))
    planned = run(1e12, max_steps=4)["predicted"]["peak_bytes"]
    steps = [
        json.loads(line)["unique_tokens"] for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()
    ]
    larger = [all(tokens > before for before in steps[:index]) for index, tokens in enumerate(steps)]
    assert True in larger[1:] and False in larger
    assert limits == [0 if most else planned for most in larger]  # each step is one micro-batch here


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_target_modules": "nosuch"}, "no layer is called 'nosuch'"),
        ({"base_model": "gpt2", "load_in_4bit": True}, "GPT2LMHeadModel has no plain linear layers to quantize"),
    ],
)
def test_impossible_settings_are_refused_before_the_weights_are_read(
    run: Runs, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    if "base_model" in changes:
        from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        small = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2)
        GPT2LMHeadModel(small).save_pretrained(tmp_path / "gpt2")
        tokenizer.save_pretrained(tmp_path / "gpt2")
        changes = changes | {"base_model": str(tmp_path / "gpt2")}
    with pytest.raises(ConfigError, match=words):
        run(1e12, **changes)
    said = capfd.readouterr().err
    assert "No plan for this model" not in said
    assert "Loading" not in said


def test_given_settings_stay(run: Runs) -> None:
    found = run(1e6, gradient_checkpointing="selective", micro_batch_size=2, load_in_4bit=False)
    assert found["chosen"] == {"gradient_checkpointing": "selective", "micro_batch_size": 2, "load_in_4bit": False}
    assert not found["fits"]


def test_the_adapter_does_not_depend_on_the_choice(run: Runs, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    needs = run(1e12)["predicted"]["need_bytes"]
    roomy = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert run(0.7 * needs, load_in_4bit=False)["chosen"] != {}
    sparing = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, value in roomy.items():
        torch.testing.assert_close(sparing[name], value, rtol=1e-3, atol=1e-6)


def test_small_models_are_not_planned(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    byeori.sft(base_model=str(tiny_model), data_path=str(title_rows), output_dir=str(tmp_path / "out"), max_steps=1)
    assert not (tmp_path / "out" / layout.PLAN).exists()


def test_weights_are_sharded_where_they_do_not_fit(
    tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight processes on four machines."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tall = tiny_llama(len(tokenizer), num_hidden_layers=24, hidden_size=64, intermediate_size=256)
    tall.save_pretrained(tmp_path / "tall")
    tokenizer.save_pretrained(tmp_path / "tall")
    monkeypatch.setattr(autotune, "_SMALL", 0)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)
    monkeypatch.setattr(machines, "cpu_products", lambda dtype: 0)
    monkeypatch.setattr(autotune, "all_reduce_min", lambda value, processes: value)
    values = {"base_model": str(tmp_path / "tall"), "data_path": str(title_rows), "output_dir": str(tmp_path)}
    how = {"batch_size": 8, "micro_batch_size": 1, "load_in_4bit": False, "gradient_checkpointing": "full"}
    how |= {"cutoff_len": 256, "lora_r": 1, "lora_target_modules": "q_proj"}
    settings, start = _rows.begin(config.check(config.SftSettings, values | how))
    alone = parallel.Processes(rank=0, world=1, device=torch.device("cpu"))
    table = tokenized.Rows(table=_rows.prepare(settings, start, row_kind=row_kinds.ANSWER, processes=alone)[0].train)
    schedule = loader.schedule(len(table), batch_size=8, num_epochs=1, max_steps=None, seed=0)

    def choose(bytes_each: float, world: int, local_world: int) -> tuple[int, autotune.Forecast]:
        monkeypatch.setattr(memory, "total_bytes", lambda: int(bytes_each * local_world))
        processes = replace(alone, world=world, local_world=local_world)
        run = _planned.planned_run(settings)
        chosen = autotune.choose(run, start, table, schedule, processes, lambda text: None)
        assert chosen.forecast is not None
        return chosen.processes.shards, chosen.forecast

    assert choose(1e12, 8, 2)[0] == 1
    needs = {world: choose(1.0, world, world)[1].candidate.need for world in (1, 2, 8)}
    assert needs[1] > 1.1 * needs[2] > 1.2 * needs[8]
    assert [choose(1.04 * needs[world], 8, 2)[0] for world in (1, 2, 8)] == [1, 2, 8]
