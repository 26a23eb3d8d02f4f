"""Checkpoints beside the machine: each whole one is copied to a URL (s3://, gs://, a shared folder), and fetched back.

    URL/checkpoint-40/   its files, the manifest last, so that a copy that was cut short is never taken for a whole one
    URL/                 the log, and the finished adapter

Anything that fsspec knows is a URL; a bucket's key comes from the environment or the login, as its library reads it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from byeori.artifacts import layout
from byeori.distributed import processes as parallel
from byeori.distributed.processes import Processes
from byeori.errors import CheckpointError, ConfigError
from byeori.support.atomic_files import new_folder
from byeori.support.text_files import one_line
from byeori.train import checkpoint


class Mirror:
    """A place that checkpoints are copied to.

    Raises:
        ConfigError: no library here knows such a URL.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"--mirror_to {url}: {error}") from None
        self._seen: set[int] = set()  # steps whose checkpoints were here; copies of others are not this run's to delete

    def put(self, folder: Path) -> None:
        """Copy a whole checkpoint, then delete copies of those that were here and are no longer.

        Raises:
            CheckpointError: it could not be copied; what was there before is untouched.
        """
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        with self._explained():
            for path in sorted(files, key=lambda path: path.name == layout.MANIFEST):
                self._copy(path, f"{folder.name}/{path.relative_to(folder).as_posix()}")
            self.put_files(folder.parent, [layout.LOG])
            kept = {step for step, _ in checkpoint.steps(folder.parent)}
            for step in set(self.steps()) & (self._seen - kept):
                self._system.rm(f"{self._root}/checkpoint-{step}", recursive=True)
            self._seen |= kept

    def only_those_behind(self, resume: Path | None, say: Callable[[str], None]) -> None:
        """Leave the copies of checkpoints that led to this one; later ones, of another run, get another name.

        resume: None for a run that starts anew in place of the one there.

        Raises:
            CheckpointError: a copy could not be renamed.
        """
        match = re.fullmatch(r"checkpoint-(\d+)", resume.name) if resume else None
        with self._explained():
            for step in self.steps():
                if match is None or step > int(match[1]):
                    name = f"checkpoint-{step}"
                    free = checkpoint.aside(name, lambda name: self._system.exists(f"{self._root}/{name}"))
                    self._system.mv(f"{self._root}/{name}", f"{self._root}/{free}", recursive=True)
                    say(f"{self.url}/{name} is not of this run; it is {free} now")
            best = checkpoint.best_of(resume) if resume else None
            self._seen |= {step for step in self.steps() if best is None or best.name != f"checkpoint-{step}"}

    def put_files(self, folder: Path, names: list[str]) -> None:
        """Copy single files that are there.

        Raises:
            CheckpointError: one could not be copied.
        """
        with self._explained():
            for name in names:
                if (folder / name).is_file():
                    self._copy(folder / name, name)

    def steps(self) -> list[int]:
        """The steps whose copy is whole, oldest first."""
        if not self._system.exists(self._root):
            return []
        names = [str(path).rstrip("/").rpartition("/")[2] for path in self._system.ls(self._root, detail=False)]
        found = [int(match[1]) for name in names if (match := re.fullmatch(r"checkpoint-(\d+)", name))]
        return sorted(s for s in found if self._system.exists(f"{self._root}/checkpoint-{s}/{layout.MANIFEST}"))

    def in_use(self) -> bool:
        """Whether checkpoints are there.

        Raises:
            CheckpointError: it could not be read.
        """
        with self._explained():
            return bool(self.steps())

    def fetch_newest(self, output_dir: Path, say: Callable[[str], None]) -> Path | None:
        """Copy the newest whole checkpoint, the best one that it knows of, and the log, into a folder.

        Returns the newest one's folder, None where there is none.

        Raises:
            CheckpointError: it could not be read, or written here.
        """
        with self._explained():
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

    def _fetch_whole(self, folder: Path, say: Callable[[str], None]) -> bool:
        """Copy a checkpoint here, unless it is damaged; whether it is here."""
        name = folder.name
        with new_folder(folder) as temporary:
            for path in self._system.find(f"{self._root}/{name}"):
                self._fetch(path, temporary / str(path).rpartition(f"/{name}/")[2])
            if problem := checkpoint.verify(temporary):
                say(f"{self.url}/{name} is passed over: {problem}")
                shutil.rmtree(temporary)
                return False
        say(f"Fetched {self.url}/{name}")
        return True

    def _copy(self, path: Path, name: str) -> None:
        target = f"{self._root}/{name}"
        self._system.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._system.put_file(str(path), target)

    def _fetch(self, path: Any, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self._system.get_file(path, str(target))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (CheckpointError, KeyboardInterrupt):
            raise
        except Exception as error:  # every storage has its own
            reason = one_line(error, 200)
            raise CheckpointError(
                f"copying checkpoints to or from {self.url} failed ({reason}); those in --output_dir are whole"
            ) from None


def before_resuming(
    mirror: Mirror | None, resume: str | None, output_dir: Path, say: Callable[[str], None], processes: Processes
) -> None:
    """Fetch the newest checkpoint to every machine that has none, where `latest` is asked for.

    Raises:
        CheckpointError: it could not be read.
    """
    if mirror is None or resume != "latest":
        return
    if processes.first_here and checkpoint.newest(output_dir) is None:
        mirror.fetch_newest(output_dir, say)
    parallel.wait(processes)


def check_free(mirror: Mirror | None, processes: Processes) -> None:
    """See whether a run that starts anew may copy its checkpoints to the place.

    Raises:
        CheckpointError: another run's are there.
    """
    if mirror is None:
        return
    if processes.main and mirror.in_use():
        raise CheckpointError(
            f"{mirror.url} holds the checkpoints of another run; go on with --resume_from_checkpoint latest, give "
            "another --mirror_to, or start anew with --overwrite_output_dir"
        )
    parallel.wait(processes)


def check_agreement(resume: Path | None, processes: Processes) -> None:
    """See whether all machines go on from the same step.

    Raises:
        CheckpointError: they do not.
    """
    match = re.fullmatch(r"checkpoint-(\d+)", resume.name) if resume else None
    step = float(match[1]) if match else 0.0
    total, squares = parallel.add_up([step, step**2], processes)
    if squares * processes.world != total**2:
        raise CheckpointError(
            f"the machines of this run would go on from different checkpoints (here {resume}); give all of them one "
            "shared --output_dir, or --mirror_to a place that all can read"
        )
