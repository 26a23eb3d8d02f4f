"""The known name nearest to an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

# Names that other trainers use for a setting, if a different setting of ours looks nearer.
_ELSEWHERE = {"lr": "learning_rate", "epochs": "num_epochs", "model": "base_model", "dataset": "data_path"} | {
    "model_name_or_path": "base_model",
    "dataset_name": "data_path",
    "max_length": "cutoff_len",
    "max_seq_length": "cutoff_len",
    "per_device_train_batch_size": "micro_batch_size",
    "alpha": "lora_alpha",
    "rank": "lora_r",
}


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ` (did you mean X?)`, or an empty text if no known name is near."""
    bare = name.lstrip("-")
    meant = name[: len(name) - len(bare)] + _ELSEWHERE.get(bare.replace("-", "_"), "")
    near = [meant] if meant in known else difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def nearest_file(path: Path) -> str:
    """Return ` (did you mean X?)` with the name in the same folder that is nearest to that of a missing file."""
    try:
        return nearest(path.name, [item.name for item in path.parent.iterdir()])
    except OSError:
        return ""
