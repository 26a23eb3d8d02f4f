"""The log of a run in progress: train_log.jsonl, and trackers by name. What is shown meanwhile: live.py."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from byeori.artifacts.layout import LOG, TRACKERS
from byeori.errors import CheckpointError, ConfigError
from byeori.support import atomic_files
from byeori.support.atomic_files import new_file
from byeori.support.console import Say
from byeori.support.foreign_files import json_file, json_lines
from byeori.support.text_files import one_line
from byeori.train.checkpoint import write_errors

_STEP = {"loss", "epoch", "learning_rate", "tokens", "seconds", "peak_memory_bytes"}  # what each step's line has
_TEXTS = {"name", "prompt", "reference", "answer"}  # and each of its samples


class RunLog:
    """train_log.jsonl: one JSON object per line, flushed at once; a resumed run drops lines after its checkpoint."""

    def __init__(self, folder: Path, *, after_step: int | None) -> None:
        self._path = folder / LOG
        lines = [line for line in read(folder) if after_step is not None and line["step"] <= after_step]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with write_errors(self._path), new_file(self._path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; a number that is not finite becomes null, because JSON has no other.

        Raises:
            CheckpointError: if the disk is full or read-only, or the log was deleted.
        """
        with write_errors(self._path), self._path.open("r+", encoding="utf-8") as file:
            file.seek(0, os.SEEK_END)
            strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            file.write(json.dumps(strict, ensure_ascii=False, allow_nan=False) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, if there is one, and of those its numbers and lists.

    A last line cut short by a crash is left out, as is what is no line of a run.
    """
    path = folder / LOG
    lines = json_lines(path) if path.is_file() else ()
    found = [{name: value for name, value in line.items() if _belongs(name, value)} for line in lines]
    return [line for line in found if isinstance(line.get("step"), int) and ("loss" not in line or set(line) >= _STEP)]


def _belongs(name: str, value: Any) -> bool:
    if name == "samples":
        return isinstance(value, list) and all(isinstance(item, dict) and set(item) >= _TEXTS for item in value)
    if name == "skipped_rows":
        return isinstance(value, list)
    return value is None or (type(value) in (int, float) and abs(value) < 2**62)


def check_trackers(names: list[str]) -> None:
    """Raise unless the trackers are installed.

    Raises:
        ConfigError: if one is not.
    """
    for name in names:
        if name != "none" and find_spec(name) is None:
            raise ConfigError(f"--report_to {name}: it is not installed; pip install '.[{name}]' in byeori's checkout")


class Trackers:
    """tensorboard, wandb, trackio and mlflow through accelerate; none unless asked for.

    On exit every tracker is closed, however the run ended. One that fails during the run is dropped. What each calls
    the run is kept in trackers.json. again: log into the run that is named there, if one is.

    Raises:
        ConfigError: if one does not start (not logged in, or its server is not reachable).
    """

    def __init__(
        self, names: list[str], *, folder: Path, settings: dict[str, Any], say: Say, again: bool = False
    ) -> None:
        self._trackers: dict[str, Any] = {}
        self._say = say
        names = [name for name in names if name != "none"]
        if not names:
            return
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's logger needs it, and some trackers log before anything else makes it
        plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.items()}
        known = _runs(folder) if again else {}
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            project = folder.resolve().name
            where = {"logging_dir": folder / "runs"} if kind.requires_logging_directory else {}
            try:
                tracker = kind(project, **where, **_continued(name, known.get(name)))
                tracker.start()
                if not again:
                    tracker.store_init_configuration(plain)
            except Exception as error:  # each tracker has its own classes, for its account and its network
                self.close()
                raise ConfigError(
                    f"--report_to {name}: it did not start ({one_line(error)}); fix it or leave it out"
                ) from None
            self._trackers[name] = tracker
        if not again:
            runs = {name: _run_of(name, tracker) for name, tracker in self._trackers.items()}
            atomic_files.write(folder / TRACKERS, json.dumps(runs, indent=1) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, line: dict[str, Any]) -> None:
        """Send the numbers of a log line to every tracker."""
        values = {key: value for key, value in line.items() if isinstance(value, (int, float)) and key != "step"}
        if len(values) > 1:  # sample answers have an epoch alone
            self._each(lambda tracker: tracker.log(values, step=line["step"]))

    def close(self) -> None:
        """Close every tracker."""
        self._each(lambda tracker: tracker.finish())
        self._trackers = {}

    def _each(self, act: Callable[[Any], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:  # each tracker has errors of its own, and none may end a run
                del self._trackers[name]
                why = one_line(error)
                self._say(f"{name} failed and is no longer used ({why}); the run continues, and {LOG} has every line")


def _runs(folder: Path) -> dict[str, Any]:
    """Return what trackers call the run of a folder."""
    path = folder / TRACKERS
    found = json_file(path, CheckpointError, advice="delete it") if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _run_of(name: str, tracker: Any) -> str | None:
    """Return what a tracker calls its run; None of tensorboard, whose run is a folder."""
    if name == "mlflow":
        return str(tracker.active_run.info.run_id)
    return None if name == "tensorboard" else str(tracker.run.id if name == "wandb" else tracker.run.name)


def _continued(name: str, run: object) -> dict[str, Any]:
    """Return the arguments with which a tracker goes on with a run; {} if it is not known."""
    if not isinstance(run, str):
        return {}
    if name == "mlflow":
        return {"run_id": run}
    return {"id" if name == "wandb" else "name": run, "resume": "allow"}
