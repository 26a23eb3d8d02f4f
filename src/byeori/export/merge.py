"""Merge an adapter into its base, as a model of its own.

    base's safetensors ──blocks of rows──> W + scale * L R ──> merged model ──> loaded, and its logits compared

Writing needs the memory of one block of rows; the comparison needs 4 bytes a weight, one model after the other.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from byeori.artifacts import layout, saved_model
from byeori.errors import ModelError
from byeori.export import merge_check
from byeori.export.formats import MergedFormat
from byeori.export.merge_plan import MergedModel, Progress, adapter_config, plan, trained_over
from byeori.export.safetensors_folder import SafetensorsFolder
from byeori.model.load import local_folder
from byeori.support import atomic_files, output_paths

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
    on_progress: Progress = lambda done, total: None,
    output_format: MergedFormat = _SAFETENSORS,
) -> MergeResult:
    """Merge `adapter` into `base` and write the model to `output_dir`, which appears whole or not at all.

    adapter, base: a folder or Hub id; without a base, the one that the adapter names. dtype: `auto` keeps the dtype of
    every tensor. verify: compare the logits of both models on prompts as in training. on_progress: called with (tensors
    done, total).

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
    output_paths.check_model_output(output_dir, overwrite, [adapter_folder, base_folder])
    saved_model.check_base_weights(adapter_folder, base_folder, name, option=_BASE)
    model = plan(folder=base_folder, base=name, adapter=adapter_folder, config=config, dtype=dtype)
    report = _summary(model) | {
        "base": name,
        "revision": revision,
        "recorded_base": recorded,
        "trained_over": trained_over(adapter_folder, recorded),
        # absolute, and with the hash of its weights, so that the model card finds the adapter's numbers from anywhere
        "adapter": str(adapter_folder.resolve()) if Path(adapter).is_dir() else str(adapter),
        "adapter_sha256": atomic_files.sha256(adapter_folder / layout.ADAPTER),
    }
    what = f"the merged model in {output_dir} ({model.total_bytes / 2**30:.1f} GiB)"
    with (
        atomic_files.disk_errors(what, advice="free some space or choose another --output_dir"),
        atomic_files.new_folder(output_dir) as temporary,
    ):
        _check_space(temporary, model.total_bytes)
        output_format.write(temporary, model, on_progress)
        measured, difference = output_format.check(temporary, model) if verify else ({}, "")
        verdict = ("different" if difference else "equal") if verify else "not checked"
        report |= {"verdict": verdict, **measured}
        text = json.dumps(report, indent=1, ensure_ascii=False)
        (temporary / layout.MERGE_REPORT).write_text(text + "\n", encoding="utf-8")
        if difference:
            raise ModelError(_set_aside(temporary, output_dir, f"{name}: {difference}"))
    report = {field.name: report.get(field.name) for field in fields(MergeResult)}
    return MergeResult(**report | {"output_dir": output_dir, "adapter": str(adapter)})


def _summary(model: MergedModel) -> dict[str, Any]:
    return {
        "dtype": merge_check.coarsest_dtype(model),
        "tensors": len(model.tensors),
        "merged_modules": len({item.change.module for item in model.tensors if item.change}),
        "parameters": model.parameters,
        "total_bytes": model.total_bytes,
        "untied": model.untied,
    }


def _check_space(folder: Path, total: int) -> None:
    if shutil.disk_usage(folder).free < total:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _set_aside(temporary: Path, output_dir: Path, reason: str) -> str:
    """Move a model that failed its check to `<output_dir>.failed`; returns the error."""
    failed = output_dir.with_name(f"{output_dir.name}.failed")
    shutil.rmtree(failed, ignore_errors=True)
    temporary.rename(failed)
    return f"the merged model differs from the adapter on {reason}; it is left in {failed}, do not use it"
