"""Merge an adapter into its base, as a model of its own.

    base's safetensors ──blocks of rows──> W + scale * L R ──> merged model ──> its logits compared, layer by layer

Writing needs the memory of one block of rows; the comparison that of the largest layer. The merged model is in place
before it is compared, marked `not checked`, so that a comparison that fails or is killed does not cost the merge.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from byeori.artifacts import layout, model_files, saved_model
from byeori.errors import ByeoriError, ModelError
from byeori.export import merge_check, quantized_base
from byeori.export.adapter_changes import adapter_config
from byeori.export.formats import MergedFormat
from byeori.export.merge_plan import MergedModel, Onto, Progress, plan, trained_bits, trained_over
from byeori.export.safetensors_folder import SafetensorsFolder
from byeori.model import rope_scaling
from byeori.model.adapter import untied_note
from byeori.model.load import local_folder
from byeori.support import atomic_files, output_paths
from byeori.support.foreign_files import json_record
from byeori.support.text_files import one_line
from byeori.train import memory

_BASE = "--base_model_name_or_path"
_SAFETENSORS = SafetensorsFolder()

Phase = Callable[[str], AbstractContextManager[Progress]]
"""Announces a part of the work by its name, and yields the function that its progress is told to."""


@contextmanager
def _silent(name: str) -> Iterator[Progress]:
    yield lambda done, total: None


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """The result of a merge.

    base: its name as given. onto: `base`, or `opened` for weights opened from 4 or 8 bit. dtype: of the merged weights.
    verdict: `equal` or `not checked`. untied: whether embedding and head were one tensor in the base and are two in the
    merged model. distance, plain_base_distance: mean absolute difference of log-probs from the model that was trained,
    if it was trained quantized and the merged weights are not those. notes: what to know about it, in sentences.
    """

    output_dir: Path
    base: str
    adapter: str
    onto: str
    dtype: str
    tensors: int
    merged_modules: int
    total_bytes: int
    untied: bool
    verdict: str
    max_abs_difference: float | None
    mean_abs_difference: float | None
    distance: float | None
    plain_base_distance: float | None
    notes: list[str]


def merge(
    *,
    adapter: str | Path,
    base: str | None,
    output_dir: Path,
    dtype: str = "auto",
    onto: Onto = "auto",
    verify: bool = True,
    overwrite: bool = False,
    phase: Phase = _silent,
    output_format: MergedFormat = _SAFETENSORS,
) -> MergeResult:
    """Merge `adapter` into `base` and write the model to `output_dir`, which appears whole or not at all.

    adapter, base: a folder or Hub id; without a base, the one that the adapter names. dtype: `auto` keeps the dtype of
    every tensor. onto: see merge_plan.plan. verify: compare the logits of both models on prompts as in training.

    Raises:
        ModelError: if the adapter or the base is damaged, they do not belong together, the adapter is of a kind that
            cannot be merged exactly, or the merged model's logits differ (it is left in `<output_dir>.failed`).
        CheckpointError: if output_dir is not empty or cannot be written.
        HubError: if the adapter or the base cannot be downloaded.
    """
    adapter_folder = local_folder(str(adapter))
    if not (adapter_folder / layout.ADAPTER_CONFIG).is_file() and model_files.weight_files(adapter_folder):
        raise ModelError(f"{adapter} is a whole model already; generate, export, serve and publish take it as it is")
    config = adapter_config(adapter_folder)
    recorded = config.get("base_model_name_or_path")
    name = base or recorded
    if not name:
        raise ModelError(f"{adapter} does not name its base model; pass it with {_BASE}")
    revision = config.get("revision") if name == recorded else None
    saved_model.check_base_name(adapter_folder, recorded, base, option=_BASE)
    rope = rope_scaling.of_settings(saved_model.run_settings(adapter_folder))
    base_folder = rope_scaling.view(local_folder(name, revision), rope, name)
    atomic_files.recover(output_dir)
    output_paths.check_model_output(output_dir, overwrite, [adapter_folder, base_folder])
    trained = quantized_base.check_base(adapter_folder, base_folder, name, option=_BASE)
    model = plan(
        folder=base_folder, base=name, adapter=adapter_folder, config=config, dtype=dtype, onto=onto, trained=trained
    )
    report = _summary(model) | _origin(adapter, name, revision, recorded, trained)
    notes = [untied_note(model.names.model_type).capitalize()] if model.untied else []
    notes += [trained.note] if trained else []
    memory.keep_large_blocks_apart()  # blocks of weights would leave holes in the heap
    _write(output_format, output_dir, model, phase, report)
    if verify:
        report |= _checked(output_format, output_dir, model, phase, notes)
        atomic_files.write(output_dir / layout.MERGE_REPORT, _text(report))
        if report["verdict"] == "different":
            raise ModelError(_set_aside(output_dir, f"{name}: {report['difference']}"))
        notes += _distance_note(report, adapter_folder, adapter)
    report = {field.name: report.get(field.name) for field in fields(MergeResult)}
    return MergeResult(**report | {"output_dir": output_dir, "adapter": str(adapter), "notes": notes})


def _origin(
    adapter: str | Path, base: str, revision: str | None, recorded: str | None, trained: quantized_base.TrainedOn | None
) -> dict[str, Any]:
    """What the report says of adapter and base, before the check."""
    folder = local_folder(str(adapter))
    return {
        "base": base,
        "revision": revision,
        "recorded_base": recorded,
        "trained_over": trained_over(folder, recorded),
        # absolute, and with the hash of its weights, so that the model card finds the adapter's numbers from anywhere
        "adapter": str(folder.resolve()) if Path(adapter).is_dir() else str(adapter),
        "adapter_sha256": atomic_files.sha256(folder / layout.ADAPTER),
        "base_distance": trained.distance if trained else None,
        "verdict": "not checked",
    }


def _write(
    output_format: MergedFormat, output_dir: Path, model: MergedModel, phase: Phase, report: dict[str, Any]
) -> None:
    what = f"the merged model in {output_dir} ({model.total_bytes / 2**30:.1f} GiB)"
    with (
        atomic_files.disk_errors(what, advice="free some space or choose another --output_dir"),
        atomic_files.new_folder(output_dir) as temporary,
        phase("Merging") as on_progress,
    ):
        if shutil.disk_usage(temporary).free < model.total_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        output_format.write(temporary, model, on_progress)
        (temporary / layout.MERGE_REPORT).write_text(_text(report), encoding="utf-8")


def _checked(
    output_format: MergedFormat, output_dir: Path, model: MergedModel, phase: Phase, notes: list[str]
) -> dict[str, Any]:
    """The verdict and what was measured; a check that cannot be made is no reason to lose the merge."""
    try:
        with phase("Checking logits") as on_progress:
            measured, difference = output_format.check(output_dir, model, on_progress)
    except (MemoryError, RuntimeError, KeyError, OSError, ByeoriError) as error:
        reason = one_line(error) or type(error).__name__
        notes.append(
            f"The merged model was not checked ({reason}); it is complete: check it with a few prompts, or merge again "
            "where there is more memory"
        )
        return {"verdict": "not checked", "not_checked_because": reason}
    verdict = {"verdict": "different", "difference": difference} if difference else {"verdict": "equal"}
    return {**verdict, **measured}


def _distance_note(report: dict[str, Any], adapter_folder: Path, adapter: str | Path) -> list[str]:
    distance = report.get("distance")
    if reason := report.get("distance_not_measured"):
        return [f"How far the merged model is from the one that was trained was not measured: {reason}"]
    if distance is None:
        return []
    bits = trained_bits(adapter_folder)
    held = f"in {bits} bit" if bits else "on quantized weights"
    note = (
        f"Training held the base {held}, and the merged model is {distance:.3f} away from the one that was trained "
        f"(mean difference of log-probs on {report['prompts']} prompts; the plain base is "
        f"{report['plain_base_distance']:.3f} away)"
    )
    if distance > report["distance_limit"]:
        note += (
            f". That is more than {merge_check.DISTANCE_LIMIT:.0%} of what training changed: merge with --onto opened, "
            f"or serve {adapter} on a base in {bits or 4} bit"
        )
    return [note]


def _summary(model: MergedModel) -> dict[str, Any]:
    return {
        "onto": model.onto,
        "dtype": merge_check.coarsest_dtype(model),
        "tensors": len(model.tensors),
        "merged_modules": len({item.change.module for item in model.tensors if item.change}),
        "parameters": model.parameters,
        "total_bytes": model.total_bytes,
        "untied": model.untied,
    }


def _text(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"


def _set_aside(output_dir: Path, reason: str) -> str:
    """Move a model that failed its check to `<output_dir>.failed`; returns the error.

    Only an earlier model that failed gives way to it; a folder of the user's does not.
    """
    output_dir = output_dir.resolve()
    number = 1
    while True:
        failed = output_dir.with_name(f"{output_dir.name}.failed{f'-{number}' if number > 1 else ''}")
        if not failed.exists() or _has_failed(failed):
            break
        number += 1
    shutil.rmtree(failed, ignore_errors=True)
    output_dir.rename(failed)
    return f"the merged model differs from the adapter on {reason}; it is left in {failed}, do not use it"


def _has_failed(folder: Path) -> bool:
    try:
        report = json_record(folder / layout.MERGE_REPORT, dict[str, Any])
    except ModelError:
        return False
    return report.get("verdict") == "different"
