"""`byeori publish`: upload a finished adapter or merged model to the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from byeori.artifacts import layout
from byeori.artifacts.model_card import findings
from byeori.config import PublishSettings
from byeori.errors import ConfigError
from byeori.evaluate import gate
from byeori.export import publish as publishing
from byeori.support.foreign_files import json_file


def publish(settings: PublishSettings) -> publishing.PublishResult:
    """Upload a finished adapter or merged model to the Hub.

    Raises:
        GateError: if its last comparison does not meet a condition.
        ConfigError: if there is none, or a condition names something that it did not measure.
    """
    if settings.fail_unless:
        _check_gate(Path(settings.folder), settings.fail_unless)
    return publishing.publish(
        folder=Path(settings.folder),
        repo_id=settings.repo_id,
        private=settings.private,
        dry_run=settings.dry_run,
        revision=settings.revision,
        commit_message=settings.commit_message,
    )


def _check_gate(folder: Path, conditions: Sequence[str]) -> None:
    path = findings(folder)[layout.METRICS]
    if not path.is_file():
        raise ConfigError(f"--fail-unless needs the numbers of a comparison, and {folder} has none; run byeori compare")
    numbers = json_file(path)
    names = [*(numbers.get("difference") or {})]
    names += [f"{gate.RETENTION}{name}" for name in (numbers.get("retention") or {}).get("difference") or {}]
    gate.check(gate.parse(conditions, names, [item["name"] for item in numbers.get("baselines") or ()]), numbers)
