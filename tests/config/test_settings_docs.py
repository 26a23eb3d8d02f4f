"""docs/settings.md and docs/settings.ko.md are what scripts/settings_docs.py writes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from byeori import cli, config
from byeori.config import flags

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("settings_docs", ROOT / "scripts" / "settings_docs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("language", "name"), [("en", "settings.md"), ("ko", "settings.ko.md")])
def test_the_page_is_current(script: Any, language: str, name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == script.page(language), (
        "python scripts/settings_docs.py"
    )


@pytest.mark.parametrize("command", sorted(set(cli.COMMANDS) - {"demo-model"}))
def test_a_table_has_every_setting_with_its_default(script: Any, command: str) -> None:
    kind = cli.COMMANDS[command]
    table = "\n".join(script.table(kind, command))
    for name, field in flags.flags(kind).items():
        (row,) = re.findall(rf"^\| `--{name}` \|.*$", table, re.MULTILINE)
        assert field.description in row
        assert ("| required |" in row) == field.is_required()
    korean = script.table(kind, command, "ko")
    assert all(re.search("[가-힣]", line.split(" | ")[-1]) for line in korean if line.startswith("| `--"))
    assert len(korean) == len(table.splitlines())


def test_the_table_of_dpo_has_only_what_sft_lacks(script: Any) -> None:
    rows = [line for line in script.table(config.DpoSettings, "dpo", besides=config.SftSettings) if "`--" in line]
    names = [line.split("`")[1] for line in rows]
    assert names == ["--learning_rate", "--loss", "--beta", "--label_smoothing", "--simpo_gamma"]


def test_every_korean_text_belongs_to_a_setting() -> None:
    texts = yaml.safe_load((ROOT / "src" / "byeori" / "config" / "korean.yaml").read_text(encoding="utf-8"))
    known = {name for kind in cli.COMMANDS.values() for name in kind.model_fields}
    for command, names in texts.items():
        assert command == "every command" or command in cli.COMMANDS
        assert set(names) <= (known if command == "every command" else set(cli.COMMANDS[command].model_fields))
