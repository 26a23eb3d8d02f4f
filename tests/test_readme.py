"""The README tells the truth: its table is made from config.py, and both languages show the same commands."""

from __future__ import annotations

import re
from pathlib import Path

from byeori import config

ROOT = Path(__file__).parents[1]


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_table_of_settings_is_made_from_config() -> None:
    shown = _text("README.md").split("<!-- settings -->")[1].split("<!-- /settings -->")[0].strip()
    assert shown == config.table(config.SftSettings)
    shown = _text("README.md").split("<!-- settings-dpo -->")[1].split("<!-- /settings-dpo -->")[0].strip()
    assert shown == config.table(config.DpoSettings, besides=config.SftSettings)


def test_both_languages_show_the_same_commands() -> None:
    def commands(name: str) -> list[str]:
        return re.findall(r"^(?:byeori|torchrun|MODEL=|ROWS=|    --|make ).*?(?:  #|$)", _text(name), re.MULTILINE)

    assert commands("README.md") == commands("README.ko.md")


def test_links_in_the_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
