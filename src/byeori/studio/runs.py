"""The training runs in a folder, from whichever terminal or page they were started, as their files show them."""

from __future__ import annotations

import functools
import math
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byeori.artifacts import layout
from byeori.errors import ByeoriError, ConfigError
from byeori.studio import jobs
from byeori.studio.jobs import Job
from byeori.studio.log_curves import Log, last_step, log_of
from byeori.studio.workspace import Workspace
from byeori.support import file_lock
from byeori.support.foreign_files import json_file
from byeori.support.yaml_files import yaml_mapping
from byeori.train.output_dir import LOCK

_LONGEST = 5_000_000  # bytes of a JSON or YAML file that is read


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run. name: its folder as a command names it. job: the newest one of the page that wrote to it, if any."""

    folder: Path
    name: str
    job: Job | None

    @property
    def log(self) -> Log:
        """Its log, up to date."""
        return log_of(self.folder / layout.LOG)

    @property
    def last(self) -> dict[str, Any]:
        """The newest step's line of its log; {} before the first."""
        return last_step(self.folder / layout.LOG)

    @property
    def holder(self) -> str | None:
        """The process that writes to it, if it runs on a machine that shares its locks."""
        return file_lock.holder(self.folder / LOCK)

    @property
    def state(self) -> str:
        """One of starting, running, done, stopped, failed, killed."""
        if self.holder is not None:
            return "running"
        if self.job is not None and (state := self.job.state) != "done":
            return "starting" if state == "running" else state
        return (
            "done"
            if (self.folder / layout.ADAPTER).is_file() or (self.folder / "model.safetensors").is_file()
            else ("stopped")
        )

    @property
    def can_resume(self) -> bool:
        """Whether it has a checkpoint and does not run."""
        return self.state not in ("starting", "running", "done") and any(self.folder.glob("checkpoint-*"))

    def settings(self) -> dict[str, Any]:
        """Return its settings: those that it recorded, or those that the page gave it."""
        for folder in (self.folder, *sorted(self.folder.glob("checkpoint-*"), reverse=True)):
            if (folder / layout.SETTINGS).is_file():
                return _mapping(folder / layout.SETTINGS)
        return self.job.settings() if self.job else {}

    @property
    def command(self) -> str:
        """Return sft or dpo."""
        settings = self.settings()
        if settings.get("row_kind") == "preference" or "loss" in settings:
            return "dpo"
        return self.job.command if self.job else "dpo" if "margin" in self.last else "sft"

    def total_steps(self) -> int | None:
        """Return how many steps it will have, as far as its log and settings tell."""
        last, settings = self.last, self.settings()
        if not last or not last.get("epoch"):
            return None
        try:
            total = math.ceil(round(last["step"] / last["epoch"] * float(settings.get("num_epochs", 3)), 3))
            steps = settings.get("max_steps")
            return min(total, int(steps)) if steps else total
        except (TypeError, ValueError, OverflowError):  # of settings that somebody changed
            return None

    def read(self, name: str) -> dict[str, Any]:
        """Return one of its JSON files; {} without one."""
        return _mapping(self.folder / name)

    def stop(self) -> None:
        """Send what Ctrl-C sends.

        Raises:
            ConfigError: if it runs on another machine.
        """
        if self.job is not None and self.job.state == "running":
            jobs.stop(self.job)
            return
        words = (self.holder or "").split()  # process 123 on host
        if len(words) != 4:
            return
        if words[3] != socket.gethostname():
            raise ConfigError(f"{self.name} runs on {words[3]}; stop it there with Ctrl-C")
        os.kill(int(words[1]), signal.SIGINT)


def every(workspace: Workspace) -> list[Run]:
    """Return all runs in the folder, those that wrote last first."""
    started = {job.output: job for job in reversed(jobs.every(workspace)) if job.command in ("sft", "dpo")}
    found = {
        workspace.shown(folder): folder
        for folder, _, files in workspace.walk()
        if layout.LOG in files or (layout.SETTINGS in files and layout.ADAPTER_CONFIG in files)
    }
    found |= {name: workspace.folder / name for name in started if name not in found}
    runs = [Run(folder=folder, name=name, job=started.get(name)) for name, folder in found.items()]
    return sorted(runs, key=_changed, reverse=True)


def named(workspace: Workspace, name: str) -> Run:
    """Return a run by its folder.

    Raises:
        ConfigError: if there is none, or the folder is outside.
    """
    folder = workspace.inside(name)
    job = jobs.latest(workspace, "sft", "dpo", output=name)
    if job is None and not (folder / layout.LOG).is_file() and not (folder / layout.ADAPTER_CONFIG).is_file():
        raise ConfigError(f"there is no run in {name}; it may have been moved")
    return Run(folder=folder, name=name, job=job)


def adapters(workspace: Workspace) -> list[Run]:
    """Return the runs with a finished adapter."""
    return [run for run in every(workspace) if (run.folder / layout.ADAPTER).is_file()]


def _changed(run: Run) -> float:
    started = run.job.started if run.job else 0.0
    try:
        return max(started, (run.folder / layout.LOG).stat().st_mtime)
    except OSError:
        return started


def _mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON or YAML file; {} if there is none."""
    try:
        facts = path.stat()
    except OSError:
        return {}
    return _loaded(path, (facts.st_ino, facts.st_mtime_ns, facts.st_size)) if facts.st_size <= _LONGEST else {}


@functools.lru_cache(maxsize=256)  # a page that follows a run asks for the same each second
def _loaded(path: Path, version: tuple[int, ...]) -> dict[str, Any]:
    try:
        loaded = json_file(path) if path.suffix == ".json" else yaml_mapping(path, what="settings", advice="copy it")
    except ByeoriError:
        return {}
    return loaded if isinstance(loaded, dict) else {}
