"""Preference training against plain PyTorch: two forward passes for each answer, one sequence at a time."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import byeori
from byeori import config
from byeori.commands import _rows
from byeori.data import row_kinds, tokenized
from byeori.distributed import processes
from byeori.errors import CheckpointError, ConfigError, DataError
from byeori.train import reference as references
from runs import DEFAULTS, log, losses
from tiny_models import sample_rows

Pair = list[tokenized.Example]


@pytest.fixture(scope="module")
def pair_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 16 preference rows, the first question asked twice."""
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    found = sample_rows("preference-ko.jsonl")[:16]
    for row in found:  # short answers: a float32 sum of many log-probs is not exact to 1e-5
        row |= {"chosen": row["chosen"][:12], "rejected": row["rejected"][-12:]}
    found[5] |= {name: found[0][name] for name in ("system", "question")}
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


def settings(model: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    paths = {"base_model": str(model), "data_path": str(data), "output_dir": str(output)}
    return DEFAULTS | paths | {"cutoff_len": 400, "max_steps": 3, "beta": 0.3, "learning_rate": 5e-3} | changes


def dpo(model: Path, data: Path, output: Path, **changes: Any) -> Any:
    return byeori.dpo(**settings(model, data, output, **changes))


def pairs(values: dict[str, Any]) -> dict[int, Pair]:
    """Tokenized pairs by their place in the source."""
    checked, begun = _rows.begin(config.check(config.DpoSettings, values))
    alone = processes.Processes(rank=0, world=1, device=torch.device("cpu"))
    table = _rows.prepare(checked, begun, row_kind=row_kinds.PREFERENCE, processes=alone)[0].train
    found = [tokenized.Rows(table=table).unit(index) for index in range(len(table) // 2)]
    return {pair[0].row: pair for pair in found}


def answer_logprob(model: Any, example: tokenized.Example) -> torch.Tensor:
    """Sum of log p over the trained tokens of one sequence."""
    ids = torch.tensor([list(example.token_ids)])
    logprobs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return torch.stack([logprobs[i - 1, ids[0, i]] for low, high in example.targets for i in range(low, high)]).sum()


def plain_run(values: dict[str, Any], order: list[int]) -> tuple[list[float], dict[str, torch.Tensor]]:
    known = pairs(values)
    base = AutoModelForCausalLM.from_pretrained(values["base_model"], dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(42)
    lora = LoraConfig(
        r=values["lora_r"], lora_alpha=values["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=values["learning_rate"], weight_decay=values["weight_decay"])
    found = []
    for step in range(values["max_steps"]):
        optimizer.param_groups[0]["lr"] = values["learning_rate"] * min(1, step / values["warmup_steps"])
        optimizer.zero_grad()
        batch = order[step * 4 : step * 4 + 4]
        loss = 0.0
        for row in batch:
            chosen, rejected = known[row]
            with torch.no_grad(), model.disable_adapter():
                apart = answer_logprob(model, chosen) - answer_logprob(model, rejected)
            logits = values["beta"] * (answer_logprob(model, chosen) - answer_logprob(model, rejected) - apart)
            part = -torch.nn.functional.logsigmoid(logits) / len(batch)
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(trained, values["max_grad_norm"])
        optimizer.step()
        found.append(loss)
    names = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    return found, {name.replace(".default", ""): tensor for name, tensor in names}


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def test_equals_a_plain_loop_of_two_passes(tiny_model: Path, pair_rows: Path, tmp_path: Path) -> None:
    dpo(tiny_model, pair_rows, tmp_path / "out")
    order = json.loads((tmp_path / "out" / "order.json").read_text())
    expected, weights = plain_run(settings(tiny_model, pair_rows, tmp_path / "out"), order)
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=1e-5)
    assert expected[0] == pytest.approx(math.log(2), rel=1e-6) and abs(expected[2] - expected[0]) > 1e-3
    assert furthest(adapter(tmp_path / "out"), weights) < 5e-5  # of steps of 0.005


CUTS: list[dict[str, Any]] = [{"micro_batch_size": 1}, {"micro_batch_tokens": 90}, {"share_prefixes": "off"}]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo"])
def test_the_result_does_not_depend_on_the_cut(
    loss: str, cut: dict[str, Any], tiny_model: Path, pair_rows: Path, tmp_path: Path
) -> None:
    dpo(tiny_model, pair_rows, tmp_path / "one", loss=loss, micro_batch_size=4)
    dpo(tiny_model, pair_rows, tmp_path / "other", loss=loss, **cut)
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_the_log_and_the_evaluation(tiny_model: Path, pair_rows: Path, tmp_path: Path) -> None:
    dpo(tiny_model, pair_rows, tmp_path / "out", val_set_size=4, max_steps=3, eval_steps=3)
    *steps, held_out = log(tmp_path / "out")
    first = steps[0]
    assert first["margin"] == pytest.approx(0, abs=1e-5) and first["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[2]["margin"] == pytest.approx(steps[2]["rewards_chosen"] - steps[2]["rewards_rejected"], abs=1e-5)
    assert steps[2]["margin"] > 0 and steps[2]["kl"] > 0 and 0 <= steps[2]["accuracy"] <= 1
    assert first["rows"] == 4 and first["unique_tokens"] < 0.8 * first["tokens"]
    assert {"eval_loss", "eval_accuracy", "eval_margin", "eval_kl"} <= held_out.keys()


def test_the_reference_is_computed_once(
    tiny_model: Path, pair_rows: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], references._compute
    monkeypatch.setattr(references, "_compute", lambda *given: calls.append(len(given[2])) or real(*given))
    dpo(tiny_model, pair_rows, tmp_path / "one", max_steps=None, num_epochs=2)
    assert sum(calls) == 16  # every pair once, over two epochs
    dpo(tiny_model, pair_rows, tmp_path / "two", max_steps=None, num_epochs=2, beta=0.1, learning_rate=1e-4)
    assert sum(calls) == 20  # another run of the same content computes the first step's rows alone, to compare
    assert len(list(own_cache.iterdir())) == 1
    dpo(tiny_model, pair_rows, tmp_path / "three", max_steps=1, add_eos_token=False)
    assert sum(calls) == 24 and len(list(own_cache.iterdir())) == 2  # other content; and only the rows of its one step
    assert losses(tmp_path / "one")[0] == pytest.approx(losses(tmp_path / "two")[0], rel=1e-5)


def test_a_reference_that_was_cut_short_is_completed(
    tiny_model: Path, pair_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [0], references._compute

    def interrupted(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(references, "_compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dpo(tiny_model, pair_rows, tmp_path / "out", max_steps=None, num_epochs=1)
    dpo(tiny_model, pair_rows, tmp_path / "out", max_steps=None, num_epochs=1)
    assert calls[0] == 6  # two were kept, of which the first is compared, and two were missing
    monkeypatch.undo()
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "fresh"))
    dpo(tiny_model, pair_rows, tmp_path / "whole", max_steps=None, num_epochs=1)
    assert losses(tmp_path / "whole") == losses(tmp_path / "out")


def test_a_damaged_reference_is_computed_again(
    tiny_model: Path, pair_rows: Path, tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dpo(tiny_model, pair_rows, tmp_path / "whole", max_steps=None, num_epochs=1)
    (file,) = own_cache.iterdir()
    right = file.read_bytes()
    damaged = bytearray(right)
    damaged[len(right) // 2] ^= 0x40
    file.write_bytes(damaged)
    dpo(tiny_model, pair_rows, tmp_path / "one", max_steps=None, num_epochs=1)
    assert file.read_bytes() == right and losses(tmp_path / "one") == losses(tmp_path / "whole")
    # whole, and of another model
    capsys.readouterr()
    other = np.frombuffer(right, dtype=np.float32).copy()
    table = pairs(settings(tiny_model, pair_rows, tmp_path / "x"))
    lengths = [sum(stop - start for example in table[i] for start, stop in example.targets) for i in sorted(table)]
    bounds = np.cumsum([0, *lengths])
    sums = other[bounds[-1] :].view(np.uint32)
    other[: bounds[-1]] -= 0.1
    sums[:] = [zlib.crc32(other[start:stop].tobytes()) for start, stop in itertools.pairwise(bounds)]
    other.tofile(file)
    dpo(tiny_model, pair_rows, tmp_path / "two", max_steps=None, num_epochs=1)
    assert "are not those of this model; computing them again" in capsys.readouterr().err
    assert file.read_bytes() == right and losses(tmp_path / "two") == losses(tmp_path / "whole")


@pytest.mark.parametrize("changed", ["rope_theta", "embedding"])
def test_the_reference_of_another_base_is_not_used(
    changed: str, tiny_model: Path, pair_rows: Path, tmp_path: Path, own_cache: Path
) -> None:
    """In config.json alone, or in one row of the embedding, in the middle of its tensor."""
    dpo(tiny_model, pair_rows, tmp_path / "one", max_steps=1)
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    if changed == "rope_theta":
        text = (base / "config.json").read_text(encoding="utf-8")
        config = json.loads(text)
        config["rope_parameters"]["rope_theta"] = 12.0
        (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    else:
        tensors = load_file(base / "model.safetensors")
        name = next(name for name in tensors if "embed_tokens" in name)
        tensors[name][len(tensors[name]) // 2 :] *= 1.5
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    dpo(base, pair_rows, tmp_path / "two", max_steps=1)
    assert len(list(own_cache.iterdir())) == 2
    assert log(tmp_path / "two")[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)


def test_an_sft_adapter_is_the_reference_and_is_trained_further(trained: Path, pair_rows: Path, tmp_path: Path) -> None:
    template = "### 본문:\n{question}\n\n### 제목:\n{title}"
    dpo(trained, pair_rows, tmp_path / "out", lora_r=16, lora_alpha=16, template=template)
    lines = log(tmp_path / "out")
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)  # at the adapter, not at the base
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    before, after = adapter(trained), adapter(tmp_path / "out")
    assert 0 < furthest(after, before) < 0.1
    recorded, first = (json.loads((path / "byeori_base.json").read_text()) for path in (tmp_path / "out", trained))
    assert recorded == {**first, "rows_sha256": recorded["rows_sha256"]}
    with pytest.raises(ConfigError, match="--lora_r 4 is not that of the adapter"):
        dpo(trained, pair_rows, tmp_path / "other", lora_r=4, lora_alpha=16)


def test_a_resumed_run_ends_with_the_same_bits(tiny_model: Path, pair_rows: Path, tmp_path: Path) -> None:
    same: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "lora_dropout": 0.1}
    dpo(tiny_model, pair_rows, tmp_path / "whole", **same)
    dpo(tiny_model, pair_rows, tmp_path / "parts", **same)
    (tmp_path / "parts" / "adapter_model.safetensors").unlink()
    resume = str(tmp_path / "parts" / "checkpoint-2")
    dpo(tiny_model, pair_rows, tmp_path / "parts", **same, resume_from_checkpoint=resume)
    assert furthest(adapter(tmp_path / "parts"), adapter(tmp_path / "whole")) == 0
    assert log(tmp_path / "parts", timeless=True) == log(tmp_path / "whole", timeless=True)


def test_a_checkpoint_of_sft_is_not_resumed(
    tiny_model: Path, pair_rows: Path, title_rows: Path, tmp_path: Path
) -> None:
    byeori.sft(**DEFAULTS | {"base_model": tiny_model, "data_path": title_rows, "max_steps": 1, "output_dir": tmp_path})
    with pytest.raises(CheckpointError, match="was written by byeori sft; to train its weights further, give it as"):
        dpo(tiny_model, pair_rows, tmp_path / "o", resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_bad_rows_are_named_once(tiny_model: Path, pair_rows: Path, tmp_path: Path) -> None:
    lines = pair_rows.read_text(encoding="utf-8").splitlines()
    bad = json.loads(lines[2]) | {"rejected": ""}
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:2], json.dumps(bad), *lines[3:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"^bad.jsonl line 3: the answer, column 'rejected', is empty; fix"):
        dpo(tiny_model, tmp_path / "bad.jsonl", tmp_path / "out")
    dpo(tiny_model, tmp_path / "bad.jsonl", tmp_path / "out", on_bad_rows="drop", max_steps=1)
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert (found["rows"], found["train_rows"], found["dropped_rows"]) == (16, 15, 1)


def test_settings_that_do_not_belong_to_a_loss(tiny_model: Path, pair_rows: Path, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing belongs to the losses sigmoid and simpo"),
        ({"simpo_gamma": 1.0}, "simpo_gamma belongs to the loss simpo, not sigmoid"),
        ({"train_on_inputs": True}, "train_on_inputs does not apply to pairs"),
        ({"loss": "dpo"}, r"--loss 'dpo' \(did you mean ipo\?\): input should be 'sigmoid', 'ipo'"),
    ]
    for changes, words in wrong:
        with pytest.raises(ConfigError, match=words):
            dpo(tiny_model, pair_rows, tmp_path / "out", **changes)
