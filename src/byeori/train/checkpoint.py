"""Checkpoints that appear whole or not at all.

    checkpoint-40/
        adapter_config.json, adapter_model.safetensors    the adapter, as PEFT writes it; or a whole model
        optimizer.safetensors                             the optimizer's states, by parameter name
        trainer_state.json                                step, best evaluation; order and random numbers are
                                                          functions of the seed and the step
        tokenizer, template, settings ...                 what a server needs (artifacts/sidecar.py)
        manifest.json                                     sha256 of every file, written last

Only safetensors and JSON are read.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from byeori.artifacts import records
from byeori.artifacts.layout import ADAPTER, MANIFEST, OPTIMIZER, STATE
from byeori.distributed.processes import ALONE, Processes
from byeori.errors import CheckpointError, ModelError
from byeori.model import adapter as peft_adapter
from byeori.model import full, load
from byeori.model.fingerprint import INDEX, SINGLE
from byeori.support.atomic_files import disk_errors, new_folder, remove_folder, sha256
from byeori.support.console import Say
from byeori.support.foreign_files import json_record
from byeori.support.pickles import missing_weights
from byeori.train import states
from byeori.train.masters import Masters
from byeori.train.states import trainable

_SET_ASIDE = "set-aside-"


def save(folder: Path, fill: Callable[[Path], None]) -> None:
    """Write the folder of a checkpoint. fill: writes its files into a temporary folder; the manifest is added here.

    Raises:
        CheckpointError: if the disk is full or read-only; what was there before is untouched.
    """
    with write_errors(folder), new_folder(folder) as temporary:
        fill(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(temporary)): sha256(path) for path in files}
        (temporary / MANIFEST).write_text(json.dumps({"sha256": manifest}, indent=1), encoding="utf-8")


def write_errors(path: Path) -> AbstractContextManager[None]:
    """Turn a disk error into a sentence about `path` that names the last whole checkpoint of its folder.

    Raises:
        CheckpointError: if the disk is full or read-only.
    """

    def advice(full: bool) -> str:
        whole = newest(path.parent)
        last = f"the last whole checkpoint is {whole}" if whole else ""
        remedy = "free space and go on with --resume_from_checkpoint latest" if full else ""
        return "; ".join(filter(None, (last, remedy)))

    return disk_errors(path, advice=advice)


def check_whole(folder: Path) -> bool:
    """Return whether a folder is a checkpoint, not a finished adapter.

    Raises:
        CheckpointError: if it is a damaged checkpoint.
    """
    is_checkpoint = (folder / MANIFEST).is_file() or all((folder / name).is_file() for name in (STATE, OPTIMIZER))
    if is_checkpoint and (problem := verify(folder)):
        raise CheckpointError(f"the checkpoint {folder} is not whole: {problem}; use an older one or `latest`")
    return is_checkpoint


def verify(folder: Path) -> str | None:
    """Return why a checkpoint is not whole, or None if it is."""
    try:
        manifest = json_record(folder / MANIFEST, records.Manifest)["sha256"]
        listed = set(manifest)
    except ModelError:
        return "it has no manifest"
    weights = {ADAPTER, SINGLE, INDEX} & listed
    if absent := {*(weights or {ADAPTER}), OPTIMIZER, STATE} - listed:
        return f"its manifest does not list {min(absent)}"
    for name, digest in manifest.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            return f"its manifest names {name}, which is outside of it"
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} is damaged"
    return None


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's name, None for any other name."""
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    return int(match[1]) if match else None


def steps(output_dir: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every checkpoint, oldest first."""
    paths = output_dir.iterdir() if output_dir.is_dir() else ()
    return sorted((step, path) for path in paths if (step := step_of(path.name)) is not None and path.is_dir())


def is_there(output_dir: Path, step: int) -> bool:
    """Return whether a step has a whole checkpoint, written by this process or by another."""
    return verify(output_dir / f"checkpoint-{step}") is None


def newest(output_dir: Path, say: Say = lambda text: None) -> Path | None:
    """Return the newest whole checkpoint; damaged ones are skipped with a note."""
    for _, folder in reversed(steps(output_dir)):
        problem = verify(folder)
        if problem is None:
            return folder
        say(f"{folder} is skipped: {problem}")
    return None


def aside(name: str, taken: Callable[[str], bool]) -> str:
    """Return a free name for a checkpoint that another run left where this one writes. taken: whether a name exists."""
    names = (f"{_SET_ASIDE}{name}{f'-{number}' if number > 1 else ''}" for number in itertools.count(1))
    return next(free for free in names if not taken(free))


def best_of(folder: Path) -> Path | None:
    """Return the folder of the best checkpoint that a run had when it wrote this one, or None."""
    try:
        step = json_record(folder / STATE, records.RunState).get("best_step")
    except ModelError:
        return None
    return None if step is None else folder.resolve().parent / f"checkpoint-{step}"


def prune(output_dir: Path, keep: int | None, *, best: int | None, latest: int) -> None:
    """Delete the oldest checkpoints beyond `keep`, never the best one; those after `latest` belong to another run.

    The newest whole checkpoint stays even if there are `keep` younger ones that are damaged.
    """
    if keep is None:
        return
    own = [(step, folder) for step, folder in steps(output_dir) if step <= latest]
    surplus = [folder for step, folder in own if step != best][:-keep]
    rest = [folder for _, folder in own if folder not in surplus]
    if surplus and all(verify(folder) for folder in reversed(rest)):
        spared = next((folder for folder in reversed(surplus) if verify(folder) is None), None)
        surplus = [folder for folder in surplus if folder != spared]
    for folder in surplus:
        with suppress(OSError):  # a surplus checkpoint is no reason to end a run
            remove_folder(folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A run at one step, copied to memory, so that training can go on.

    write_weights: writes the adapter or the model. optimizer: tensors on the CPU, by their names in the file.
    state: JSON text.
    """

    write_weights: Callable[[Path], None]
    optimizer: dict[str, torch.Tensor]
    state: str

    def write(self, folder: Path) -> None:
        """Write the files of a checkpoint."""
        self.write_weights(folder)
        save_file(self.optimizer, folder / OPTIMIZER)
        (folder / STATE).write_text(self.state, encoding="utf-8")


def snapshot(
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    masters: Masters | None = None,
    processes: Processes = ALONE,
) -> Snapshot:
    """Copy weights, optimizer and counters to memory; every process has to call it if trained weights are sharded.

    masters: what the optimizer works on, if that is not the model's parameters themselves.
    """
    masters = masters or Masters([parameter for _, parameter in trainable(model)])
    moments = states.tensors(model, masters, optimizer, processes)
    with masters.averaged(optimizer):
        write_weights = weights_writer(model, processes)
    return Snapshot(write_weights=write_weights, optimizer=moments, state=json.dumps(state, indent=1))


def save_adapter(folder: Path, model: Any) -> None:
    """Write the adapter alone, in PEFT's format."""
    weights_writer(model)(folder)


def weights_writer(model: Any, processes: Processes = ALONE) -> Callable[[Path], None]:
    """Copy the adapter or the whole model to memory; return what writes it, as PEFT or transformers does."""
    if full.is_full(model):
        tensors = full.state(model, load.compute_dtype(model), keep=processes.main)
        return lambda folder: full.write(folder, model, tensors)
    adapter, config = _adapter(model)
    return lambda folder: _write_adapter(folder, adapter, config)


def _adapter(model: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Copies of the adapter's tensors and of its configuration, as PEFT saves them."""
    config = copy.deepcopy(next(iter(model.peft_config.values())))
    config.inference_mode = True
    return {name: _copied(tensor) for name, tensor in peft_adapter.state(model).items()}, config


def _write_adapter(folder: Path, tensors: dict[str, torch.Tensor], config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def load_adapter(folder: Path, model: Any) -> None:
    """Load the weights of a folder into the model's adapter, or into the model that is trained in full.

    Raises:
        CheckpointError: if there is no safetensors adapter, or it is damaged or of another shape, scale or set of
            layers.
    """
    path, weights = folder / ADAPTER, (folder / SINGLE, folder / INDEX)
    if full.is_full(model):
        if not any(each.is_file() for each in weights):
            raise CheckpointError(f"{folder} does not hold a whole model; go on without --finetune full")
        full.load_state(model, folder)
        return
    if not path.is_file() and any(each.is_file() for each in weights):
        raise CheckpointError(f"{folder} holds a whole model, not an adapter; go on with --finetune full")
    if not path.is_file():
        raise CheckpointError(f"{missing_weights(folder, ADAPTER)}; give a checkpoint or the folder of an adapter")
    _check_scale(folder, model)
    try:
        missing, unexpected = peft_adapter.load_state(model, load_file(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); use an older checkpoint") from None
    except (RuntimeError, ValueError, KeyError) as error:  # PEFT looks up what its settings ask for
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"the adapter in {folder} does not fit this run's model and LoRA settings: {reason}"
        ) from None
    absent = sorted({name for name, _ in trainable(model)} & set(missing))
    for names, words in ((unexpected, "has layers that this run does not train"), (absent, "lacks layers")):
        if names:
            raise CheckpointError(
                f"the adapter in {folder} {words} ({names[0]}, ...); use the same --lora_target_modules"
            )


def _check_scale(folder: Path, model: Any) -> None:
    """Raise unless an adapter has the scale of this run: its weights have another effect under another one.

    Raises:
        CheckpointError: if it was trained with another alpha or rank.
    """
    recorded = records.adapter_config(folder, CheckpointError)
    own = next(iter(model.peft_config.values()))
    names = {"lora_r": "r"} | {name: name for name in ("lora_alpha", "use_rslora", "use_dora", "lora_bias")}
    names |= {"rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
    for flag, name in names.items():
        if name in recorded and (recorded[name] or None) != (getattr(own, name) or None):
            raise CheckpointError(
                f"the adapter in {folder} was trained with --{flag} {recorded[name]}, not {getattr(own, name)}; "
                "its weights would have another effect"
            )


def load_training_state(
    folder: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    masters: Masters | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any] | None:
    """Restore a run and return its counters; None for finished weights, which have no state.

    Raises:
        CheckpointError: if the folder does not exist or is a damaged checkpoint.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}; give --resume_from_checkpoint a folder or `latest`")
    is_checkpoint = check_whole(folder)
    load_adapter(folder, model)
    masters = masters or Masters([parameter for _, parameter in trainable(model)])
    masters.take()
    if not is_checkpoint:
        return None
    states.restore(folder / OPTIMIZER, model, masters, optimizer, processes)
    masters.give()
    return dict(
        json_record(folder / STATE, records.RunState, CheckpointError, advice="resume from an older checkpoint")
    )
