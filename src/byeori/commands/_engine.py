"""What generate and compare share: the engine that answers, and what its answers depend on."""

from __future__ import annotations

import functools
from dataclasses import asdict, fields
from typing import Any

from byeori.artifacts import layout, saved_model
from byeori.artifacts.saved_model import SavedModel
from byeori.config import CompareSettings, GenerateSettings, SamplingSettings
from byeori.data.tokenize import Encoding
from byeori.distributed.processes import init_processes
from byeori.evaluate.engines.base import Sampling
from byeori.evaluate.engines.plain import Plain
from byeori.evaluate.generate import OpenEngine
from byeori.model.load import local_folder
from byeori.support.atomic_files import sha256


def opener(settings: GenerateSettings | CompareSettings, saved: SavedModel, encoding: Encoding) -> OpenEngine:
    """Return the function that loads the model into the engine of the settings, once, when it is first called."""
    suffix = encoding.template.suffix if encoding.template else ""

    @functools.cache
    def load() -> Plain:
        model = saved_model.load_weights(saved, settings.dtype, init_processes().device)
        return Plain(
            model,
            saved.tokenizer,
            suffix,
            batch_size=settings.generation_batch_size,
            batch_tokens=settings.generation_batch_tokens,
        )

    return load


def sampling_of(settings: SamplingSettings, saved: SavedModel) -> Sampling:
    """Return the sampling parameters of the settings, within the model's maximum length."""
    names = [field.name for field in fields(Sampling) if field.name != "max_length"]
    return Sampling(max_length=saved.max_length, **{name: getattr(settings, name) for name in names})


def depends_on(
    settings: GenerateSettings | CompareSettings, saved: SavedModel, sampling: Sampling, tokens: Any
) -> list[Any]:
    """Return what answers depend on, as JSON data: tokens, sampling, engine, and the files of the model.

    tokens: of the prompts, and of whatever else the model reads.
    """
    base = local_folder(saved.base, saved.revision) if saved.is_adapter else saved.folder
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(base.glob("*.safetensors"))]
    small = [folder / name for folder in {base, saved.folder} for name in (layout.CONFIG, layout.ADAPTER_CONFIG)]
    hashes = sorted(sha256(path) for path in [*small, saved.folder / layout.ADAPTER] if path.is_file())
    return [files, hashes, asdict(sampling), settings.dtype, tokens]
