"""Names of models, checked before anything heavy is imported: folders here, or repositories on the Hub."""

from __future__ import annotations

from pathlib import Path

from byeori.errors import ModelError
from byeori.support import hub
from byeori.support.suggestions import nearest_file


def check_name(name: str) -> None:
    """Raise unless a name is the folder of a model or an adapter, or may be a repository on the Hub.

    Raises:
        ModelError: if there is no such folder, or it holds no model.
    """
    folder = Path(name)
    if folder.exists():
        if not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
            raise not_a_model(folder)
    elif hub.looks_local(name):
        raise no_folder(name)


def no_folder(name: str) -> ModelError:
    """Return the error for a path that does not exist."""
    return ModelError(f"there is no folder {name}{nearest_file(Path(name))}; give a folder or a Hub id (user/name)")


def not_a_model(folder: Path) -> ModelError:
    """Return the error for a folder without a model's config.json."""
    adapter = (folder / "adapter_config.json").exists()
    hint = "it is an adapter; give its base model" if adapter else "it has no config.json"
    return ModelError(f"{folder} is not a model: {hint}")
