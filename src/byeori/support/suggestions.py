"""The nearest known name to one that is not known."""

from __future__ import annotations

import difflib

# What other trainers call a setting, where another of ours looks nearer.
_ELSEWHERE = {"lr": "learning_rate", "epochs": "num_epochs", "model": "base_model", "dataset": "data_path"} | {
    "model_name_or_path": "base_model",
    "dataset_name": "data_path",
    "max_length": "cutoff_len",
    "max_seq_length": "cutoff_len",
    "per_device_train_batch_size": "micro_batch_size",
    "alpha": "lora_alpha",
    "rank": "lora_r",
}


def nearest(name: str, known: list[str]) -> str:
    """` (did you mean X?)`, or nothing where no name is near."""
    bare = name.lstrip("-")
    meant = name[: len(name) - len(bare)] + _ELSEWHERE.get(bare.replace("-", "_"), "")
    found = [meant] if meant in known else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""
