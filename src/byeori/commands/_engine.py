"""What generate and compare share: the engine that answers, and what its answers depend on."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from byeori.artifacts import layout, records, saved_model, serving
from byeori.artifacts.saved_model import SavedModel
from byeori.commands import _fits
from byeori.config import CompareSettings, GenerateSettings, SamplingSettings
from byeori.data.tokenize import Encoding
from byeori.distributed.processes import init_processes
from byeori.errors import ConfigError, ModelError
from byeori.evaluate import stop_tokens
from byeori.evaluate.engines import vllm
from byeori.evaluate.engines.base import Ending, Engine, Sampling, Side
from byeori.evaluate.engines.llamacpp import LlamaCpp
from byeori.evaluate.engines.plain import Plain
from byeori.evaluate.engines.two_models import TwoModels
from byeori.evaluate.generate import OpenEngine
from byeori.export import export, llama_cpp
from byeori.model import load
from byeori.support.atomic_files import sha256
from byeori.support.cache_folder import cache_folder
from byeori.support.console import say

Settings = GenerateSettings | CompareSettings

_PARALLEL = 8  # requests to llama.cpp at once
_WEIGHTS: dict[str, export.Weights] = {"auto": "auto", "bfloat16": "bf16", "float16": "f16", "float32": "f32"}


class SharedBase:
    """A loaded base that several adapters are put on, one after another."""

    def __init__(self) -> None:
        self._key: tuple[str, str | None, str] | None = None
        self._tuned: Any = None

    def load(self, saved: SavedModel, dtype: str) -> Any:
        """Load the model, or put the adapter on the base that is loaded. What was returned before is of no use then.

        Raises:
            ModelError, HubError: see saved_model.load_weights.
        """
        key = (saved.base, saved.revision, dtype)
        if self._key == key and saved.is_adapter and saved.vocabulary is None:
            base = self._tuned.unload()
            self._tuned = saved_model.with_adapter(base, saved)
            return self._tuned
        self._key = self._tuned = None  # before the next one is loaded
        model = saved_model.load_weights(saved, dtype, init_processes().device)
        if saved.is_adapter and saved.vocabulary is None:  # an adapter with rows of the embedding changes the base
            self._key, self._tuned = key, model
        return model


def choose(settings: Settings, saved: SavedModel) -> str:
    """Return the engine that the settings mean.

    Raises:
        ConfigError, ModelError: if it is not installed, or cannot run this model.
    """
    refused = _vllm_refuses(saved)
    if settings.engine == "auto":
        return "vllm" if vllm.installed() and torch.cuda.is_available() and not refused else "transformers"
    if settings.engine == "vllm" and refused:
        raise ModelError(
            f"vLLM does not serve {saved.name} as an adapter: {refused}; merge it with `byeori merge`, or pass "
            "--engine transformers"
        )
    if settings.engine != "transformers" and "generation_batch_tokens" in settings.model_fields_set:
        raise ConfigError(f"generation_batch_tokens has no effect on --engine {settings.engine}; leave it out")
    return settings.engine


def opener(
    settings: Settings,
    saved: SavedModel,
    encoding: Encoding,
    texts: Sequence[Sequence[int]],
    *,
    suffix: str,
    shared: SharedBase | None = None,
) -> OpenEngine:
    """Return the function that loads the model into the engine of the settings, once, when it is first called.

    texts: the token ids of everything that it will read. suffix: text that ends an answer.
    shared: where the base may be loaded already.

    Raises:
        ModelError: if the model has no embedding for one of the tokens, or the engine cannot run it.
    """
    engine = choose(settings, saved)
    _fits.check_prompts(saved, encoding.tokenizer, texts)
    context = max(map(len, texts)) + settings.max_new_tokens + 1
    if saved.max_length is not None:
        context = min(context, saved.max_length)

    @functools.cache
    def transformers() -> Plain:
        return Plain(
            (shared or SharedBase()).load(saved, settings.dtype),
            encoding.tokenizer,
            suffix,
            batch_size=settings.generation_batch_size,
            batch_tokens=settings.generation_batch_tokens,
        )

    @functools.cache
    def other() -> Engine:
        base = load.local_folder(saved.base, saved.revision)
        ids = stop_tokens.of_folder(encoding.tokenizer, base)
        ending = Ending(tokenizer=encoding.tokenizer, stop_ids=ids, suffix=suffix)
        if engine == "llamacpp":
            return _llama_cpp(settings, saved, ending, context, transformers)
        dtype = load.resolve_dtype(settings.dtype, init_processes().device)
        return vllm.VLLM(
            base,
            ending,
            adapter=(saved.folder, serving.vllm_rank(saved.folder)) if saved.is_adapter else None,
            dtype=str(dtype).removeprefix("torch."),
            context=context,
            at_once=settings.generation_batch_size if "generation_batch_size" in settings.model_fields_set else None,
        )

    return transformers if engine == "transformers" else other


def losses_opener(saved: SavedModel, dtype: str, encoding: Encoding, texts: Sequence[Sequence[int]]) -> OpenEngine:
    """Return the function that loads a model, once, to give log-probs of texts in token ids.

    Raises:
        ModelError: if it has no embedding for one of the tokens.
    """
    _fits.check_prompts(saved, encoding.tokenizer, texts)
    return functools.cache(
        lambda: Plain(saved_model.load_weights(saved, dtype, init_processes().device), encoding.tokenizer)
    )


def compared(name: str, base: str | None) -> tuple[SavedModel, SavedModel | None]:
    """Return what `compare` is given, and the model that it began from if it is not an adapter.

    Raises:
        ModelError: if it is a model that names none.
    """
    folder = load.local_folder(name)
    if (folder / layout.ADAPTER_CONFIG).is_file():
        return saved_model.find(name, base), None
    record = records.base_record(folder)
    if base is None and record is None:
        raise ModelError(
            f"{name} is a whole model that does not record what it began from; name that with --base_model, or give "
            "the folder that `byeori sft` wrote"
        )
    return saved_model.find(name), saved_model.find(base or str(record and record["base_model"]))


def both(tuned: OpenEngine, base: OpenEngine) -> OpenEngine:
    """Return what opens a model that was trained in full beside its base."""
    # openers keep what they opened; the functions inside let go of it
    sides: dict[Side, OpenEngine] = {"tuned": tuned, "base": base}
    openers = {side: getattr(opened, "__wrapped__", opened) for side, opened in sides.items()}
    return functools.cache(lambda: TwoModels(openers))


def _llama_cpp(settings: Settings, saved: SavedModel, ending: Ending, context: int, losses: OpenEngine) -> LlamaCpp:
    """Start llama.cpp with the model's GGUF files, which are made once."""
    server = llama_cpp.LlamaCpp(
        *gguf_files(saved, settings.dtype),
        context=context,
        threads=torch.get_num_threads(),
        parallel=min(settings.generation_batch_size, _PARALLEL),
        wide_cache=settings.dtype == "float32",
    )
    return LlamaCpp(server, ending, has_adapter=saved.is_adapter, losses=losses)


def gguf_files(saved: SavedModel, dtype: str) -> list[Path]:
    """Return the GGUF file of a model, and of an adapter on it; they are made once.

    Raises:
        ModelError, ConfigError: if llama.cpp's converter cannot make them, or is not installed.
    """
    weights = _WEIGHTS[dtype]
    folder = cache_folder() / "gguf" / _hash([files(saved), weights])
    if not (folder / layout.EXPORT_REPORT).is_file():
        base = saved.base if saved.is_adapter else None
        export.export(
            model=saved.name, base=base, output_format="gguf", output_dir=folder, weights=weights, check=None, say=say
        )
    return sorted(folder.glob("*.gguf"), key=lambda path: path.name.endswith("-lora.gguf"))


def _vllm_refuses(saved: SavedModel) -> str:
    return serving.vllm_refuses(records.adapter_config(saved.folder)) if saved.is_adapter else ""


def sampling_of(settings: SamplingSettings, saved: SavedModel) -> Sampling:
    """Return the sampling parameters of the settings, within the model's maximum length."""
    names = [field.name for field in fields(Sampling) if field.name != "max_length"]
    return Sampling(max_length=saved.max_length, **{name: getattr(settings, name) for name in names})


def depends_on(settings: Settings, saved: SavedModel, sampling: Sampling, tokens: Any) -> list[Any]:
    """Return what answers depend on, as JSON data: tokens, sampling, engine, and the files of the model.

    tokens: of the prompts, and of whatever else the model reads.
    """
    return [files(saved), asdict(sampling), settings.dtype, choose(settings, saved), tokens]


def files(saved: SavedModel) -> list[Any]:
    """Return what tells the files of a model, and of an adapter on it, from others."""
    base = load.local_folder(saved.base, saved.revision).resolve()
    sizes = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(base.glob("*.safetensors"))]
    names = (layout.CONFIG, layout.ADAPTER_CONFIG, layout.ADAPTER)
    small = [saved.folder / name for name in names] + [base / layout.CONFIG]
    return [sizes, [sha256(path) for path in small if path.is_file()]]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]
