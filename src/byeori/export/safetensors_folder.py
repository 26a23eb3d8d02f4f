"""The format of a whole model: safetensors weights, config and tokenizer, as transformers, vLLM and others load it."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byeori.artifacts import layout, model_files, tokenizer_files
from byeori.errors import ModelError
from byeori.model.fingerprint import INDEX, SINGLE, read_header, weight_files
from byeori.support.foreign_files import json_file

if TYPE_CHECKING:
    from byeori.export.merge_plan import MergedModel, MergedTensor, Progress


@dataclass(frozen=True, kw_only=True)
class SafetensorsFolder:
    """model.safetensors, or shards of at most `max_shard_bytes` (or one tensor) with their index."""

    max_shard_bytes: int = 4 << 30
    name = "safetensors"

    def recognises(self, folder: Path) -> bool:
        return (folder / "config.json").is_file()

    def files(self, folder: Path) -> Iterator[Path]:
        weights = weight_files(folder)
        for path in weights:
            if path.parent != folder:
                raise ModelError(f"{folder / INDEX} names {path}, which is in another folder; merge again")
            read_header(path)
        yield from (
            folder / layout.CONFIG,
            *(folder / name for name in model_files.SIDE_FILES),
            *weights,
            folder / INDEX,
        )

    def write(self, folder: Path, model: MergedModel, on_progress: Progress) -> None:
        import torch  # which publish does without

        from byeori.evaluate import stop_tokens
        from byeori.export import merged_tensors

        weight_map: dict[str, str] = {}
        shards = self._shards(model.tensors)
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            with (folder / name).open("wb") as file:
                file.write(_header(shard))
                for item in shard:
                    for block in merged_tensors.blocks(item):
                        file.write(block.contiguous().view(torch.uint8).numpy())
                    weight_map[item.name] = name
                    on_progress(len(weight_map), len(model.tensors))
        if len(shards) > 1:
            _write_json(folder / INDEX, {"metadata": {"total_size": model.total_bytes}, "weight_map": weight_map})
        _write_config(folder / layout.CONFIG, model)
        _copy_side_files(folder, model)
        stop_tokens.record(folder)

    def check(self, folder: Path, model: MergedModel, on_progress: Progress) -> tuple[dict[str, Any], str]:
        from byeori.export import merge_check

        return merge_check.compare(folder, model, on_progress)

    def _shards(self, tensors: list[MergedTensor]) -> list[list[MergedTensor]]:
        shards: list[list[MergedTensor]] = [[]]
        for item in tensors:
            if shards[-1] and sum(other.size for other in shards[-1]) + item.size > self.max_shard_bytes:
                shards.append([])
            shards[-1].append(item)
        # wide dtypes first, as safetensors does, so that every tensor starts at a multiple of its item size
        return [sorted(shard, key=lambda item: -item.size // max(item.source.count, 1)) for shard in shards]


def _header(shard: list[MergedTensor]) -> bytes:
    """Return a safetensors file up to its first tensor: the header's length, the header, padding to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for item in shard:
        shape = list(item.source.shape)
        entries[item.name] = {"dtype": item.dtype, "shape": shape, "data_offsets": [start, start + item.size]}
        start += item.size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_config(path: Path, model: MergedModel) -> None:
    """Write the base's config.json for merged weights: unquantized, with their dtype, untied if they are.

    It is the base's own file byte for byte if nothing of this changes it.
    """
    source = model.base / layout.CONFIG
    config: dict[str, Any] = json_file(source)
    before = copy.deepcopy(config)
    if not model.quantized:
        config.pop("quantization_config", None)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if model.untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if model.vocabulary is not None and "vocab_size" in part:
            part["vocab_size"] = model.vocabulary
        for key in {"dtype", "torch_dtype"} & set(part) if model.dtype != "auto" else ():
            part[key] = model.dtype
    if model.dtype != "auto" and "torch_dtype" not in config:
        config["dtype"] = model.dtype
    if config == before:
        shutil.copyfile(source, path)
    else:
        _write_json(path, config)


def _copy_side_files(folder: Path, model: MergedModel) -> None:
    """Copy tokenizer, template and settings, from the adapter where it has them.

    Of two tokenizers with the same tokens the base's files are taken: the adapter's may have been saved again.
    """
    own = tokenizer_files.there(model.adapter) and not tokenizer_files.same_tokens(model.adapter, model.base)
    served = tokenizer_files.chat_template_of(model.adapter) or tokenizer_files.chat_template_of(model.base)
    # from one place: halves of two do not fit
    tokenizer_files.copy(model.adapter if own else model.base, folder, chat_template=served)
    copies = [(model.base, name) for name in model_files.SIDE_FILES]
    copies += [(model.adapter, name) for name in (layout.TEMPLATE, layout.SETTINGS)]
    for source, name in copies:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
