"""The screen of the plan: presets, every setting, and a command that means what the page does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from byeori import config
from byeori.studio import plan
from studio_page import meant, wait_for


@pytest.mark.parametrize("command", ["sft", "dpo"])
@pytest.mark.parametrize("name", ["quick", "balanced", "best"])
def test_presets_are_settings_that_training_accepts(command: str, name: str, page: TestClient) -> None:
    page.post("/plan-keep", data={"command": command})
    page.post("/plan-preset", data={"name": name})
    html = page.get("/plan").text
    shown, settings = meant(html)
    assert shown == command
    for key, value in plan.presets(command)[name].items():
        assert getattr(settings, key) == value
        assert key in html


def test_a_preset_forgets_the_other(page: TestClient) -> None:
    page.post("/plan-preset", data={"name": "best"})
    page.post("/plan-preset", data={"name": "balanced"})
    _, settings = meant(page.get("/plan").text)
    assert settings.early_stopping_patience is None and settings.lora_r == 16


def test_every_setting_of_help_is_in_the_form(page: TestClient) -> None:
    from byeori.config.flags import flags

    html = page.get("/plan").text
    elsewhere = {*plan.ELSEWHERE, "resume_from_checkpoint", "overwrite_output_dir"}
    assert not [name for name in flags(config.SftSettings) if name not in elsewhere and f'name="{name}"' not in html]


def test_what_is_filled_in_is_kept(page: TestClient) -> None:
    given = {"learning_rate": "3e-5", "max_steps": "7", "lora_target_modules": "q_proj v_proj", "keep": "last"}
    page.post("/plan-keep", data={"command": "sft", "output_dir": "out", "speed": "", "batch_size": "4", **given})
    command, settings = meant(page.get("/plan").text)
    assert (command, settings.learning_rate, settings.max_steps, settings.batch_size) == ("sft", 3e-5, 7, 4)
    assert settings.lora_target_modules == ["q_proj", "v_proj"] and settings.output_dir == "out"
    page.post("/plan-keep", data={"command": "sft", "max_steps": ""})
    assert meant(page.get("/plan").text)[1].max_steps is None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("learning_rate", "fast", "--learning_rate"),
        ("batch_size", "0", "--batch_size"),
        ("output_dir", "../out", "is outside"),
        ("command", "rlhf", "there is no training"),
    ],
)
def test_what_is_wrong_is_said(name: str, value: str, said: str, page: TestClient) -> None:
    assert said in page.post("/plan-keep", data={"command": "sft", name: value}).text


def test_pairs_choose_dpo(page: TestClient, tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    page.post("/data-choose", data={"path": "pairs.jsonl"})
    assert meant(page.get("/plan").text)[0] == "dpo"


def test_it_plans(page: TestClient) -> None:
    page.post("/plan-keep", data={"command": "sft", "do": "plan", "max_steps": "3", "cutoff_len": "512"})
    html = wait_for(lambda: "<table>" in (html := page.get("/plan-result").text) and html)
    assert all(word in html for word in ("this machine", "cheapest", "fastest", "smallest", "GiB"))
    picture = page.get("/plan-picture")
    assert "<svg" in picture.text and picture.headers["content-security-policy"].startswith("sandbox")
    assert picture.headers["x-frame-options"] == "SAMEORIGIN"
