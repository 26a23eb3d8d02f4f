"""The folder that the page works in: which paths it may open, and what it remembers between two requests.

Everything is in files, so that a refresh, another browser and another server see the same:

    FOLDER/.byeori-studio/draft.yaml    settings that are being filled in, by command
    FOLDER/.byeori-studio/jobs/         commands that the page started (jobs.py)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from byeori.config import Settings, metavar
from byeori.data import places, template
from byeori.data.readers import READERS, ending
from byeori.errors import ConfigError
from byeori.model import demo_model
from byeori.support import atomic_files, hub
from byeori.support.text_files import redacted
from byeori.support.yaml_files import yaml_mapping

_STATE = ".byeori-studio"
_MOST_FILES = 50_000  # that a scan of the folder looks at
_SKIPPED = ("checkpoint-", ".", "node_modules", "__pycache__", "venv")
_DEPTH = 4
_NO_PATH = "{!r} is no path; check it"
_ROWS = ("data_path", "validation_path", "retention")
# where rows may lie beside the folder: file://, git:// and others of fsspec are on this machine
_REMOTE = ("https", "http", "hf", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci")
_SERVERS = ("postgresql", "postgres", "mysql", "mariadb", "mssql", "oracle", "snowflake")
_READS = ("select", "with", "values")  # other queries of SQLite write files: VACUUM INTO, ATTACH


class Workspace:
    """A folder. models: further folders from which models are read."""

    def __init__(self, folder: Path, models: Sequence[Path] = ()) -> None:
        self.folder = folder.resolve()
        self.models = [path.resolve() for path in (*models, demo_model.folder())]
        self.state = self.folder / _STATE
        self._lock = threading.Lock()

    # ---- paths -------------------------------------------------------------------------------------------------

    def inside(self, text: str | Path, *, models: bool = False) -> Path:
        """Return a path of the folder with its links resolved. models: or of a folder of models.

        Raises:
            ConfigError: if it leads out of them.
        """
        try:
            path = (self.folder / Path(text).expanduser()).resolve()
            path.exists()  # a name may be longer than any file's
        except (OSError, ValueError, RuntimeError):
            raise ConfigError(_NO_PATH.format(str(text)[:200])) from None
        allowed = [self.folder, *(self.models if models else [])]
        if not any(path.is_relative_to(root) for root in allowed):
            raise ConfigError(
                f"{text} is outside {self.folder}, and the page opens only what is in it; move or copy it there, or "
                f"start byeori studio in a folder above{' or with --models' if models else ''}"
            )
        return path

    def shown(self, path: Path) -> str:
        """Return a path as a command in the folder names it."""
        return str(path.relative_to(self.folder)) if path.is_relative_to(self.folder) else str(path)

    def check(self, kind: type[Settings], values: Mapping[str, Any]) -> None:
        """Raise unless all paths in settings are inside.

        Raises:
            ConfigError: naming the path.
        """
        for name, field in kind.model_fields.items():
            what, value = metavar(field), values.get(name)
            texts = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
            for text in texts:
                if name in ("template", "chat_template"):
                    if template.is_file(text):
                        self.inside(text)
                elif "://" in text and name in (*_ROWS, "mirror_to"):
                    self._check_url(places.split_weight(text)[0], str(values.get("query") or ""))
                elif what in ("PATH", "MODEL"):
                    self._check(name, text, model=what == "MODEL")

    def _check(self, name: str, text: str, *, model: bool) -> None:
        if name == "vllm_python" or (name == "resume_from_checkpoint" and text == "latest"):
            return
        rows = name in _ROWS
        try:
            path, _ = places.split_weight(text)
            there = Path(path).exists()
        except OSError:  # longer than a name may be
            raise ConfigError(_NO_PATH.format(text[:200])) from None
        if there or hub.looks_local(path) or not (model or rows):
            self.inside(path, models=model)
        if rows:  # of a folder or a glob, some may be links
            for file in (places.local_files(path, "train") or {}).values():
                self.inside(file)

    def _check_url(self, text: str, query: str) -> None:
        """Raise if an address, or the query of a database, leads to files of this machine that are outside."""
        scheme, _, rest = text.partition("://")
        kind = scheme.lower().partition("+")[0]
        if kind == "sqlite" and not rest.startswith("/file:"):
            self.inside(rest.partition("?")[0].removeprefix("/"))
            if query.strip() and query.split(maxsplit=1)[0].lower() not in _READS:
                raise ConfigError(
                    f"the page reads rows of {redacted(text)} only; give a --query that begins with SELECT"
                )
        elif "::" in rest or not (kind in _SERVERS or scheme.lower() in _REMOTE):
            raise ConfigError(
                f"the page does not open {redacted(text)}; give a file of {self.folder}, a database, or an address "
                f"that begins with {', '.join(_REMOTE)}, followed by ://"
            )

    # ---- what is there -----------------------------------------------------------------------------------------

    def walk(self) -> Iterator[tuple[Path, list[str], list[str]]]:
        """Yield folders with the names of the folders and files in them, without hidden ones, checkpoints and links.

        Those near the top come first, so that a deep one with very many files hides none of them.
        """
        seen, waiting = 0, [(self.folder, 0)]
        for here, depth in waiting:
            _, folders, files = next(os.walk(here), (None, [], []))
            folders = sorted(name for name in folders if not name.startswith(_SKIPPED)) if depth < _DEPTH else []
            waiting += [(here / name, depth + 1) for name in folders if not (here / name).is_symlink()]
            yield here, folders, files
            seen += len(files) + 1
            if seen > _MOST_FILES:
                return

    def tables(self) -> list[str]:
        """Return the files of rows in the folder, those of results left out."""
        found = []
        for folder, _, files in self.walk():
            result = {"metrics.json", "adapter_config.json", "config.json"} & set(files)
            found += (
                []
                if result
                else [
                    self.shown(folder / name)
                    for name in sorted(files)
                    if ending(folder / name) in READERS and name[0] != "."
                ]
            )
        return found

    def model_folders(self) -> list[str]:
        """Return the folders of models and adapters that may be chosen."""
        found = [
            self.shown(folder)
            for folder, _, files in self.walk()
            if {"config.json", "adapter_config.json"} & set(files)
        ]
        for root in self.models:
            parts = [root, *(sorted(root.iterdir()) if root.is_dir() else [])]
            found += [str(part) for part in parts if (part / "config.json").is_file()]
        return found

    # ---- what is being filled in -------------------------------------------------------------------------------

    def draft(self, command: str) -> dict[str, Any]:
        """Return the settings that are being filled in for a command."""
        values = self._drafts().get(command)
        return dict(values) if isinstance(values, dict) else {}

    def save_draft(self, command: str, values: Mapping[str, Any]) -> None:
        """Keep settings; values that are None are left out."""
        with self._lock:
            drafts = self._drafts() | {command: {name: value for name, value in values.items() if value is not None}}
            self.state.mkdir(exist_ok=True)
            (self.state / ".gitignore").write_text("*\n", encoding="utf-8")
            text = yaml.safe_dump(drafts, allow_unicode=True, sort_keys=False)
            atomic_files.write(self.state / "draft.yaml", text)

    def change_draft(self, command: str, **changes: Any) -> dict[str, Any]:
        """Change some of the settings; None removes one."""
        values = self.draft(command) | changes
        self.save_draft(command, values)
        return self.draft(command)

    def _drafts(self) -> dict[str, Any]:
        try:
            return yaml_mapping(self.state / "draft.yaml", what="settings", advice="delete it")
        except ConfigError:
            return {}
