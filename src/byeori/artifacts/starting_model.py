"""What a run begins from: a base model, or an adapter that is trained further. No weights are loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from byeori.artifacts import saved_model
from byeori.config import PreviewSettings, TrainSettings
from byeori.errors import ConfigError
from byeori.model import load
from byeori.model.fingerprint import INDEX, SINGLE
from byeori.support import hub

S = TypeVar("S", TrainSettings, PreviewSettings)

# what an adapter that is trained further brings with it: the setting, and its name in adapter_config.json
_LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
}


@dataclass(kw_only=True, slots=True)
class StartingModel:
    """base: the model under everything. adapter: what is trained further, None for a new one. notes: for the user.

    tokenizer: None once it was let go of; one of 262,144 words takes 0.6 GB.
    """

    base: str
    revision: str | None
    adapter: saved_model.SavedModel | None
    tokenizer: Any
    notes: list[str]

    def let_go_of_tokenizer(self) -> None:
        """Rows are tokenized; the callers that still hold this record need nothing more of it."""
        self.tokenizer = None
        self.adapter = self.adapter and replace(self.adapter, tokenizer=None)


def begin(settings: S) -> tuple[S, StartingModel]:
    """Find it, and resolve the settings that depend on it: cutoff_len, and the shape of an adapter that is there.

    Raises:
        ModelError, HubError: no model there. ConfigError: a setting that it cannot have.
    """
    name = settings.base_model
    if is_adapter(name, settings.revision):
        moved = f"give --base_model where it lies now, with --resume_from_checkpoint {name}"
        found = saved_model.find(name, revision=settings.revision, moved=moved)
        settings = settings.model_copy(update=_shape(settings, found.folder))
        start = StartingModel(
            base=found.base, revision=found.revision, adapter=found, tokenizer=found.tokenizer, notes=[]
        )
        positions = found.positions
    else:
        trusted = settings.trust_remote_code is not None
        config = load.load_config(name, revision=settings.revision, trust_remote_code=trusted)
        tokenizer, notes = load.load_tokenizer(name, revision=settings.revision, trust_remote_code=trusted)
        start = StartingModel(base=name, revision=settings.revision, adapter=None, tokenizer=tokenizer, notes=notes)
        positions = load.positions_limit(config)
    if positions is not None and settings.cutoff_len > positions and "cutoff_len" not in settings.model_fields_set:
        start.notes.append(f"cutoff_len is {positions}: {start.base} has no more positions")
        settings = settings.model_copy(update={"cutoff_len": positions})
    check_cutoff(settings.cutoff_len, positions, start.base)
    return settings, start


def check_cutoff(cutoff_len: int, positions: int | None, name: str) -> None:
    """See whether examples of this length fit the model.

    Raises:
        ConfigError: they do not.
    """
    if positions is not None and cutoff_len > positions:
        raise ConfigError(
            f"--cutoff_len {cutoff_len} is beyond the {positions} positions of {name}; give {positions} or less"
        )


def is_adapter(name: str, revision: str | None = None) -> bool:
    """Whether a folder or a Hub id holds an adapter."""
    if Path(name).is_dir():
        whole = any((Path(name) / file).is_file() for file in (SINGLE, INDEX))
        return (Path(name) / "adapter_config.json").is_file() and not whole
    if Path(name).exists() or hub.looks_local(name):
        return False
    from huggingface_hub import file_exists

    try:
        if not hub.reachable(name):
            folder = hub.cached(name, ("adapter_config.json",), revision=revision)
            return not any((folder / file).is_file() for file in (SINGLE, INDEX))
        return file_exists(name, "adapter_config.json", revision=revision) and not any(
            file_exists(name, file, revision=revision) for file in (SINGLE, INDEX)
        )
    except Exception:  # whatever is wrong with the name is said when its files are read
        return False


def _shape(settings: TrainSettings | PreviewSettings, folder: Path) -> dict[str, Any]:
    """The adapter's own rank, scale, dropout and layers.

    Raises:
        ConfigError: others are asked for.
    """
    if not isinstance(settings, TrainSettings):
        return {}
    recorded = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    shape = {setting: recorded[name] for setting, name in _LORA.items()}
    layers = shape["lora_target_modules"]
    shape["lora_target_modules"] = sorted(layers) if isinstance(layers, list) else [layers]
    for setting, value in shape.items():
        given = getattr(settings, setting)
        if setting == "lora_target_modules":
            given = value if given == ["all-linear"] else sorted(given)
        if setting in settings.model_fields_set and given != value:
            raise ConfigError(
                f"--{setting} {given} is not that of the adapter {settings.base_model}, which is trained further "
                f"({value}); leave it out, or merge the adapter first"
            )
    return shape
