"""The format of llama.cpp and Ollama: a GGUF file, a LoRA in GGUF beside it, a Modelfile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from byeori.artifacts import layout
from byeori.errors import ModelError

_MAGIC = b"GGUF"


class GgufFolder:
    """Files whose names end in .gguf, and Ollama's Modelfile."""

    name = "gguf"

    def recognises(self, folder: Path) -> bool:
        return any(folder.glob("*.gguf"))

    def files(self, folder: Path) -> Iterator[Path]:
        for path in sorted(folder.glob("*.gguf")):
            with path.open("rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise ModelError(f"{path} is not a GGUF file; export it again")
            yield path
        yield folder / layout.MODELFILE
