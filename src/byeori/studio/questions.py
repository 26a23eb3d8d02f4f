"""Questions to a model and its answers, in files: the page writes questions, a worker (answering.py) answers them.

try/NAME/model.json         which model; the number of the conversation
try/NAME/000001.json        a question: columns or messages, sampling, sides in the order in which they are shown
try/NAME/000001-base.txt    an answer, which grows while it is generated
try/NAME/000001-done.json   when all sides have answered: seconds and tokens of each, or the error
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byeori.errors import ByeoriError
from byeori.evaluate.engines.base import Side
from byeori.studio.workspace import Workspace
from byeori.support import atomic_files
from byeori.support.foreign_files import json_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question. asked: columns of a template, or messages. sides: in the order of display; who answers.

    blind: whether names are hidden until it is judged. judged: base, tuned or tie, once it is.
    """

    folder: Path
    number: int
    conversation: int
    asked: dict[str, str] | list[dict[str, str]]
    sampling: dict[str, Any]
    sides: list[Side]
    blind: bool = False
    judged: str = ""

    @property
    def name(self) -> str:
        """The beginning of its files' names."""
        return f"{self.number:06}"

    @property
    def done(self) -> dict[str, Any] | None:
        """What is known once it is answered."""
        return read(self.folder / f"{self.name}-done.json") or None

    def answer(self, side: str) -> str:
        """Return the answer so far."""
        try:
            return (self.folder / f"{self.name}-{side}.txt").read_text(encoding="utf-8", errors="ignore")
        except OSError:
            return ""

    def write(self) -> None:
        """Write its file."""
        values = {name: getattr(self, name) for name in _FIELDS}
        atomic_files.write(self.folder / f"{self.name}.json", json.dumps(values, ensure_ascii=False))


_FIELDS = ("number", "conversation", "asked", "sampling", "sides", "blind", "judged")


def folder_of(space: Workspace, model: str) -> Path:
    """Return the folder of the questions to a model."""
    folder = space.state / "try" / hashlib.sha256(model.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model.json").exists():
        atomic_files.write(folder / "model.json", json.dumps({"model": model, "conversation": 1}))
    return folder


def conversation(folder: Path) -> int:
    """Return the number of the conversation that goes on."""
    return int(read(folder / "model.json").get("conversation", 1))


def start_anew(folder: Path) -> None:
    """Begin another conversation."""
    values = read(folder / "model.json")
    atomic_files.write(folder / "model.json", json.dumps(values | {"conversation": conversation(folder) + 1}))


def every(folder: Path) -> list[Question]:
    """Return all questions in their order."""
    found = []
    for path in sorted(folder.glob("[0-9]*.json")):
        values = read(path)
        if not path.stem.endswith("-done") and set(_FIELDS) <= set(values):
            found.append(Question(folder=folder, **{name: values[name] for name in _FIELDS}))
    return found


def ask(
    folder: Path,
    asked: dict[str, str] | list[dict[str, str]],
    sampling: dict[str, Any],
    sides: list[Side],
    *,
    blind: bool,
) -> Question:
    """Write a question. blind: the sides change places at random, and are not named."""
    number = max((question.number for question in every(folder)), default=0) + 1
    sides = random.sample(sides, len(sides)) if blind else sides
    question = Question(
        folder=folder, number=number, conversation=conversation(folder), asked=asked, sampling=sampling, sides=sides,
        blind=blind,
    )  # fmt: skip
    question.write()
    return question


def read(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file; {} without one."""
    try:
        loaded = json_file(path)
    except ByeoriError:
        return {}
    return loaded if isinstance(loaded, dict) else {}
