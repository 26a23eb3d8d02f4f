"""Copies of checkpoints elsewhere: each whole one is copied to a URL (s3://, gs://, a shared folder), and fetched back.

    URL/checkpoint-40/   its files, the manifest last, so that an incomplete copy is never mistaken for a whole one
    URL/                 the log, and the finished adapter

Every URL that fsspec knows works; credentials come from the environment or the login, as its library reads them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from byeori.artifacts import layout
from byeori.distributed.processes import Processes, all_reduce_sum, barrier
from byeori.errors import CheckpointError, ConfigError
from byeori.support.atomic_files import new_folder
from byeori.support.console import Say
from byeori.support.text_files import one_line
from byeori.train import checkpoint


class Mirror:
    """A place that checkpoints are copied to.

    Raises:
        ConfigError: if no installed library knows such a URL.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        if "://***@" in url:
            raise ConfigError(f"--mirror_to {url}: passwords are not saved with a run; give the whole address")
        self.url = url.rstrip("/")
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"--mirror_to {url}: {one_line(error)}") from None
        self._seen: set[int] = set()  # steps whose checkpoints were here: only their copies may be deleted

    def put(self, folder: Path) -> None:
        """Copy a whole checkpoint, then delete the copies of those that have been deleted here.

        Raises:
            CheckpointError: if it could not be copied; what was there before is untouched.
        """
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        with self._errors():
            for path in sorted(files, key=lambda path: path.name == layout.MANIFEST):
                self._copy(path, f"{folder.name}/{path.relative_to(folder).as_posix()}")
            self.put_files(folder.parent, [layout.LOG])
            here = {step for step, _ in checkpoint.steps(folder.parent)}
            for step in set(self.steps()) & (self._seen - here):
                self._system.rm(f"{self._root}/checkpoint-{step}", recursive=True)
            self._seen |= here

    def set_others_aside(self, resume: Path | None, say: Say) -> None:
        """Rename the copies of later checkpoints than this one: they belong to another run.

        resume: None for a run that replaces the one there.

        Raises:
            CheckpointError: if a copy could not be renamed.
        """
        last = (checkpoint.step_of(resume.name) if resume else None) or 0
        with self._errors():
            for step in self.steps():
                if step > last:
                    name = f"checkpoint-{step}"
                    free = checkpoint.aside(name, lambda name: self._system.exists(f"{self._root}/{name}"))
                    self._system.mv(f"{self._root}/{name}", f"{self._root}/{free}", recursive=True)
                    say(f"{self.url}/{name} belongs to another run; renamed to {free}")
            best = checkpoint.best_of(resume) if resume else None
            self._seen |= {step for step in self.steps() if best is None or best.name != f"checkpoint-{step}"}

    def put_files(self, folder: Path, names: list[str]) -> None:
        """Copy those of the named files that exist.

        Raises:
            CheckpointError: if one could not be copied.
        """
        with self._errors():
            for name in names:
                if (folder / name).is_file():
                    self._copy(folder / name, name)

    def steps(self) -> list[int]:
        """Return the steps whose copy is whole, oldest first."""
        with self._errors():
            paths = self._system.ls(self._root, detail=False) if self._system.exists(self._root) else []
            names = [str(path).rstrip("/").rpartition("/")[2] for path in paths]
            whole = [name for name in names if self._system.exists(f"{self._root}/{name}/{layout.MANIFEST}")]
        return sorted(step for name in whole if (step := checkpoint.step_of(name)) is not None)

    def fetch_newest(self, output_dir: Path, say: Say) -> Path | None:
        """Copy the newest whole checkpoint, the best one that it names, and the log into a folder.

        Returns the folder of the newest one, or None.

        Raises:
            CheckpointError: if it could not be read, or written here.
        """
        with self._errors():
            there = self.steps()
            for step in reversed(there):
                folder = output_dir / f"checkpoint-{step}"
                if not self._fetch_whole(folder, say):
                    continue
                best = checkpoint.best_of(folder)
                if best is not None and best.name in {f"checkpoint-{other}" for other in there if other != step}:
                    self._fetch_whole(output_dir / best.name, say)
                if not (output_dir / layout.LOG).exists() and self._system.exists(f"{self._root}/{layout.LOG}"):
                    self._fetch(f"{self._root}/{layout.LOG}", output_dir / layout.LOG)
                return folder
        return None

    def _fetch_whole(self, folder: Path, say: Say) -> bool:
        """Copy a checkpoint here unless it is damaged; returns whether it is here."""
        name = folder.name
        with new_folder(folder) as temporary:
            for path in self._system.find(f"{self._root}/{name}"):
                self._fetch(path, self._inside(temporary, str(path).rpartition(f"/{name}/")[2]))
            if problem := checkpoint.verify(temporary):
                say(f"{self.url}/{name} is skipped: {problem}")
                shutil.rmtree(temporary)
                return False
        say(f"Fetched {self.url}/{name}")
        return True

    def _inside(self, folder: Path, name: str) -> Path:
        """Return the path of a file that the storage lists; its names are not trusted."""
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()) or target.resolve() == folder.resolve():
            raise CheckpointError(
                f"{self.url} lists a file called {name!r}, which would be written outside --output_dir"
            )
        return target

    def _copy(self, path: Path, name: str) -> None:
        target = f"{self._root}/{name}"
        self._system.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._system.put_file(str(path), target)

    def _fetch(self, path: Any, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self._system.get_file(path, str(target))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (CheckpointError, KeyboardInterrupt):
            raise
        except Exception as error:  # every kind of storage has its own classes
            reason = one_line(error, 200)
            raise CheckpointError(
                f"copying checkpoints to or from {self.url} failed ({reason}); those in --output_dir are whole"
            ) from None


def fetch_latest(mirror: Mirror | None, resume: str | None, output_dir: Path, say: Say, processes: Processes) -> None:
    """Fetch the newest checkpoint to every machine that has none, if `latest` is asked for.

    Raises:
        CheckpointError: if it could not be read.
    """
    if mirror is None or resume != "latest":
        return
    if processes.first_here and checkpoint.newest(output_dir) is None:
        mirror.fetch_newest(output_dir, say)
    barrier(processes)


def check_free(mirror: Mirror | None, processes: Processes) -> None:
    """Raise unless a new run may copy its checkpoints there.

    Raises:
        CheckpointError: if it holds the checkpoints of another run, or could not be read.
    """
    if mirror is not None and processes.main and mirror.steps():
        raise CheckpointError(
            f"{mirror.url} holds the checkpoints of another run; go on with --resume_from_checkpoint latest, give "
            "another --mirror_to, or start over with --overwrite_output_dir"
        )
    barrier(processes)


def check_agreement(resume: Path | None, processes: Processes) -> None:
    """Raise unless all machines resume from the same step.

    Raises:
        CheckpointError: if they do not.
    """
    step = float((checkpoint.step_of(resume.name) if resume else None) or 0)
    total, squares = all_reduce_sum([step, step**2], processes)
    if squares * processes.world != total**2:
        raise CheckpointError(
            f"the machines of this run would resume from different checkpoints (this one from {resume}); give all of "
            "them one shared --output_dir, or --mirror_to a place that all can read"
        )
