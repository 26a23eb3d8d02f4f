"""What stands behind a name: an adapter or a whole model, here or on the Hub, with its tokenizer and its template.

    name ── find: config, tokenizer, header of the adapter ──> SavedModel ── load: weights ──> model ready to answer

Everything that can be wrong with the small files is found before weights are loaded.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from byeori.artifacts import base_check, layout
from byeori.artifacts.layout import SETTINGS, TEMPLATE
from byeori.data import template, tokenize
from byeori.data.template import Template
from byeori.data.tokenize import Encoding
from byeori.errors import ByeoriError, ConfigError, ModelError, TemplateError
from byeori.kernels import lora_linear
from byeori.model import load
from byeori.model.fingerprint import read_header
from byeori.model.light import without_bitsandbytes
from byeori.support.text_files import one_line
from byeori.support.yaml_files import yaml_mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedModel:
    """A model or an adapter whose weights are not loaded yet.

    name: as it was given. folder: where its files lie. base: the model under an adapter, else the folder itself.
    positions: the most tokens that the model was made for, None where it has no such limit.
    settings: of the run that made it; empty where it is not byeori's.
    """

    name: str
    folder: Path
    is_adapter: bool
    base: str
    revision: str | None
    tokenizer: Any
    positions: int | None
    settings: dict[str, Any]


def find(
    name: str,
    base: str | None = None,
    *,
    revision: str | None = None,
    moved: str = "give --base_model where it lies now",
) -> SavedModel:
    """Look a model or an adapter up. revision: of `name` on the Hub; an adapter names its base's own.

    moved: what to do where an adapter's base is no longer where it was.

    Raises:
        ModelError, HubError: not there, damaged, or an adapter that does not fit its base.
        ConfigError: a base for what is no adapter.
    """
    folder = load.local_folder(name, revision)
    settings = run_settings(folder)
    if not (folder / "adapter_config.json").is_file():
        if base is not None:
            raise ConfigError(f"{name} is a whole model, so --base_model {base} has no use; leave it out")
        tokenizer, _ = load.load_tokenizer(str(folder))
        positions = load.positions_limit(load.load_config(str(folder)))
        return SavedModel(
            name=name,
            folder=folder,
            is_adapter=False,
            base=str(folder),
            revision=None,
            tokenizer=tokenizer,
            positions=positions,
            settings=settings,
        )
    recorded, of_base = _check_adapter(folder, name)
    base_name = base or recorded
    if not base_name:
        raise ModelError(f"the adapter {name} does not say which base it belongs to; give --base_model")
    base_check.check_name(folder, recorded, base, option="--base_model")
    revision = of_base if base_name == recorded else None
    try:
        positions = load.positions_limit(load.load_config(base_name, revision=revision))
    except ByeoriError as error:
        hint = "" if base else f"; {name} was trained on it: {moved}"
        raise type(error)(f"{error}{hint}") from None
    base_check.check_weights(folder, Path(base_name), base_name, option="--base_model")
    own = (folder / "tokenizer_config.json").exists()
    tokenizer, _ = load.load_tokenizer(str(folder) if own else base_name, revision=None if own else revision)
    return SavedModel(
        name=name,
        folder=folder,
        is_adapter=True,
        base=base_name,
        revision=revision,
        tokenizer=tokenizer,
        positions=positions,
        settings=settings,
    )


def run_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run that made an adapter or a merged model, by name; empty if there are none.

    Raises:
        ConfigError: if the file is not YAML or no mapping.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    loaded = yaml_mapping(path, what="settings", advice="write one `name: value` a line")
    return {str(name).replace("-", "_"): value for name, value in loaded.items()}


def _check_adapter(folder: Path, name: str) -> tuple[str | None, str | None]:
    """The base that an adapter names, and its revision.

    Raises:
        ModelError: its configuration or its weights are missing, damaged, or a pickle.
    """
    try:
        recorded = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base, revision = recorded.get("base_model_name_or_path"), recorded.get("revision")
    except (OSError, ValueError, AttributeError):
        raise ModelError(f"{folder / 'adapter_config.json'} is damaged; copy the adapter again") from None
    if not (folder / layout.ADAPTER).is_file():
        pickled = ", only a pickle (adapter_model.bin), which is never loaded" if any(folder.glob("*.bin")) else ""
        raise ModelError(f"the adapter {name} has no {layout.ADAPTER}{pickled}; save it as safetensors")
    read_header(folder / layout.ADAPTER)
    return base, revision


def load_weights(found: SavedModel, dtype_name: str, device: torch.device) -> Any:
    """The model, an adapter on its base (which can be switched off), in evaluation mode.

    Raises:
        ModelError, HubError: damaged weights, or an adapter that does not fit its base.
    """
    dtype = load.resolve_dtype(dtype_name, device)
    model = load.load_model(found.base, dtype=dtype, device=device, revision=found.revision)
    return with_adapter(model, found) if found.is_adapter else model


def with_adapter(model: Any, found: SavedModel, *, trainable: bool = False) -> Any:
    """An adapter on its base, in evaluation mode.

    trainable: the adapter is to be trained further.

    Raises:
        ModelError: it does not fit the base.
    """
    from peft import PeftModel

    folder, misfit = str(found.folder), f"the adapter {found.name} does not fit the base {found.base}"
    remedy = "give the base that it was trained on with --base_model"
    try:
        with without_bitsandbytes(model):
            tuned = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
        keys = tuned.load_adapter(
            folder, "default", is_trainable=trainable
        )  # from_pretrained only warns of keys that are left over
    except Exception as error:  # PEFT raises a different kind for each way in which an adapter can be wrong
        raise ModelError(f"{misfit} ({one_line(error, 200)}); {remedy}") from None
    missing = [key for key in keys.missing_keys if "lora_" in key]
    for words, names in (("the base has layers without it", missing), ("layers are left over", keys.unexpected_keys)):
        if names:
            raise ModelError(f"{misfit}: {words} ({names[0]} and {len(names) - 1} more); {remedy}")
    lora_linear.fuse(tuned)
    return tuned.eval()


# ---- the prompt --------------------------------------------------------------------------------------------------


def template_of(found: SavedModel, spec: str | None) -> Template | None:
    """The template that is named, or was saved beside the weights; None for the tokenizer's chat template.

    Raises:
        TemplateError: nothing was saved and nothing is named.
    """
    beside = found.folder / TEMPLATE
    if spec is not None:
        return template.resolve(spec)
    if beside.is_file():
        return saved(beside)
    if found.tokenizer.chat_template:
        return None
    raise TemplateError(f"{found.name} has neither a saved {TEMPLATE} nor a chat template; give --template")


def saved(path: Path) -> Template:
    """The template that lies beside trained weights."""
    return template.parse(path.read_text(encoding="utf-8"), TEMPLATE, lenient=True)


def encoding(found: SavedModel, chosen: Template | None, *, cutoff_len: int = sys.maxsize) -> Encoding:
    """Return how rows become tokens for it."""
    return tokenize.encoding(
        found.tokenizer,
        chosen,
        cutoff_len=cutoff_len,
        add_eos_token=found.tokenizer.eos_token_id is not None,
        train_on_inputs=False,
    )


def raw_encoding(found: SavedModel) -> Encoding:
    """For text that is a finished prompt: no template, no end-of-text token."""
    return replace(encoding(found, template.parse("{text}")), eos=None)
