"""What a run begins from: a base model, or an adapter that is trained further. No weights are loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from byeori.artifacts import layout, records, saved_model, tokenizer_files
from byeori.errors import ConfigError, ModelError
from byeori.model import load, rope_scaling
from byeori.model.fingerprint import INDEX, SINGLE
from byeori.support import hub

# what an adapter that is trained further brings with it: the setting, and its name in adapter_config.json
_LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
}
# ... and what older files and other trainers may leave out: setting -> (its name, its default in PEFT)
_VARIANT: dict[str, tuple[str, Any]] = {
    "use_rslora": ("use_rslora", False),
    "use_dora": ("use_dora", False),
    "lora_bias": ("lora_bias", False),
    "rank_pattern": ("rank_pattern", {}),
    "alpha_pattern": ("alpha_pattern", {}),
    "layers_to_transform": ("layers_to_transform", []),
    "modules_to_save": ("modules_to_save", []),
    "lora_target_parameters": ("target_parameters", []),
}


@dataclass(kw_only=True, slots=True)
class StartingModel:
    """base: the model under everything. adapter: the one that is trained further, or None. notes: for the user.

    tokenizer: None once it is released; one with 262,144 tokens takes 0.6 GB.
    """

    base: str
    revision: str | None
    adapter: saved_model.SavedModel | None
    tokenizer: Any
    notes: list[str]

    def tokenizer_folder(self) -> Path:
        """Return the folder with the tokenizer's files; those on the Hub that are not cached yet are downloaded.

        Raises:
            HubError: if they cannot be.
        """
        if self.adapter is not None and (self.adapter.folder / layout.TOKENIZER_CONFIG).exists():
            return self.adapter.folder
        return load.local_folder(self.base, self.revision, tokenizer_files.PATTERNS)

    @property
    def folder(self) -> Path | None:
        """The base's folder, here or in the Hub's cache; None if it was not downloaded yet."""
        if Path(self.base).is_dir():
            return Path(self.base)
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return hub.cached(self.base, hub.WEIGHTS, revision=self.revision)
        except LocalEntryNotFoundError:
            return None

    def release_tokenizer(self) -> None:
        """Free its memory: rows are tokenized, and no holder of this record needs it any more."""
        self.tokenizer = None
        self.adapter = self.adapter and replace(self.adapter, tokenizer=None)


def begin(settings: Mapping[str, Any], given: Collection[str]) -> tuple[StartingModel, dict[str, Any]]:
    """Find the model, and the settings that it decides: cutoff_len, rope_factor, and the shape of an adapter.

    settings: of training or a preview, by name. given: the names that the user gave, not the defaults.

    Raises:
        ModelError, HubError: if there is no model.
        ConfigError: if the user gave a setting that the model cannot have.
    """
    name, revision, cutoff_len = settings["base_model"], settings["revision"], settings["cutoff_len"]
    decided: dict[str, Any] = {}
    rope = rope_scaling.of_settings(settings)
    if is_adapter(name, revision):
        moved = f"give --base_model where it is now, with --resume_from_checkpoint {name}"
        adapter = saved_model.find(name, revision=revision, moved=moved)
        decided = adapter_shape(settings, given, adapter.folder)
        decided |= {key: adapter.settings.get(key) for key in ("rope_scaling", "rope_factor")}
        start = StartingModel(
            base=adapter.base, revision=adapter.revision, adapter=adapter, tokenizer=adapter.tokenizer, notes=[]
        )
        max_length = adapter.max_length
    else:
        trusted = settings["trust_remote_code"] is not None
        config = load.load_config(name, revision=revision, trust_remote_code=trusted)
        tokenizer, notes = load.load_tokenizer(name, revision=revision, trust_remote_code=trusted)
        base = name
        if rope is not None:
            base = str(rope_scaling.view(load.local_folder(name, revision), rope, name))
            decided["rope_factor"] = rope.factor or cutoff_len / (load.positions_limit(config) or cutoff_len)
            revision, config = None, load.load_config(base, trust_remote_code=trusted)
        start = StartingModel(base=base, revision=revision, adapter=None, tokenizer=tokenizer, notes=notes)
        max_length = load.positions_limit(config)
    if tokens := _trained_tokens(settings, start):
        decided["trainable_token_indices"] = [str(token) for token in tokens]
    if max_length is not None and cutoff_len > max_length and "cutoff_len" not in given:
        start.notes.append(f"cutoff_len is {max_length}, the maximum length of {start.base}")
        cutoff_len = decided["cutoff_len"] = max_length
    check_cutoff(cutoff_len, max_length, start.base)
    return start, decided


def _trained_tokens(settings: Mapping[str, Any], start: StartingModel) -> list[int]:
    """Add the new tokens to the tokenizer; returns the tokens whose rows are trained.

    Raises:
        ConfigError: if there is no such token, or the adapter that is trained further has others.
    """
    new, named = settings["add_tokens"], settings.get("trainable_token_indices", [])
    if start.adapter is not None:
        if new or named:
            flag = "add_tokens" if new else "trainable_token_indices"
            raise ConfigError(
                f"--{flag} is for a new adapter, and {settings['base_model']} is one already; merge it first"
            )
        return start.adapter.tokens
    if not new and not named:
        return []
    vocabulary = start.tokenizer.get_vocab()
    if old := [token for token in new if token in vocabulary]:
        raise ConfigError(
            f"--add_tokens: {old[0]!r} is a token of {start.base} already; give it to --trainable_token_indices"
        )
    tokenizer_files.add(start.tokenizer, new)
    ids = [token if token.isdecimal() and int(token) < len(start.tokenizer) else None for token in named]
    known = [vocabulary.get(token) if number is None else int(number) for token, number in zip(named, ids, strict=True)]
    if missing := [token for token, number in zip(named, known, strict=True) if number is None]:
        raise ConfigError(f"--trainable_token_indices: {start.base} has no token {missing[0]!r}; see --add_tokens")
    return sorted({*known, *start.tokenizer.convert_tokens_to_ids(new)})


def check_cutoff(cutoff_len: int, max_length: int | None, name: str) -> None:
    """Raise unless examples of this length fit the model.

    Raises:
        ConfigError: if they do not.
    """
    if max_length is not None and cutoff_len > max_length:
        raise ConfigError(
            f"--cutoff_len {cutoff_len} is beyond the maximum length of {name}; give {max_length} or less, or train "
            "longer rows with --rope_scaling yarn"
        )


def is_adapter(name: str, revision: str | None = None) -> bool:
    """Return whether a folder or a Hub id holds an adapter."""
    if Path(name).is_dir():
        is_model = any((Path(name) / file).is_file() for file in (SINGLE, INDEX))
        return (Path(name) / layout.ADAPTER_CONFIG).is_file() and not is_model
    if Path(name).exists() or hub.looks_local(name):
        return False
    from huggingface_hub import file_exists

    try:
        if not hub.reachable(name):
            folder = hub.cached(name, (layout.ADAPTER_CONFIG,), revision=revision)
            return not any((folder / file).is_file() for file in (SINGLE, INDEX))
        return file_exists(name, layout.ADAPTER_CONFIG, revision=revision) and not any(
            file_exists(name, file, revision=revision) for file in (SINGLE, INDEX)
        )
    except Exception:  # whatever is wrong with the name is reported when its files are read
        return False


def adapter_shape(settings: Mapping[str, Any], given: Collection[str], folder: Path) -> dict[str, Any]:
    """Return the adapter's own rank, scale, dropout, layers and variant; nothing for settings without them.

    Raises:
        ConfigError: if the user gave others, or a scaling of positions. ModelError: if its config lacks one.
    """
    kind, name = settings["rope_scaling"], settings["base_model"]
    if kind:
        raise ConfigError(
            f"--rope_scaling {kind}: {name} is an adapter, which keeps the positions that it was trained with; leave "
            "it out"
        )
    if "lora_r" not in settings:
        return {}
    recorded = records.adapter_config(folder)
    if missing := [name for name in _LORA.values() if name not in recorded]:
        raise ModelError(f"{folder / layout.ADAPTER_CONFIG} has no {', '.join(missing)}; copy the adapter again")
    shape = {setting: recorded[name] for setting, name in _LORA.items()}
    layers = shape["lora_target_modules"]
    shape["lora_target_modules"] = sorted(layers) if isinstance(layers, list) else [layers]
    shape |= {setting: recorded.get(name) or default for setting, (name, default) in _VARIANT.items()}
    if isinstance(shape["layers_to_transform"], int):
        shape["layers_to_transform"] = [shape["layers_to_transform"]]
    shape["lora_init"] = "default"  # it was started when it was made
    for setting, value in shape.items():
        asked = settings[setting]
        if setting == "lora_target_modules":
            asked = value if asked == ["all-linear"] else sorted(asked)
        if setting in given and asked != value:
            raise ConfigError(
                f"--{setting} {asked} is not that of the adapter {settings['base_model']}, which is trained further "
                f"({value}); leave it out, or merge the adapter first"
            )
    return shape
