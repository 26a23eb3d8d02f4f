"""Full fine-tuning is the run of a plain PyTorch loop over all weights, and leaves a whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import byeori
import forks
from byeori import config
from byeori.errors import CheckpointError, ConfigError, ModelError
from byeori.support import layer_ranges
from byeori.train import state as job
from byeori.train.masters import rounded
from plain_loop import examples, sequence_loss
from runs import environment, log, losses, settings, sha, stop_after


def how(model: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    values = settings(model, rows, output, **{"learning_rate": 1e-3, "finetune": "full"} | changes)
    return {name: value for name, value in values.items() if not name.startswith("lora_")}


def full(model: Path, rows: Path, output: Path, **changes: Any) -> Any:
    return byeori.sft(**how(model, rows, output, **changes))


def plain(values: dict[str, Any], order: list[int], dtype: torch.dtype) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training in plain PyTorch and transformers: one sequence at a time, with float32 copies."""
    rows = examples(values)
    model = AutoModelForCausalLM.from_pretrained(values["base_model"], dtype=dtype, attn_implementation="eager")
    masters = {name: p.detach().float().requires_grad_() for name, p in model.named_parameters()}
    decays = [[p for p in masters.values() if (p.dim() > 1) is many] for many in (True, False)]
    groups = [{"params": decays[0]}, {"params": decays[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=values["learning_rate"], weight_decay=values["weight_decay"])
    batches = [order[start : start + 4] for start in range(0, len(order), 4)]
    scheduler = get_scheduler("linear", optimizer, values["warmup_steps"], len(batches))
    found = []
    for batch in batches:
        weight = sum(rows[row].target_count for row in batch)
        optimizer.zero_grad()
        loss = 0.0
        for row in batch:
            model.zero_grad()
            part = sequence_loss(model, rows[row]) / weight
            part.backward()
            loss += part.item()
            for name, parameter in model.named_parameters():
                grad = parameter.grad.float()
                masters[name].grad = grad if masters[name].grad is None else masters[name].grad + grad
        torch.nn.utils.clip_grad_norm_(masters.values(), values["max_grad_norm"])
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        found.append(loss)
    return found, {name: p.detach() for name, p in model.named_parameters()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_a_plain_loop(dtype: str, tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    values = how(tiny_model, title_rows, tmp_path / "out", dtype=dtype)
    byeori.sft(**values)
    order = json.loads((tmp_path / "out" / "order.json").read_text())
    expected_losses, expected = plain(values, order, getattr(torch, dtype))
    found, start = weights(tmp_path / "out"), weights(tiny_model)
    assert losses(tmp_path / "out") == pytest.approx(expected_losses, rel=1e-5 if dtype == "float32" else 2e-2)
    for name, tensor in found.items():
        assert tensor.dtype == getattr(torch, dtype)
        moved = float((expected[name].float() - start[name]).norm())
        assert float((tensor - expected[name]).float().norm()) < (2e-4 if dtype == "float32" else 0.2) * moved, name


def test_only_some_layers(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    full(tiny_model, title_rows, tmp_path / "out", train_layers="last:1", max_steps=2)
    found, start = weights(tmp_path / "out"), weights(tiny_model)
    changed = {name for name in start if not torch.equal(found[name], start[name])}
    assert changed == {name for name in start if ".layers.1." in name}


def test_the_output_is_a_whole_model(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    full(tiny_model, title_rows, output, max_steps=2)
    names = {path.name for path in output.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "template.txt", "byeori.yaml", "README.md"}
    assert "adapter_config.json" not in names
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (tiny_model / name).read_bytes(), name
    prompt = {"document": "오늘 서울에 눈이 많이 내렸다"}
    answer = byeori.generate(model=str(output), columns=prompt, dtype="float32", max_new_tokens=8)
    assert len(answer) == 1
    assert "fine-tuned in full" in (output / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ModelError, match="is a whole model already; generate, export, serve and publish take it as it"):
        byeori.merge(peft_model_path=str(output), output_dir=str(tmp_path / "merged"))


def test_compared_with_the_base_that_it_began_from(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """Trained hard enough to change its answers; the loss of both sides is that of the two models."""
    full(tiny_model, title_rows, tmp_path / "out", learning_rate=1e-2)
    values = {"data_path": str(title_rows), "dtype": "float32", "max_new_tokens": 8, "max_rows": 4}
    found = byeori.compare(adapter=str(tmp_path / "out"), output_dir=str(tmp_path / "compared"), **values)
    base, tuned = (found.metrics[side]["loss"] for side in ("base", "tuned"))
    assert tuned < base
    start = byeori.compare(
        adapter=str(tmp_path / "out"), base_model=str(tmp_path / "out"), output_dir=str(tmp_path / "same"), **values
    )
    assert start.metrics["base"]["loss"] == pytest.approx(tuned, rel=1e-6)


def test_tied_weights_stay_tied(tied_model: Path, title_rows: Path, tmp_path: Path) -> None:
    full(tied_model, title_rows, tmp_path / "out", max_steps=2)
    found = weights(tmp_path / "out")
    assert found.keys() == weights(tied_model).keys()
    assert "lm_head.weight" not in found
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.fixture(scope="module")
def tied_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import byte_level_tokenizer, tiny_llama

    folder = tmp_path_factory.mktemp("tied")
    tokenizer = byte_level_tokenizer()
    tiny_llama(len(tokenizer), tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "master_weights": "stochastic", "optim": "adamw_8bit"},
        {"dtype": "bfloat16", "optim": "schedule_free_adamw"},
        {"optim": "muon", "train_layers": "1"},
    ],
    ids=str,
)
def test_stopped_and_resumed(
    changes: dict[str, Any], tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    full(tiny_model, title_rows, whole, max_steps=6, **changes)
    stop_after(3, monkeypatch)
    with pytest.raises(job.Interrupted):
        full(tiny_model, title_rows, cut, max_steps=6, **changes)
    monkeypatch.undo()
    full(tiny_model, title_rows, cut, max_steps=6, **changes, resume_from_checkpoint="latest")
    for name in ("model.safetensors", "checkpoint-6/optimizer.safetensors", "checkpoint-6/trainer_state.json"):
        assert sha(whole / name) == sha(cut / name), name
    assert log(whole, timeless=True) == log(cut, timeless=True)


def test_the_best_step_is_kept(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """A rate that destroys the model after its first step: the weights of that step are the ones that are saved."""
    changes = {"max_steps": 4, "val_set_size": 4, "eval_steps": 1, "learning_rate": 0.5, "save_total_limit": "none"}
    full(tiny_model, title_rows, tmp_path / "out", **changes, lr_scheduler="constant", warmup_steps=0)
    lines = [line for line in log(tmp_path / "out") if "eval_loss" in line]
    best = min(lines, key=lambda line: line["eval_loss"])["step"]
    assert best < 4
    assert sha(tmp_path / "out" / "model.safetensors") == sha(
        tmp_path / "out" / f"checkpoint-{best}" / "model.safetensors"
    )


def test_preference_pairs_against_the_base(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """The first step begins at a margin of zero: its loss is log 2."""
    rows = [json.loads(line) for line in title_rows.read_text(encoding="utf-8").splitlines()]
    pairs = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": row["document"], "chosen": row["title"], "rejected": rows[i - 1]["title"]}
        for i, row in enumerate(rows)
    ]
    pairs.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    values = how(tiny_model, pairs, tmp_path / "out", learning_rate=1e-4, max_steps=12, warmup_steps=0)
    byeori.dpo(**values)
    found = log(tmp_path / "out")
    assert found[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert max(line["loss"] for line in found[-3:]) < 0.69  # pairs that it has seen before
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_stochastic_rounding_is_right_on_average() -> None:
    """1 + 2^-10 lies an eighth of the way from 1 to the next bfloat16; its neighbours stay themselves."""
    values = torch.full((200_000,), 1 + 2.0**-10)
    generator = torch.Generator().manual_seed(0)
    found = rounded(values, torch.bfloat16, generator)
    assert set(found.tolist()) == {1.0, 1 + 2.0**-7}
    assert float((found.double() - 1).mean() / 2.0**-10) == pytest.approx(1, abs=0.03)
    exact = torch.tensor([0.0, -1.5, 3e38, -(2.0**-126)])
    assert torch.equal(rounded(exact, torch.bfloat16, generator).float(), exact.bfloat16().float())
    assert float(rounded(-values, torch.bfloat16, generator).double().mean()) == pytest.approx(
        -(1 + 2.0**-10), abs=3e-5
    )


def test_layers_by_number() -> None:
    assert layer_ranges.parse("last:2", 6) == [4, 5]
    assert layer_ranges.parse("first:2", 6) == [0, 1]
    assert layer_ranges.parse("0-2, 5", 6) == [0, 1, 2, 5]
    for text in ("last:0", "6-4", "a", "", "1,,2"):
        with pytest.raises(ValueError, match="give last:8, first:4 or numbers such as 0-3,20-23"):
            layer_ranges.parse(text)
    with pytest.raises(ValueError, match="layer 6 is not there; this model has 6 layers, counted from 0"):
        layer_ranges.parse("6", 6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_r": 8}, "lora_r does not apply to finetune full, which trains the weights; leave it out"),
        ({"lora_r": 16}, "lora_r does not apply to finetune full"),  # its default: given all the same
        ({"load_in_4bit": True}, "load_in_4bit does not apply to finetune full"),
        ({"dtype": "float16"}, "finetune full needs dtype bfloat16 or float32"),
        ({"train_layers": "last:3"}, "--train_layers: 'last:3' is more than the 2 layers of this model"),
        ({"train_layers": "top"}, "give last:8, first:4"),
        ({"finetune": "lora", "train_layers": "last:1"}, "train_layers needs finetune full"),
        ({"finetune": "lora", "master_weights": "float32"}, "master_weights needs finetune full"),
        ({"master_weights": "stochastic", "optim": "schedule_free_adamw"}, "needs master_weights float32"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(
    changes: dict[str, Any], words: str, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    given = how(tiny_model, title_rows, tmp_path / "out") | changes
    with pytest.raises(ConfigError, match=words):
        byeori.sft(**given)
    if "train_layers" not in changes:  # numbers of layers are the model's affair
        with pytest.raises(ConfigError, match=words):
            byeori.plan(**given)


def test_a_run_can_be_repeated_with_its_own_settings() -> None:
    """byeori.yaml does not hold what the other kind of training would have read."""
    for kind, other in (("full", "lora_r"), ("lora", "master_weights")):
        given = {"base_model": "m", "data_path": "r", "output_dir": "o", "finetune": kind}
        run = config.recorded(config.check(config.SftSettings, given))
        assert other not in run
        assert config.recorded(config.check(config.SftSettings, run)) == run


def test_checkpoints_of_the_other_kind_are_refused(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    full(tiny_model, title_rows, tmp_path / "out", max_steps=1)
    lora = settings(tiny_model, title_rows, tmp_path / "out", resume_from_checkpoint="latest")
    with pytest.raises(CheckpointError, match="was written with --finetune full, not lora"):
        byeori.sft(**lora)


MANY = Path(__file__).parents[1] / "helpers" / "many.py"


def group(jobs: list[tuple[str, dict[str, Any]]], folder: Path) -> None:
    plan = folder / "runs.json"
    plan.write_text(json.dumps(jobs), encoding="utf-8")
    done = forks.run(MANY, plan, 2, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_rows_of_matrices_are_refused(name: str, tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """Muon's step of a row depends on the other rows, which other processes hold."""
    job = how(tiny_model, title_rows, tmp_path / "out", max_steps=1) | {"optim": name, "parallel": "fsdp"}
    (tmp_path / "runs.json").write_text(json.dumps([("sft", job)]), encoding="utf-8")
    done = forks.run(MANY, tmp_path / "runs.json", 2, env=environment(), timeout=300)
    assert done.returncode != 0 and f"--optim {name} works on whole matrices" in done.stderr


def test_two_processes_with_whole_and_with_sharded_weights(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """The same losses and weights as one process; sharded, the run stops and goes on with the same bits."""
    base = how(tiny_model, title_rows, tmp_path / "one", dtype="bfloat16", max_steps=4, learning_rate=1e-3)
    byeori.sft(**base)
    jobs = [
        ("sft", base | {"output_dir": str(tmp_path / "ddp"), "parallel": "ddp"}),
        ("sft", base | {"output_dir": str(tmp_path / "fsdp"), "parallel": "fsdp", "save_steps": 2}),
    ]
    group(jobs, tmp_path)
    start = weights(tiny_model)
    for name in ("ddp", "fsdp"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
        found, expected = weights(tmp_path / name), weights(tmp_path / "one")
        moved = sum(float((expected[key].float() - start[key]).square().sum()) for key in start) ** 0.5
        apart = sum(float((expected[key].float() - found[key].float()).square().sum()) for key in start) ** 0.5
        assert apart < 0.2 * moved, name
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "fsdp", again)
    shutil.rmtree(again / "checkpoint-4")
    more = {"output_dir": str(again), "resume_from_checkpoint": str(again / "checkpoint-2")}
    group([("sft", jobs[1][1] | more)], tmp_path)
    for file in ("model.safetensors", "checkpoint-4/optimizer.safetensors"):
        assert sha(again / file) == sha(tmp_path / "fsdp" / file), file


def test_new_tokens(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """Their rows start at the mean and are trained; the output is a whole model with the longer vocabulary."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(title_rows.read_text(encoding="utf-8").replace('": "', '": "<tool>'), encoding="utf-8")
    result = full(tiny_model, rows, tmp_path / "out", add_tokens="<tool>", num_epochs=1)
    assert result.last_loss < result.first_loss
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    (number,) = tokenizer("<tool>", add_special_tokens=False).input_ids
    model, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", tiny_model))
    count = model.config.vocab_size
    assert count == len(model.get_input_embeddings().weight) == number + 1 > before.config.vocab_size
    mean = before.get_input_embeddings().weight.detach().mean(dim=0)
    moved = (model.get_input_embeddings().weight[number] - mean).norm()
    assert 0 < float(moved.detach()) < 0.5 * float(mean.norm() + 1)
    answers = byeori.generate(model=tmp_path / "out", data_path=rows, max_rows=2, max_new_tokens=4)
    assert answers
    with pytest.raises(ConfigError, match="train_layers leaves frozen"):
        full(tiny_model, rows, tmp_path / "two", add_tokens="<tool>", train_layers="last:1")
