"""The log-probs of a run's reference model, under a name in the cache that covers everything they depend on."""

from __future__ import annotations

import hashlib
import time
from importlib.metadata import version
from typing import Any

import numpy as np

from byeori.artifacts import layout, sidecar
from byeori.artifacts.starting_model import StartingModel
from byeori.commands._model import bits
from byeori.config import TrainSettings
from byeori.data import tokenized
from byeori.distributed.processes import Processes
from byeori.kernels import dispatch
from byeori.model import load
from byeori.model.fingerprint import config_sha256, weights_sha256
from byeori.support import atomic_files, cache_folder, console
from byeori.support.console import Say
from byeori.train import reference
from byeori.train.state import Options


def with_reference(
    settings: TrainSettings,
    start: StartingModel,
    processes: Processes,
    say: Say,
    model: Any,
    options: Options,
    rows: tokenized.Rows,
    parts: list[np.ndarray],
) -> tokenized.Rows:
    """Return the rows with the reference's log-probs, from a file if an earlier run of the same content left one."""
    base = sidecar.base_folder(start.base, start.revision)
    key_parts = [weights_sha256(base), config_sha256(base), tokenized.content(rows.table)]
    if start.adapter is not None:
        files = (layout.ADAPTER, layout.ADAPTER_CONFIG)
        key_parts += [atomic_files.sha256(start.adapter.folder / name) for name in files]
    packing = (options.share_prefixes, options.micro_batch_size, options.micro_batch_tokens, [*map(len, parts)])
    device = processes.device
    key_parts += [
        str(load.compute_dtype(model)),
        settings.finetune,
        str(settings.train_layers),
        str(bits(settings)),
        device.type,
        str(packing),
    ]
    # these change only the rounding, but then the first step would not begin at a margin of zero
    key_parts += [str(settings.speed), dispatch.sources(), version("torch"), version("transformers")]
    name = hashlib.sha256("\0".join(key_parts).encode()).hexdigest()[:32]
    began = time.perf_counter()
    with console.progress("Log-probs of the reference model", shown=processes.main) as on_progress:
        rows = reference.with_reference(
            model,
            rows,
            parts,
            file=cache_folder.cache_folder() / "reference" / f"{name}.f32",
            say=say,
            fresh=start.adapter is None,
            options=options,
            processes=processes,
            on_progress=on_progress,
        )
    say(f"Reference log-probs of {sum(map(len, parts))} rows in {time.perf_counter() - began:.2f} s")
    return rows
