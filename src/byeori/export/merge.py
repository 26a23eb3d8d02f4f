"""The adapter written into its base, tensor by tensor.

    base's safetensors ──blocks of rows──> W + scale * L R ──> merged safetensors ──> loaded, and compared in logits

Sums are made in float32 and rounded once. Memory: one block of rows and one layer's A and B, however large the model;
what L and R are is in merge_plan. The comparison is what needs memory: 4 bytes a weight, one model after the other.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from byeori.artifacts import base_check
from byeori.artifacts.model_card import TOKENIZER_FILES
from byeori.errors import CheckpointError, ModelError
from byeori.evaluate import stop_tokens
from byeori.export import merge_check
from byeori.export.merge_plan import FLOATS, WEIGHTS, Change, Output, adapter_config, plan, trained_over
from byeori.model.fingerprint import INDEX, SINGLE, Stored
from byeori.model.load import local_folder
from byeori.support import atomic_files

REPORT = "merge_report.json"

_BASE = "--base_model_name_or_path"
_BLOCK_BYTES = 8 << 20
_TYPES = {code: getattr(torch, name) for name, code in FLOATS.items()}


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What a merge wrote.

    base: the base as it was named. dtype: type of the merged weights. verdict: `equal` or `not checked`.
    untied: embedding and head were one tensor in the base and are two in the merged model.
    """

    output_dir: Path
    base: str
    adapter: str
    dtype: str
    tensors: int
    merged_modules: int
    total_bytes: int
    untied: bool
    verdict: str
    max_abs_difference: float | None
    mean_abs_difference: float | None


def merge(
    *,
    adapter: str | Path,
    base: str | None,
    output_dir: Path,
    dtype: str = "auto",
    verify: bool = True,
    overwrite: bool = False,
    on_progress: Callable[[int, int, str], None] | None = None,
    max_shard_bytes: int = 4 << 30,
) -> MergeResult:
    """Write `adapter` into `base` as a model of its own in `output_dir`, which appears whole or not at all.

    adapter, base: folder or Hub id; base None is the one that the adapter names. dtype: auto keeps every tensor's own
    type. verify: load both models and compare their logits on prompts as they were trained. on_progress: called with
    (tensors done, in all, name).

    Raises:
        ModelError: the adapter or the base is damaged, they do not belong together, the adapter is of a kind that
            cannot be merged exactly, or the merged model's logits differ (it is kept as `<output_dir>.failed`).
        CheckpointError: output_dir holds something, or cannot be written.
        HubError: the adapter or the base cannot be downloaded.
    """
    tuned = local_folder(str(adapter))
    config = adapter_config(tuned)
    recorded = config.get("base_model_name_or_path")
    name = base or recorded
    if not name:
        raise ModelError(f"{adapter} does not name its base model; give it with {_BASE}")
    revision = config.get("revision") if name == recorded else None
    base_check.check_name(tuned, recorded, base, option=_BASE)
    folder = local_folder(name, revision)
    check_output(output_dir, overwrite, [tuned, folder])
    base_check.check_weights(tuned, folder, name, option=_BASE)
    outputs, untied = plan(folder=folder, base=name, adapter=tuned, config=config, dtype=dtype)
    facts = _facts(outputs, untied) | {"base": name, "revision": revision, "recorded_base": recorded}
    facts |= {"trained_over": trained_over(tuned, recorded), **_origin(adapter, tuned)}

    def fill(target: Path) -> dict[str, Any]:
        write_weights(target, outputs, max_shard_bytes=max_shard_bytes, on_progress=on_progress)
        _write_side_files(target, folder, tuned, dtype=dtype, untied=untied)
        stop_tokens.record(target)
        compared = merge_check.compare(folder, tuned, target, facts) if verify else {}
        return {**facts, "verdict": "not checked", **compared}

    report = _write_whole(output_dir, facts["total_bytes"], fill)
    return MergeResult(
        output_dir=output_dir,
        adapter=str(adapter),
        verdict=report["verdict"],
        max_abs_difference=report.get("max_abs_difference"),
        mean_abs_difference=report.get("mean_abs_difference"),
        **{key: report[key] for key in ("base", "dtype", "tensors", "merged_modules", "total_bytes", "untied")},
    )


def _origin(adapter: str | Path, folder: Path) -> dict[str, str]:
    """The adapter and its weights as they are now, so that its model card's numbers are found from any place."""
    here = Path(adapter).is_dir()
    return {
        "adapter": str(folder.resolve()) if here else str(adapter),
        "adapter_sha256": atomic_files.sha256(folder / WEIGHTS),
    }


def _facts(outputs: list[Output], untied: bool) -> dict[str, Any]:
    names = {code: name for name, code in FLOATS.items()}
    merged = [(names[item.dtype], item.change.module) for item in outputs if item.change]
    return {
        "dtype": max((name for name, _ in merged), key=lambda name: merge_check.TOLERANCE[name]),
        "tensors": len(outputs),
        "merged_modules": len({module for _, module in merged}),
        "parameters": sum(item.source.count for item in outputs),
        "total_bytes": sum(item.size for item in outputs),
        "untied": untied,
    }


# ---- weights ---------------------------------------------------------------------------------------------------


def write_weights(
    folder: Path, outputs: list[Output], *, max_shard_bytes: int, on_progress: Callable[[int, int, str], None] | None
) -> None:
    """Write model.safetensors, or shards of at most max_shard_bytes (or one tensor) and their index.

    Raises:
        ModelError: a number in the adapter or the result is not finite.
        OSError: the disk is full or read-only.
    """
    shards: list[list[Output]] = [[]]
    for item in outputs:
        if shards[-1] and sum(other.size for other in shards[-1]) + item.size > max_shard_bytes:
            shards.append([])
        shards[-1].append(item)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # wide types first, as the library does, so that every tensor starts at a multiple of its item size
        shard.sort(key=lambda item: -item.size // max(item.source.count, 1))
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for item in shard:
                for block in merged_blocks(item):
                    file.write(block.contiguous().view(torch.uint8).numpy())
                weight_map[item.name] = name
                if on_progress:
                    on_progress(len(weight_map), len(outputs), item.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(item.size for item in outputs)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _header(shard: list[Output]) -> bytes:
    """A safetensors file up to its first tensor: the length of the header, the header, padding to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for item in shard:
        shape = list(item.source.shape)
        entries[item.name] = {"dtype": item.dtype, "shape": shape, "data_offsets": [start, start + item.size]}
        start += item.size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def merged_blocks(item: Output) -> Iterator[torch.Tensor]:
    """One tensor of the merged model as blocks of rows, each [elements] in its final type.

    Raises:
        ModelError: a number is not finite.
    """
    left, right = _factors(item.change) if item.change else (None, None)
    for first, last, block in _row_blocks(item.source):
        if item.source.dtype not in _TYPES:
            yield block
            continue
        if left is not None and right is not None and item.change:
            wide = block.to(torch.promote_types(block.dtype, torch.float32)).view(last - first, -1)
            block = wide.addmm(left[first:last].to(wide.dtype), right.to(wide.dtype), alpha=item.change.scale).view(-1)
        block = block.to(_TYPES[item.dtype])
        if not bool(torch.isfinite(block).all()):
            cause = "merged" if item.change else "base's"
            raise ModelError(
                f"{item.name} has numbers in its {cause} weights that are not finite as {item.dtype}; "
                "take an earlier checkpoint, another --dtype, or an undamaged base"
            )
        yield block


def _row_blocks(stored: Stored) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(first row, last row + 1, [elements]) of a stored tensor; bytes where the type is none of the floats."""
    rows = stored.shape[0] if stored.shape else 1
    step = max(1, _BLOCK_BYTES * rows // max(stored.size, 1))
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        for first in range(0, rows if stored.size else 0, step):
            last = min(first + step, rows)
            buffer = bytearray(stored.size // rows * (last - first))
            if file.readinto(buffer) != len(buffer):
                raise ModelError(f"{stored.path} is cut short; copy or download it again")
            yield first, last, torch.frombuffer(buffer, dtype=_TYPES.get(stored.dtype, torch.uint8))


def _factors(change: Change) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """L [rows, r] and R [r, columns] in float32, or nothing where the change is a whole tensor."""
    if change.a is None or change.b is None:
        return None, None
    read = []
    for letter, stored in (("A", change.a), ("B", change.b)):
        tensor = torch.cat([block for *_, block in _row_blocks(stored)]).view(stored.shape)
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{stored.path}: lora_{letter} of {change.module} has numbers that are not finite; "
                "the run diverged, take an earlier checkpoint"
            )
        read.append(tensor.float())
    a, b = read
    return (a.t(), b.t()) if change.transposed else (b, a)


# ---- the rest of the folder ------------------------------------------------------------------------------------


def _write_side_files(target: Path, base: Path, adapter: Path, *, dtype: str, untied: bool) -> None:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)  # the merged weights are not quantised
    config.pop("_name_or_path", None)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        for key in {"dtype", "torch_dtype"} & set(part) if dtype != "auto" else ():
            part[key] = dtype
    if dtype != "auto" and "torch_dtype" not in config:
        config["dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    # a tokenizer is taken whole from one place: halves of two do not fit together
    words = adapter if any((adapter / name).is_file() for name in TOKENIZER_FILES) else base
    copies = [(words, name) for name in (*TOKENIZER_FILES, "chat_template.jinja")]
    copies += [(base, "generation_config.json"), (base, "preprocessor_config.json"), (base, "processor_config.json")]
    copies += [(adapter, "chat_template.jinja"), (adapter, "template.txt"), (adapter, "byeori.yaml")]
    for source, name in copies:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def check_output(output_dir: Path, overwrite: bool, inputs: list[Path]) -> None:
    """Refuse an output folder that holds something; with `overwrite`, only a model of its own may be replaced.

    Raises:
        CheckpointError: the folder is not free.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise CheckpointError(f"--output_dir {output_dir} is a file; give a folder")
    if any(item.resolve().is_relative_to(output_dir.resolve()) for item in inputs):
        raise CheckpointError(f"--output_dir {output_dir} holds the adapter or its base; give another folder")
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{output_dir} is not empty; give another folder or --overwrite_output_dir True")
    if not (output_dir / "config.json").is_file():
        raise CheckpointError(f"{output_dir} holds something that is no model and is not replaced; give another folder")


def _write_whole(output_dir: Path, total: int, fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Let `fill` write a folder beside output_dir and return its report; the folder takes its place when it is good."""
    temporary = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _check_space(temporary, total)
        report = fill(temporary)
        (temporary / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if report["verdict"] == "different":
            raise ModelError(_set_aside(temporary, output_dir, report))
        _put_in_place(temporary, output_dir)
    except OSError as error:
        raise CheckpointError(_write_error(error, output_dir, total)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _check_space(folder: Path, total: int) -> None:
    if shutil.disk_usage(folder).free < total:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _put_in_place(temporary: Path, output_dir: Path) -> None:
    """Flush every file, then rename; what was there before goes only when the new folder is whole."""
    for path in [*temporary.iterdir(), temporary]:
        atomic_files.flush(path)
    former = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.old")
    if output_dir.is_dir():
        output_dir.rename(former)
    temporary.rename(output_dir)
    atomic_files.flush(output_dir.parent)
    shutil.rmtree(former, ignore_errors=True)


def _set_aside(temporary: Path, output_dir: Path, report: dict[str, Any]) -> str:
    """Keep a model that failed its check under a name that nobody takes for a good one; returns the sentence."""
    failed = output_dir.with_name(f"{output_dir.name}.failed")
    shutil.rmtree(failed, ignore_errors=True)
    temporary.rename(failed)
    return (
        f"the merged model is not the adapter on {report['base']}: beyond rounding, logits differ by up to "
        f"{report['beyond_rounding']:.3g} and by {report['mean_beyond_rounding']:.3g} on average "
        f"({report['tolerance']:.3g} and {report['tolerance'] / 16:.3g} are allowed in {report['dtype']}); "
        f"it is kept in {failed} for a look, do not use it"
    )


def _write_error(error: OSError, output_dir: Path, total: int) -> str:
    if error.errno == errno.ENOSPC:
        return (
            f"the disk is full: the merged model in {output_dir} needs {total / 2**30:.1f} GiB; "
            "free space or give another --output_dir"
        )
    return f"{output_dir} could not be written ({error.strerror or error}); give another --output_dir"
