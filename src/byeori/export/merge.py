"""Merge an adapter into its base, as a model of its own.

    base's safetensors ──blocks of rows──> W + scale * L R ──> merged model ──> loaded, and its logits compared

Writing needs the memory of one block of rows; the comparison needs 4 bytes a weight, one model after the other.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byeori.artifacts import layout, saved_model
from byeori.errors import CheckpointError, ModelError
from byeori.export import merge_check
from byeori.export.formats import MergedFormat
from byeori.export.merge_plan import MergedModel, Progress, adapter_config, plan, trained_over
from byeori.export.safetensors_folder import SafetensorsFolder
from byeori.model.load import local_folder
from byeori.support import atomic_files

_BASE = "--base_model_name_or_path"
_SAFETENSORS = SafetensorsFolder()


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """The result of a merge.

    base: its name as given. dtype: of the merged weights. verdict: `equal` or `not checked`. untied: whether embedding
    and head were one tensor in the base and are two in the merged model.
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
    on_progress: Progress = lambda done, total, name: None,
    output_format: MergedFormat = _SAFETENSORS,
) -> MergeResult:
    """Merge `adapter` into `base` and write the model to `output_dir`, which appears whole or not at all.

    adapter, base: a folder or Hub id; without a base, the one that the adapter names. dtype: `auto` keeps the dtype of
    every tensor. verify: compare the logits of both models on prompts as in training. on_progress: called with (tensors
    done, total, name).

    Raises:
        ModelError: if the adapter or the base is damaged, they do not belong together, the adapter is of a kind that
            cannot be merged exactly, or the merged model's logits differ (it is left in `<output_dir>.failed`).
        CheckpointError: if output_dir is not empty or cannot be written.
        HubError: if the adapter or the base cannot be downloaded.
    """
    adapter_folder = local_folder(str(adapter))
    config = adapter_config(adapter_folder)
    recorded = config.get("base_model_name_or_path")
    name = base or recorded
    if not name:
        raise ModelError(f"{adapter} does not name its base model; pass it with {_BASE}")
    revision = config.get("revision") if name == recorded else None
    saved_model.check_base_name(adapter_folder, recorded, base, option=_BASE)
    base_folder = local_folder(name, revision)
    check_output(output_dir, overwrite, [adapter_folder, base_folder])
    saved_model.check_base_weights(adapter_folder, base_folder, name, option=_BASE)
    model = plan(folder=base_folder, base=name, adapter=adapter_folder, config=config, dtype=dtype)
    report = {
        **_summary(model),
        "base": name,
        "revision": revision,
        "recorded_base": recorded,
        "trained_over": trained_over(adapter_folder, recorded),
        # absolute, and with the hash of its weights, so that the model card finds the adapter's numbers from anywhere
        "adapter": str(adapter_folder.resolve()) if Path(adapter).is_dir() else str(adapter),
        "adapter_sha256": atomic_files.sha256(adapter_folder / layout.ADAPTER),
        "verdict": "not checked",
    }
    what = f"the merged model in {output_dir} ({model.total_bytes / 2**30:.1f} GiB)"
    advice = "free some space or choose another --output_dir"
    with atomic_files.disk_errors(what, advice=advice), atomic_files.new_folder(output_dir) as temporary:
        _check_space(temporary, model.total_bytes)
        output_format.write(temporary, model, on_progress)
        difference = ""
        if verify:
            measured, difference = output_format.check(temporary, model)
            report |= {"verdict": "different" if difference else "equal", **measured}
        text = json.dumps(report, indent=1, ensure_ascii=False)
        (temporary / layout.MERGE_REPORT).write_text(text + "\n", encoding="utf-8")
        if difference:
            failed = _set_aside(temporary, output_dir)
            raise ModelError(
                f"the merged model differs from the adapter on {name}: {difference}; it is left in {failed} for "
                "inspection, do not use it"
            )
    return _result(report, output_dir, str(adapter))


def _summary(model: MergedModel) -> dict[str, Any]:
    return {
        "dtype": merge_check.coarsest_dtype(model),
        "tensors": len(model.tensors),
        "merged_modules": len({item.change.module for item in model.tensors if item.change}),
        "parameters": model.parameters,
        "total_bytes": model.total_bytes,
        "untied": model.untied,
    }


def _result(report: dict[str, Any], output_dir: Path, adapter: str) -> MergeResult:
    names = ("base", "dtype", "tensors", "merged_modules", "total_bytes", "untied", "verdict")
    return MergeResult(
        output_dir=output_dir,
        adapter=adapter,
        max_abs_difference=report.get("max_abs_difference"),
        mean_abs_difference=report.get("mean_abs_difference"),
        **{key: report[key] for key in names},
    )


def check_output(output_dir: Path, overwrite: bool, inputs: list[Path]) -> None:
    """Raise unless the output folder may be written; with `overwrite`, it may hold a model, which is replaced.

    Raises:
        CheckpointError: if it is a file, holds an input, or is not empty.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise CheckpointError(f"--output_dir {output_dir} is a file; choose a folder")
    if any(item.resolve().is_relative_to(output_dir.resolve()) for item in inputs):
        raise CheckpointError(f"--output_dir {output_dir} holds the adapter or its base; choose another folder")
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{output_dir} is not empty; choose another folder or pass --overwrite_output_dir True")
    if not (output_dir / "config.json").is_file():
        raise CheckpointError(f"{output_dir} holds no model, so it is not overwritten; choose another folder")


def _check_space(folder: Path, total: int) -> None:
    if shutil.disk_usage(folder).free < total:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _set_aside(temporary: Path, output_dir: Path) -> Path:
    """Move a model that failed its check to `<output_dir>.failed`."""
    failed = output_dir.with_name(f"{output_dir.name}.failed")
    shutil.rmtree(failed, ignore_errors=True)
    return temporary.rename(failed)
