"""Pickle files run code when they are loaded, so byeori never loads one."""

from __future__ import annotations

from pathlib import Path


def missing_weights(folder: Path, name: str) -> str:
    """Return the sentence about a folder without safetensors weights, with a hint if it has a pickle instead.

    name: the file or the kind of weights that is missing.
    """
    pickled = sorted(folder.glob("*.bin"))
    hint = f", only a pickle ({pickled[0].name}), which is never loaded; save it as safetensors" if pickled else ""
    return f"{folder} has no {name}{hint}"
