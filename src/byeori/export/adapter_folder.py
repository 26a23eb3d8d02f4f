"""The format of an adapter: the two files that PEFT loads. Training writes it, so merge does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from byeori.artifacts import layout
from byeori.errors import ModelError
from byeori.model.fingerprint import read_header


class AdapterFolder:
    """adapter_config.json and adapter_model.safetensors."""

    name = "adapter"

    def recognises(self, folder: Path) -> bool:
        return (folder / layout.ADAPTER_CONFIG).is_file()

    def files(self, folder: Path) -> Iterator[Path]:
        weights = folder / layout.ADAPTER
        if not weights.is_file():
            raise ModelError(f"{folder} is not a finished adapter: it has no {layout.ADAPTER}; let the training end")
        read_header(weights)
        yield from (folder / layout.ADAPTER_CONFIG, weights)
