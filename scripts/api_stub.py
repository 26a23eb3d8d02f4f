"""src/byeori/__init__.pyi, made from the settings: `python scripts/api_stub.py` writes it."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import byeori

STUB = Path(__file__).parents[1] / "src" / "byeori" / "__init__.pyi"
_HEAD = """\
# Made by scripts/api_stub.py from the settings in byeori.config.
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from byeori import config as config
from byeori.commands.audit import AuditResult
from byeori.commands.compare import CompareResult
from byeori.commands.doctor import DoctorResult
from byeori.commands.preview import PreviewResult
from byeori.commands.train import TrainResult
from byeori.errors import (
    ByeoriError,
    CheckpointError,
    ConfigError,
    DataError,
    GateError,
    HubError,
    ModelError,
    TemplateError,
    TooLongError,
    TrainingError,
)
from byeori.export.export import ExportResult
from byeori.export.merge import MergeResult
from byeori.export.publish import PublishResult
from byeori.plan.report import PlanResult

__version__: str

__all__ = [
"""


def text() -> str:
    """Return the stub."""
    names = "".join(f'    "{name}",\n' for name in byeori.__all__)
    functions = [getattr(byeori, name) for name in byeori.__all__ if not name.endswith("Error")]
    return _HEAD + names + "]\n\n" + "\n".join(map(_function, functions))


def _function(function: Any) -> str:
    signature = inspect.signature(function)
    lines = []
    for parameter in signature.parameters.values():
        default = "" if parameter.default is inspect.Parameter.empty else f" = {_source(parameter.default)}"
        lines.append(_wrapped(f"    {parameter.name}: {parameter.annotation}{default},"))
    keywords = "\n".join(["", "    *,", *lines, ""]) if lines else ""
    doc = textwrap.indent(f'"""{inspect.cleandoc(function.__doc__)}\n"""', "    ")
    return f"def {function.__name__}({keywords}) -> {signature.return_annotation}:\n{doc}\n"


def _wrapped(line: str) -> str:
    """A setting with many choices has a line for each, as the formatter wants it."""
    if len(line) <= 120:
        return line
    choices = re.sub(r", (?=[^\]]*\])", ",\n        ", line)
    return choices.replace("Literal[", "Literal[\n        ").replace("]", ",\n    ]")


def _source(value: object) -> str:
    return json.dumps(value) if isinstance(value, str | list) else repr(value)


if __name__ == "__main__":
    STUB.write_text(text(), encoding="utf-8")
