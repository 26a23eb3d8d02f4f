"""The README tells the truth: its table is made from config.py, and both languages show the same commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from byeori import cli, config
from byeori.model import demo_model

ROOT = Path(__file__).parents[1]


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_table_of_settings_is_made_from_config() -> None:
    shown = _text("README.md").split("<!-- settings -->")[1].split("<!-- /settings -->")[0].strip()
    assert shown == config.table(config.SftSettings)
    shown = _text("README.md").split("<!-- settings-dpo -->")[1].split("<!-- /settings-dpo -->")[0].strip()
    assert shown == config.table(config.DpoSettings, besides=config.SftSettings)


@pytest.mark.parametrize(
    ("mark", "kind", "besides"),
    [("settings", config.SftSettings, None), ("settings-dpo", config.DpoSettings, config.SftSettings)],
)
def test_the_korean_table_has_the_same_settings_and_defaults(
    mark: str, kind: type[config.Settings], besides: type[config.Settings] | None
) -> None:
    def cells(table: str) -> list[list[str]]:
        return [line.strip("| ").split(" | ", 2) for line in table.strip().splitlines()[2:]]

    korean = cells(
        _text("README.ko.md").split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].replace("필수", "required")
    )
    english = cells(config.table(kind, besides=besides))
    assert [row[:2] for row in korean] == [row[:2] for row in english]
    assert all(re.search("[가-힣]", row[2]) for row in korean)


def test_both_languages_show_the_same_commands() -> None:
    def commands(name: str) -> list[str]:
        return re.findall(r"^(?:byeori|torchrun|MODEL=|ROWS=|    --|make ).*?(?:  #|$)", _text(name), re.MULTILINE)

    assert commands("README.md") == commands("README.ko.md")


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_the_functions_named_are_those_of_the_commands(name: str) -> None:
    (listed,) = re.findall(r"\((`sft`[^)]*)\)", _text(name))
    assert set(re.findall(r"`(\w+)`", listed)) == {command.replace("-", "_") for command in cli.COMMANDS}


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_the_terms_of_the_embedded_model_are_named_first_and_last(name: str) -> None:
    """Where the demo is offered and under the licence; `byeori demo` says the same on the screen (test_demo.py)."""
    link = "](https://ai.google.dev/gemma/terms)"
    assert link.strip("]()") in demo_model.TERMS
    parts = _text(name).split("\n## ")
    assert link in parts[1] and "make demo" in parts[1]
    assert link in parts[-1] and "Apache-2.0" in parts[-1]


def test_the_settings_file_is_one_that_training_reads() -> None:
    def read(name: str) -> config.SftSettings:
        (text,) = re.findall(r"```yaml\n(.*?)```", _text(name), re.DOTALL)
        return config.check(config.SftSettings, yaml.safe_load(text))

    assert read("README.md") == read("README.ko.md")


def test_links_in_the_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_plans_are_what_the_commands_print(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for this machine's processor, whose speed is measured, and the memory that this process holds."""
    monkeypatch.chdir(ROOT)
    section = _text("README.md").split("## Know before you rent")[1].split("\n## ")[0]
    commands = re.findall(r"^byeori (plan .*?[^\\])$", section.split("<!-- plans -->")[0], re.MULTILINE | re.DOTALL)
    shown = re.findall(r"```\n(.*?)```", section.split("<!-- plans -->")[1], re.DOTALL)
    assert len(commands) == len(shown) == 2
    for command, expected in zip(commands, shown, strict=True):
        assert cli.main(shlex.split(command.replace("\\\n", " "))) == 0
        assert _without_cpu(capsys.readouterr().out) == _without_cpu(expected)


def _without_cpu(plan: str) -> str:
    return re.sub(r"^CPU: .*?\n\n", "", plan, flags=re.MULTILINE | re.DOTALL).strip()
