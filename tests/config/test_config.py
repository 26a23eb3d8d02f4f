"""Settings: one declaration, every way of giving them, and the sentences for wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from byeori import config
from byeori.config import (
    CompareSettings,
    DemoSettings,
    GenerateSettings,
    MergeSettings,
    PreviewSettings,
    PublishSettings,
    SftSettings,
    check,
    flags,
)
from byeori.errors import ConfigError
from byeori.support.suggestions import nearest

KINDS = [
    SftSettings,
    PreviewSettings,
    MergeSettings,
    GenerateSettings,
    CompareSettings,
    PublishSettings,
    DemoSettings,
]
NEEDED: dict[str, Any] = {"base_model": "m", "data_path": "rows.jsonl", "output_dir": "out"}


def sft(**values: Any) -> SftSettings:
    return check(SftSettings, {**NEEDED, **values})


@pytest.mark.parametrize(
    "given",
    [
        "[gate_proj, down_proj, up_proj]",
        "gate_proj,down_proj,up_proj",
        "gate_proj down_proj up_proj",
        '["gate_proj", "down_proj", "up_proj"]',
        "['gate_proj','down_proj','up_proj']",
        ["gate_proj", "down_proj", "up_proj"],
        ("gate_proj", "down_proj", "up_proj"),
        ["[gate_proj,", "down_proj,", "up_proj]"],
        ['["gate_proj",', '"down_proj",', '"up_proj"]'],
        ["[gate_proj", ",down_proj", ",", "up_proj", "]"],
    ],
)
def test_lists_are_taken_in_every_form(given: Any) -> None:
    assert sft(lora_target_modules=given).lora_target_modules == ["gate_proj", "down_proj", "up_proj"]


@pytest.mark.parametrize(
    ("text", "value"), [("True", True), ("true", True), ("1", True), ("False", False), ("no", False)]
)
def test_booleans_from_text(text: str, value: bool) -> None:
    assert sft(train_on_inputs=text).train_on_inputs is value


@pytest.mark.parametrize("text", ["none", "None", "null", ""])
def test_none_from_text(text: str) -> None:
    assert sft(micro_batch_size=text, save_total_limit=text).save_total_limit is None


def test_paths_may_be_path_objects() -> None:
    made = sft(base_model=Path("m"), data_path=[Path("a.jsonl"), "b.jsonl"], output_dir=Path("o"))
    assert (made.base_model, made.data_path, made.output_dir) == ("m", ["a.jsonl", "b.jsonl"], "o")
    assert sft(data_path=Path("a.jsonl")).data_path == ["a.jsonl"]


def test_defaults_are_within_their_own_bounds() -> None:
    for kind in KINDS:
        for name, field in kind.model_fields.items():
            if not field.is_required():
                given = {other: "user/x" for other, wanted in kind.model_fields.items() if wanted.is_required()}
                full = {"finetune": "full"} if name == "master_weights" else {}  # refused for an adapter
                check(kind, {**given, **full, field.alias or name: field.default})


def test_settings_do_not_change_once_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        sft().batch_size = 4


def test_every_wrong_setting_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        sft(batch_size=0, learning_rate=-1, lerning_rate=1)
    said = str(error.value)
    assert "--batch_size 0" in said
    assert "--learning_rate -1" in said
    assert "there is no setting 'lerning_rate' (did you mean learning_rate?)" in said


def test_a_misspelt_value_has_a_near_one() -> None:
    with pytest.raises(ConfigError, match=r"--lr_scheduler 'lineer' \(did you mean linear\?\): input should be"):
        sft(lr_scheduler="lineer")
    with pytest.raises(ConfigError, match=r"--report_to: unknown 'tensorbord' \(did you mean tensorboard\?\)"):
        sft(report_to="tensorbord")
    with pytest.raises(ConfigError, match=r"--speed: unknown 'norm' \(did you mean norms\?\)"):
        sft(speed="norm")


def test_missing_settings_are_one_sentence() -> None:
    with pytest.raises(
        ConfigError,
        match="and its logs; --data_path is missing: Rows: files, folders, Hub datasets or URLs; --base_model is",
    ):
        check(SftSettings, {})


@pytest.mark.parametrize(
    ("name", "meant"), [("lr", "learning_rate"), ("--lr", "--learning_rate"), ("epochs", "num_epochs")]
)
def test_what_others_call_a_setting_is_known(name: str, meant: str) -> None:
    dashes = meant.startswith("-") * "--"
    known = [dashes + setting for setting in SftSettings.model_fields]
    assert nearest(name, known) == f" (did you mean {meant}?)"
    assert "learning_rate" not in nearest("lr", ["lora_r"])


def test_a_repository_has_a_user_and_a_name() -> None:
    with pytest.raises(ConfigError, match="--repo_id 'nouser': not a repository id; give user/name"):
        check(PublishSettings, {"folder": "f", "repo_id": "nouser"})


def test_a_setting_stands_in_yaml_once(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data_path: a.jsonl\ndata-path: b.jsonl\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the same setting twice \(data-path and data_path\); keep one"):
        config.read_yaml(str(path), SftSettings)


def test_a_long_value_is_shortened_in_the_sentence() -> None:
    with pytest.raises(ConfigError) as error:
        sft(batch_size="9" * 100_000)
    assert len(str(error.value)) < 300


def test_saved_settings_are_equal_when_read_again(tmp_path: Path) -> None:
    made = sft(
        learning_rate="1e-5",
        micro_batch_size=2,
        template="### 본문:\n{document}\n\n### 제목:\n{title}",
        lora_target_modules="[gate_proj, up_proj]",
        val_set_size=0.1,
        warmup_steps="100",
        resume_from_checkpoint="latest",
    )
    config.write_yaml(made, tmp_path / "byeori.yaml")
    assert check(SftSettings, config.read_yaml(str(tmp_path / "byeori.yaml"), SftSettings)) == made
    shown = check(PreviewSettings, {"base_model": "m", "data_path": "r", "json": True})
    config.write_yaml(shown, tmp_path / "preview.yaml")
    assert check(PreviewSettings, config.read_yaml(str(tmp_path / "preview.yaml"), PreviewSettings)) == shown


def test_yaml_takes_dashes_and_scientific_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning-rate: 1e-5\ndata-path: [a.jsonl, b.jsonl]\ntrain_on_inputs: yes\n", encoding="utf-8")
    read = config.read_yaml(str(path), SftSettings)
    made = check(SftSettings, {**NEEDED, **read})
    assert (made.learning_rate, made.data_path, made.train_on_inputs) == (1e-5, ["a.jsonl", "b.jsonl"], True)


def test_yaml_as_windows_saves_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("\ufefftemplate: '제목 {title}'\r\nseed: 1\r\n".encode())
    assert config.read_yaml(str(path), SftSettings) == {"template": "제목 {title}", "seed": 1}


def test_on_and_off_in_yaml_are_words(tmp_path: Path) -> None:
    """YAML reads them as true and false."""
    path = tmp_path / "run.yaml"
    path.write_text("share_prefixes: off\ncompile: on\nspeed: off\ngradient_checkpointing: off\n", encoding="utf-8")
    made = sft(**config.read_yaml(str(path), SftSettings))
    assert (made.share_prefixes, made.compile, made.speed) == ("off", "on", ["off"])
    assert made.gradient_checkpointing == "none"
    assert sft(speed=[False]).speed == ["off"]
    with pytest.raises(ConfigError, match=r"--speed: unknown 'on'.*; give auto, off, or some of"):
        sft(speed=True)


@pytest.mark.parametrize("paths", ["", " ", ["a.jsonl", ""]])
def test_an_empty_name_is_no_path(paths: Any) -> None:
    with pytest.raises(ConfigError, match=r"--data_path .*: an empty name is not a path"):
        sft(data_path=paths)


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base_model: !!python/object/apply:os.system ['touch ran']\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.read_yaml(str(path))


def test_one_source_for_an_answer() -> None:
    with pytest.raises(ConfigError, match="data_path and columns exclude each other"):
        check(GenerateSettings, {"model": "m", "data_path": "rows.jsonl", "columns": {"document": "x"}})


def test_the_users_home_is_found_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves it as it is in `--output_dir=~/out`, and so does YAML; a prompt is no path."""
    monkeypatch.setenv("HOME", "/home/me")
    values = {"base_model": "~/base", "data_path": ["~/a.jsonl", "b~/c.jsonl"], "output_dir": "~/out"}
    found = config.check(config.SftSettings, values)
    assert (found.base_model, found.output_dir) == ("/home/me/base", "/home/me/out")
    assert found.data_path == ["/home/me/a.jsonl", "b~/c.jsonl"]
    assert config.check(config.GenerateSettings, {"model": "m", "raw": "~/x"}).raw == "~/x"


def test_a_flag_of_texts_may_be_given_several_times() -> None:
    line = ["adapter", "rows.jsonl", "--output_dir", "o", "--metric", "regex:a, b", "--metric", "label", "json_valid"]
    settings = flags.settings_from(config.CompareSettings, line, see="")
    assert settings.metric == ["regex:a, b", "label", "json_valid"]
    one = {"adapter": "a", "data_path": "r", "output_dir": "o", "metric": "label"}
    assert config.check(config.CompareSettings, one).metric == ["label"]
