"""Commands that the page starts. Each is a process of its own session, and all that is known of it is in its folder:

jobs/ID/job.json        command, output, when
jobs/ID/settings.yaml   what `byeori COMMAND --config` read
jobs/ID/output.txt      what it said on standard error
jobs/ID/result.txt      what it printed: JSON, a model card
jobs/ID/exit            its exit code, once it has ended
jobs/ID/lock            held by the process while it lives
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from byeori import config
from byeori.commands import checks
from byeori.errors import ByeoriError, ConfigError, GateError
from byeori.studio import settings_text
from byeori.studio.workspace import Workspace
from byeori.support import file_lock
from byeori.support.foreign_files import json_record
from byeori.support.text_files import redacted, visible

COMMANDS: dict[str, type[config.Settings]] = {
    "sft": config.SftSettings,
    "dpo": config.DpoSettings,
    "plan": config.PlanSettings,
    "preview": config.PreviewSettings,
    "compare": config.CompareSettings,
    "merge": config.MergeSettings,
    "export": config.ExportSettings,
    "publish": config.PublishSettings,
    "demo": config.DemoSettings,
    "demo-model": config.DemoModelSettings,
}
# The shell outlives the command, whose exit code it writes; Ctrl-C reaches both and ends only the command.
_SCRIPT = 'cd -- "$1" && shift; trap : INT TERM; "$@"; echo $? >"$job/exit.new"; mv "$job/exit.new" "$job/exit"'
_STATES = {0: "done", GateError.exit_code: "gate not met", 130: "stopped", 143: "stopped", 137: "killed"}
_TAIL = 20_000  # bytes of output that are shown
_children: list[subprocess.Popen[bytes]] = []  # to be waited for, or they would stay as zombies


class _Facts(TypedDict):
    command: str
    output: str
    started: Annotated[float, Field(ge=0, le=1e11)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A command that the page started. started: seconds since 1970. output: where its result is, if it has a folder."""

    folder: Path
    command: str
    output: str
    started: float

    @property
    def name(self) -> str:
        """Return its id."""
        return self.folder.name

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs, or if it was killed."""
        try:
            return int((self.folder / "exit").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    @property
    def state(self) -> str:
        """One of running, done, gate not met, stopped, failed, killed."""
        _reap()
        if self.code is None and file_lock.holder(self.folder / "lock") is not None:
            return "running"
        return "killed" if (code := self.code) is None else _STATES.get(code, "failed")

    def settings(self) -> dict[str, Any]:
        """Return the settings that it was given."""
        return config.read_yaml(str(self.folder / "settings.yaml")) if (self.folder / "settings.yaml").exists() else {}

    def tail(self, name: str = "output.txt") -> str:
        """Return the end of what it said, without control characters and passwords."""
        try:
            with (self.folder / name).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _TAIL))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        lines = (line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n"))
        return visible(redacted("\n".join(lines)))

    def result(self) -> Any:
        """Return the JSON that it printed; None if there is none yet."""
        try:
            return json.loads((self.folder / "result.txt").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None

    def error(self) -> str:
        """Return the sentence with which it failed."""
        lines = [line for line in self.tail().splitlines() if line.strip()]
        return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")


def start(workspace: Workspace, command: str, values: dict[str, Any]) -> Job:
    """Start a command with these settings, if it would not refuse them at once.

    Raises:
        ByeoriError: as the command.
    """
    kind = COMMANDS[command]
    workspace.check(kind, values)
    checked = config.check(kind, values)
    checks.check(checked)
    output = workspace.shown(workspace.inside(values["output_dir"])) if "output_dir" in values else ""
    for job in every(workspace):
        if output and job.output == output and job.state == "running":
            raise ConfigError(f"{output} is being written by a {job.command} that runs; wait for it, or stop it")
    folder = _new_folder(workspace)
    (folder / "settings.yaml").write_text(settings_text.as_yaml(values), encoding="utf-8")
    given = ["--config", str(folder / "settings.yaml")] if values else []
    return _begin(workspace, folder, ["byeori", command, *given], command=command, output=output)


def worker(workspace: Workspace, module: str, *words: str, command: str, output: str) -> Job:
    """Start a module of the studio as a process of its own. command, output: what the job is called."""
    return _begin(workspace, _new_folder(workspace), [module, *words], command=command, output=output)


def _begin(workspace: Workspace, folder: Path, words: list[str], *, command: str, output: str) -> Job:
    """Start `python -m WORDS` in a job's folder."""
    facts: dict[str, Any] = {"command": command, "output": output, "started": time.time()}
    (folder / "job.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
    _spawn(workspace, folder, [sys.executable, "-m", *words])
    return Job(folder=folder, **facts)


def _spawn(workspace: Workspace, folder: Path, words: list[str]) -> None:
    """Start a process that holds the job's lock, in a session of its own: it outlives the page and its terminal."""
    names = ("output.txt", "result.txt")
    with (
        (folder / "lock").open("w") as lock,
        (folder / names[0]).open("ab") as said,
        (folder / names[1]).open("ab") as out,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "sh", str(workspace.folder), *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=said,
            start_new_session=True,
            pass_fds=[lock.fileno()],
            env=os.environ | {"job": str(folder), "PYTHONUNBUFFERED": "1"},
        )
        lock.write(f"process {process.pid}")
    _children.append(process)


def stop(job: Job) -> None:
    """Send what Ctrl-C sends, to the command and whatever it started; a second one stops at once."""
    holder = file_lock.holder(job.folder / "lock")
    if holder is not None and holder.startswith("process "):
        os.killpg(int(holder.split()[1]), signal.SIGINT)


def every(workspace: Workspace) -> list[Job]:
    """Return all jobs, the newest first."""
    found = []
    for path in sorted((workspace.state / "jobs").glob("*/job.json"), reverse=True):
        with suppress(ByeoriError):
            found.append(Job(folder=path.parent, **json_record(path, _Facts)))
    return found


def named(workspace: Workspace, name: str) -> Job:
    """Return a job by its id.

    Raises:
        ConfigError: if there is none.
    """
    for job in every(workspace):
        if job.name == name:
            return job
    raise ConfigError(f"there is no job {name!r}; it may have been deleted")


def latest(workspace: Workspace, *commands: str, output: str | None = None) -> Job | None:
    """Return the newest job of some commands, or the one that wrote to a folder."""
    return next(
        (job for job in every(workspace) if job.command in commands and output in (None, job.output)),
        None,
    )


def _new_folder(workspace: Workspace) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(100):
        folder = workspace.state / "jobs" / (stamp + (f"-{number:02}" if number else ""))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise ConfigError("too many commands were started at once; wait a second")


def _reap() -> None:
    _children[:] = [process for process in _children if process.poll() is None]
