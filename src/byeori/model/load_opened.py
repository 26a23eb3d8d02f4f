"""Checkpoints that are stored quantized: which are opened to full precision, and loading those.

Opened weights are numbers like any other: they train on every device, can be quantized again to 4 bit, sharded and
merged. Checkpoints of bitsandbytes keep their layers, which train as they are.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from byeori.errors import ModelError
from byeori.model import packed, quantize
from byeori.model.fingerprint import Stored
from byeori.model.opened import Source, read
from byeori.model.text_model import auto_class

# Formats that only transformers opens, with a package of each one's own: method -> (module, what pip calls it).
_PACKAGES = {
    "aqlm": ("aqlm", "aqlm"),
    "eetq": ("eetq", "eetq"),
    "fp_quant": ("fp_quant", "fp_quant"),
    "higgs": ("flute", "flute-kernel"),
    "hqq": ("hqq", "hqq"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "quark": ("quark", "amd-quark"),
    "spqr": ("spqr_quant", "spqr_quant"),
    "torchao": ("torchao", "torchao"),
    "vptq": ("vptq", "vptq"),
}
_CODES = ("U8", "I8", "I16", "I32")


class _Lazy:
    """A tensor that transformers reads when it needs it, as it reads slices of safetensors."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, index: Any) -> torch.Tensor:
        return read(self.source)[index]


def opens(config: Any) -> str | None:
    """Return how a checkpoint's weights are quantized if they are opened when they are loaded, else None."""
    found = quantize.stored(config)
    if found is None or found[1] < 16:
        return None
    module, _ = _PACKAGES.get(found[0], ("", ""))
    return None if module and _installed(module) else found[0]


def _installed(module: str) -> bool:
    return find_spec(module.partition(".")[0]) is not None


def note(config: Any, dtype: torch.dtype, bits: int | None) -> str | None:
    """Return a sentence on a checkpoint that is opened, or None. bits: 4 or 8 if it is quantized again."""
    method = opens(config)
    if method is None:
        return None
    held = f"and held in {bits} bit" if bits else "; --load_in_4bit makes them smaller"
    opened = f"opened to {str(dtype).removeprefix('torch.')}"
    return f"The weights are stored quantized ({method}): they are {opened}{' ' if bits else ''}{held}"


def tensors(folder: Path, config: Any) -> dict[str, Source]:
    """Return a checkpoint's tensors by name, opened if they are stored quantized.

    Raises:
        ModelError: if they are in a format that is not opened; the message names the package that is missing.
    """
    method, found = opens(config), packed.sources(folder)
    left = next((key for key, item in found.items() if isinstance(item, Stored) and item.dtype in _CODES), None)
    if method is None or left is None:
        return found
    advice = "give the full-precision model that it was made from"
    if method in _PACKAGES:
        package = _PACKAGES[method][1]
        raise ModelError(f"{folder} is stored quantized ({method}): pip install {package}, which opens it, or {advice}")
    raise ModelError(f"{folder} is stored quantized ({method}) in a way that byeori does not open ({left}); {advice}")


def load_opened(
    folder: Path, config: Any, dtype: torch.dtype, *, trust_remote_code: bool
) -> tuple[Any, dict[str, Any]]:
    """Return the model with opened weights, and what transformers says of its tensors. config: loses its quantization.

    Raises:
        ModelError: if the weights cannot be opened. Else whatever transformers raises.
    """
    from transformers import GenerationConfig

    sources, name = tensors(folder, config), config.name_or_path
    del config.quantization_config
    with torch.device("meta"):
        kind = type(auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code))
    generation = (folder / "generation_config.json").is_file()
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict={key: _Lazy(source) for key, source in sources.items()},
        dtype=dtype,
        generation_config=GenerationConfig.from_pretrained(folder) if generation else None,
        output_loading_info=True,
    )
    model.config.name_or_path = model.name_or_path = name
    return model, info
