"""The model card that training writes: README.md of the finished adapter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from byeori.data import template
from runs import log, sft


@pytest.fixture(scope="module")
def run(tiny_model: Path, title_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("card") / "title-generator"
    sft(tiny_model, title_rows, output, max_steps=3, val_set_size=4, lora_target_modules=["up_proj", "down_proj"])
    return output


@pytest.fixture(scope="module")
def card(run: Path) -> str:
    return (run / "README.md").read_text(encoding="utf-8")


def test_the_header_is_one_that_the_hub_reads(card: str) -> None:
    """A base in a local folder is no Hub id, so that none is claimed."""
    assert yaml.safe_load(card.split("---\n", 2)[1]) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["byeori", "lora", "sft"],
    }


def test_it_says_what_it_is_and_whose_terms_apply(card: str, tiny_model: Path) -> None:
    assert "\n# title-generator\n" in card
    what = f"A LoRA adapter (rank 4) for `{tiny_model.name}`, trained with byeori."
    assert what in card and "The licence and terms of the base model apply." in card


def test_it_has_the_settings_and_the_losses(card: str, run: Path) -> None:
    table = dict(re.findall(r"^\| (.+) \| (.*) \|$", card.split("## Training")[1].split("##")[0], re.MULTILINE))
    shown = {"batch_size": "4", "learning_rate": "0.01", "cutoff_len": "256", "lora_r": "4", "lora_alpha": "8"}
    shown |= {"seed": "42", "max_steps": "3", "dtype": "float32", "warmup_steps": "3", "weight_decay": "0.1"}
    assert {name: table[name] for name in shown} == shown
    assert table["lora_target_modules"] == "up_proj, down_proj"
    lines = log(run)
    assert table["steps"] == "3"
    assert table["last training loss"] == f"{lines[-2]['loss']:.4g}"
    assert table["last evaluation loss"] == f"{lines[-1]['eval_loss']:.4g}"


def test_it_has_the_prompt_and_the_data(card: str) -> None:
    assert f"```\n{template.resolve('title-ko').text.rstrip()}\n```" in card
    assert "- `titles.jsonl`" in card
    assert "| train_rows | 20 |" in card and "| validation_rows | 4 |" in card


def test_its_commands_name_the_folder_and_no_place_on_this_machine(card: str, run: Path, tiny_model: Path) -> None:
    assert 'PeftModel.from_pretrained(model, "title-generator")' in card
    assert 'AutoTokenizer.from_pretrained("title-generator")' in card
    assert "--lora-modules tuned=title-generator" in card
    assert str(run.parent) not in card and str(tiny_model.parent) not in card and ".tmp" not in card
