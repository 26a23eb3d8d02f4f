"""The files beside a whole model's weights: config.json and what goes with it, byte for byte."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from byeori.artifacts import layout
from byeori.model.fingerprint import INDEX, SINGLE
from byeori.support.foreign_files import json_file

# beside weights and config; the license has to go where the weights go
SIDE_FILES = (
    layout.GENERATION_CONFIG,
    "preprocessor_config.json",
    "processor_config.json",
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "USE_POLICY.md", "NOTICE", "NOTICE.txt"),
)


def copy_beside(base: Path, folder: Path, *, dtype: str, vocabulary: int | None = None) -> None:
    """Copy config.json and what goes with it for weights that were trained in full.

    dtype: their type, as a config names it. vocabulary: the rows that the embedding has at least. A config that says
    otherwise, or that the weights are quantized, is changed in that alone.
    """
    for name in SIDE_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    config: dict[str, Any] = json_file(base / layout.CONFIG)
    before = copy.deepcopy(config)
    config.pop("quantization_config", None)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in {"dtype", "torch_dtype"} & set(part):
            part[key] = dtype
    for part in (config, config.get("text_config") or {}):
        if "vocab_size" in part:
            part["vocab_size"] = max(part["vocab_size"], vocabulary or 0)
    if config == before:
        shutil.copyfile(base / layout.CONFIG, folder / layout.CONFIG)
    else:
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / layout.CONFIG).write_text(text + "\n", encoding="utf-8")


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a whole model's weights that are in a folder, with their index."""
    shards = folder.glob("model-*-of-*.safetensors")
    return [path for path in (folder / SINGLE, folder / INDEX, *shards) if path.is_file()]
