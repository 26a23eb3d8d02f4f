"""The prompts on which a merged model is compared with its adapter: the training rows, if available."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import byeori
from byeori.data import template
from byeori.export import check_prompts
from tiny_models import sample_rows

TITLE_KO = template.parse(template.shipped()["title-ko"])
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "merge_report.json").read_text(encoding="utf-8"))
    return report


def documents(path: Path) -> list[str]:
    return [json.loads(line)["document"] for line in path.read_text(encoding="utf-8").splitlines()]


def texts_of(folder: Path) -> tuple[list[str], str]:
    ids, origin = check_prompts.prompts(folder, AutoConfig.from_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.decode(row, skip_special_tokens=False) for row in ids], origin


def copied(folder: Path, target: Path, **settings: object) -> Path:
    """Copy the folder, with other settings of the run."""
    shutil.copytree(folder, target)
    lines = [
        line
        for line in (folder / "byeori.yaml").read_text(encoding="utf-8").splitlines()
        if line.partition(":")[0] not in settings and not line.startswith("- ")
    ]
    lines += [f"{name}: {json.dumps(value)}" for name, value in settings.items()]
    (target / "byeori.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def test_the_difference_is_that_on_the_trained_prompts(trained: Path, merged: Path, tiny_model: Path) -> None:
    """Largest and mean, as computed by transformers and PEFT alone."""
    ids, _ = check_prompts.prompts(merged, AutoConfig.from_pretrained(merged))
    apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), trained).eval()
    whole = AutoModelForCausalLM.from_pretrained(merged).eval()
    with torch.inference_mode():
        pairs = [[model(torch.tensor([row])).logits[0] for model in (apart, whole)] for row in ids]
        difference = torch.cat([(a - b).abs() for a, b in pairs])
    report = report_of(merged)
    assert report["prompts_from"] == "training rows in the saved template" and report["prompts"] == 2
    assert report["positions"] == sum(map(len, ids)) == len(difference)
    # the order of the sums is not the same in a fused layer, and the differences are of that size
    assert report["max_abs_difference"] == pytest.approx(difference.max().item(), abs=1e-5)
    assert report["mean_abs_difference"] == pytest.approx(difference.mean().item(), abs=1e-6)
    assert 0 < report["mean_abs_difference"] < report["max_abs_difference"] < report["tolerance"]
    assert report["verdict"] == "equal" and report["adapter_effect"] > 0.1


def test_the_prompts_are_those_of_the_training_rows(merged: Path, title_rows: Path) -> None:
    texts, _ = texts_of(merged)
    for text, document in zip(texts, documents(title_rows)[:2], strict=True):
        # a document that is too long loses its end, as in training
        assert text in {TITLE_KO.prompt({"document": document[:end]}) for end in range(10, len(document) + 1)}


def test_texts_of_rows_are_not_in_the_report(merged: Path, title_rows: Path) -> None:
    report = (merged / "merge_report.json").read_text(encoding="utf-8")
    assert not any(document[:10] in report for document in documents(title_rows))


@pytest.mark.parametrize("paths", [["/nowhere.jsonl"], ["somebody/on-the-hub"], []])
def test_fixed_texts_fill_the_template_if_the_rows_are_gone(merged: Path, tmp_path: Path, paths: list[str]) -> None:
    texts, origin = texts_of(copied(merged, tmp_path / "merged", data_path=paths))
    assert origin == "fixed texts in the saved template"
    assert texts == [TITLE_KO.prompt({"document": text}) for text in check_prompts.TEXTS]


def test_rows_that_no_longer_fit_are_skipped(merged: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"document": null, "title": "a"}\n{"document": "봄이 왔다", "title": "b"}\n', encoding="utf-8")
    folder = copied(merged, tmp_path / "merged", data_path=[str(rows)], dataset_split="train")
    assert texts_of(folder) == ([TITLE_KO.prompt({"document": "봄이 왔다"})], "training rows in the saved template")
    rows.write_text('{"text": "a", "title": "b"}\n', encoding="utf-8")
    assert texts_of(folder)[1] == "fixed texts in the saved template"


def test_a_long_template(merged: Path, tmp_path: Path) -> None:
    folder = copied(merged, tmp_path / "merged", data_path=[])
    (folder / "template.txt").write_text("봄 " * 90 + "{document}\n{title}", encoding="utf-8")
    texts, origin = texts_of(folder)
    assert origin == "fixed texts in the saved template"
    assert len(AutoTokenizer.from_pretrained(folder)("봄 " * 90)["input_ids"]) > 256
    assert all(text.startswith("봄 " * 90) and text.endswith("\n") for text in texts)
    (folder / "template.txt").write_text("봄 " * 2000 + "{document}\n{title}", encoding="utf-8")
    assert texts_of(folder) == (list(check_prompts.TEXTS), "fixed texts, because the saved template is too long")


def test_messages_and_neither_template(merged: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "왜?"}, {"role": "assistant", "content": "그냥"}]
    rows.write_text(json.dumps({"messages": turns}, ensure_ascii=False) + "\n", encoding="utf-8")
    folder = copied(merged, tmp_path / "merged", data_path=[str(rows)], dataset_split="train")
    (folder / "template.txt").unlink()
    (folder / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    asked = "<|im_start|>user: 왜?<|im_end|><|im_start|>assistant: "
    assert texts_of(folder) == ([asked], "training rows in the tokenizer's chat template")
    (folder / "chat_template.jinja").unlink()
    assert texts_of(folder) == (list(check_prompts.TEXTS), "fixed texts without a template")


def test_pairs(tiny_model: Path, tmp_path: Path) -> None:
    rows = [row | {"rejected": row["rejected"][:40]} for row in sample_rows("preference-ko.jsonl")[:4]]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    byeori.dpo(
        base_model=tiny_model, data_path=path, output_dir=tmp_path / "adapter", cutoff_len=512, max_steps=1,
        dtype="float32",
    )  # fmt: skip
    byeori.merge(peft_model_path=tmp_path / "adapter", output_dir=tmp_path / "merged")
    assert report_of(tmp_path / "merged")["prompts_from"] == "training rows in the saved template"
    texts, _ = texts_of(tmp_path / "merged")
    for row, text in zip(rows, texts, strict=False):
        assert text.startswith(f"### System:\n{row['system'][:5]}") and text.endswith("\n\n### Assistant:\n")
        assert f"### User:\n{row['question'][:10]}" in text
