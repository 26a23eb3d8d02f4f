"""Every text of the screens is in the catalogue."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from byeori.config.help import groups
from byeori.studio import jobs, pages, plan, ship, train

FOLDER = Path(pages.__file__).parent


def test_every_text_has_its_korean() -> None:
    sections = yaml.safe_load((FOLDER.parent / "support" / "korean.yaml").read_text(encoding="utf-8"))
    known = {english for section in sections.values() for english in section}
    used = set(pages.SCREENS.values()) | set(ship.STEPS.values()) | {title for title, _, _ in train.CHARTS}
    used |= {name for command in ("sft", "dpo") for name in plan.presets(command)}
    used |= {name for kind in jobs.COMMANDS.values() for name in groups(kind) if name != "essentials"}
    used |= {
        "starting",
        "running",
        "done",
        "stopped",
        "failed",
        "killed",
        "gate not met",
        "base",
        "tuned",
        "tie",
        "merged",
        "export",
    }
    used |= {"this machine", "cheapest", "fastest", "smallest"}
    for path in (FOLDER / "templates").glob("*.html"):
        used |= set(re.findall(r'\bt\("((?:[^"\\]|\\.)+)"', path.read_text(encoding="utf-8")))
    text = (FOLDER / "train.py").read_text(encoding="utf-8")
    used |= set(re.findall(r'facts\.append\(\("([^"]+)"', text)) | set(re.findall(r'\("\w+", "([a-z ]+)"\)', text))
    assert not {text.replace('\\"', '"') for text in used} - known
