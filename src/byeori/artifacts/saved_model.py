"""An adapter or a whole model, here or on the Hub, with its tokenizer and its template.

    name ── find: config, tokenizer, header of the adapter ──> SavedModel ── load_weights ──> model ready to answer

Every error in the small files is reported before weights are loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from byeori.artifacts import layout, records
from byeori.artifacts.layout import ADAPTER, ADAPTER_CONFIG, SETTINGS, TEMPLATE
from byeori.artifacts.model_card import is_hub_id
from byeori.data import template, tokenize
from byeori.data.template import Template
from byeori.data.tokenize import Encoding
from byeori.errors import ByeoriError, ConfigError, ModelError, TemplateError
from byeori.kernels import lora_linear
from byeori.model import adapter, embedding_rows, load, rope_scaling
from byeori.model.embedding_rows import is_embedding
from byeori.model.fingerprint import base_fingerprint, read_header, weights_sha256
from byeori.support.pickles import missing_weights
from byeori.support.text_files import one_line, read_text
from byeori.support.yaml_files import yaml_mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedModel:
    """A model or an adapter whose weights are not loaded yet.

    name: as it was given. folder: with its files. base: the model under an adapter, else the folder itself.
    max_length: of prompt and answer in tokens; None if the model has no limit.
    settings: of the run that made it; empty if it is not byeori's. tokens: whose rows of the embedding an adapter
    trains. vocabulary: the rows of the embedding that an adapter needs, if it says so.
    """

    name: str
    folder: Path
    is_adapter: bool
    base: str
    revision: str | None
    tokenizer: Any
    max_length: int | None
    settings: dict[str, Any]
    tokens: list[int] = field(default_factory=list)
    vocabulary: int | None = None


def find(
    name: str,
    base: str | None = None,
    *,
    revision: str | None = None,
    moved: str = "give --base_model where it is now",
) -> SavedModel:
    """Find a model or an adapter. revision: of `name` on the Hub; an adapter names that of its base.

    moved: what to do if an adapter's base is no longer where it was.

    Raises:
        ModelError, HubError: if it is missing, damaged, or an adapter that does not fit its base.
        ConfigError: if a base is given for a whole model.
    """
    folder = load.local_folder(name, revision)
    settings = run_settings(folder)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    base_name, base_revision = str(folder), None
    tokens, vocabulary = list[int](), None
    if is_adapter:
        recorded, recorded_revision = _check_adapter(folder, name)
        tokens, vocabulary = _vocabulary(folder)
        if not (base or recorded):
            raise ModelError(f"the adapter {name} does not name its base model; give --base_model")
        check_base_name(folder, recorded, base, option="--base_model")
        base_name = str(base or recorded)
        base_revision = recorded_revision if base_name == recorded else None
    elif base is not None:
        raise ConfigError(f"{name} is a whole model, so --base_model {base} has no use; leave it out")
    if is_adapter and (rope := rope_scaling.of_settings(settings)):
        base_name, base_revision = (
            str(rope_scaling.view(load.local_folder(base_name, base_revision), rope, base_name)),
            None,
        )
    try:
        config = load.load_config(base_name, revision=base_revision)
    except ByeoriError as error:
        hint = f"; {name} was trained on it: {moved}" if is_adapter and base is None else ""
        raise type(error)(f"{error}{hint}") from None
    if is_adapter:
        check_base_weights(folder, Path(base_name), base_name, option="--base_model")
    own = (folder / layout.TOKENIZER_CONFIG).exists() or not is_adapter
    source, source_revision = (str(folder), None) if own else (base_name, base_revision)
    tokenizer, _ = load.load_tokenizer(source, revision=source_revision, config=config)
    return SavedModel(
        name=name,
        folder=folder,
        is_adapter=is_adapter,
        base=base_name,
        revision=base_revision,
        tokenizer=tokenizer,
        max_length=load.positions_limit(config),
        settings=settings,
        tokens=tokens,
        vocabulary=vocabulary,
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
        ModelError: if its configuration or its weights are missing, damaged, or a pickle.
    """
    recorded = records.adapter_config(folder)
    if not (folder / ADAPTER).is_file():
        raise ModelError(f"the adapter {name} is incomplete: {missing_weights(folder, ADAPTER)}")
    read_header(folder / ADAPTER)
    return recorded.get("base_model_name_or_path"), recorded.get("revision")


def _vocabulary(folder: Path) -> tuple[list[int], int | None]:
    """The tokens whose rows an adapter trains, and the rows of the embedding that it needs."""
    given = records.adapter_config(folder).get("trainable_token_indices") or []
    lists = given.values() if isinstance(given, dict) else [given]
    tokens = sorted({int(token) for each in lists for token in each})
    whole = [stored.shape[0] for name, stored in read_header(folder / ADAPTER).items() if is_embedding(name)]
    return tokens, whole[0] if whole else max(tokens) + 1 if tokens else None


# ---- does an adapter belong to a base? ------------------------------------------------------------------------------


def check_base_name(adapter: Path, recorded: str | None, given: str | None, *, option: str) -> None:
    """Compare the Hub ids that the adapter records and the user gives, if no fingerprint can tell the weights apart.

    A record without an owner (`gemma-3-270m`) may be the last name of any folder, and says nothing.
    option: the flag that names the base.

    Raises:
        ModelError: if they name two repositories.
    """
    if recorded is None or given is None or "/" not in recorded or not (is_hub_id(recorded) and is_hub_id(given)):
        return
    same = f"/{recorded}".lower().endswith(f"/{given}".lower())  # old models are on the Hub without their owner too
    if not same and _recorded_base(adapter) is None:
        raise ModelError(
            f"{adapter} was trained on {recorded}, and {given} is another model on the Hub; leave {option} out, or, "
            "if both have the same weights, download it and give its folder"
        )


def check_base_weights(adapter: Path, folder: Path, name: str, *, option: str) -> None:
    """Compare the base's fingerprint with the one that training recorded with the adapter, if both are here.

    name: the base's, as it was given. option: the flag that names the base.

    Raises:
        ModelError: if they differ, or the record is damaged.
    """
    recorded = _recorded_base(adapter) if folder.is_dir() else None
    if recorded is not None and recorded[2](folder) != recorded[1]:
        raise ModelError(
            f"{adapter} was trained on {recorded[0]}, and {name} has other weights; give that base with {option}"
        )


def recorded_base(adapter: Path) -> str | None:
    """Return the name of the base that training recorded with the adapter, if it did."""
    record = _recorded_base(adapter)
    return record and record[0]


def _recorded_base(adapter: Path) -> tuple[str, str, Callable[[Path], str]] | None:
    """The name and a hash of the base that training recorded with the adapter, if it did, and how to compute it."""
    record = records.base_record(adapter)
    if record is None:
        return None
    trained_on, whole, sample = record["base_model"], record.get("weights_sha256"), record.get("sha256")
    if whole:
        return trained_on, whole, weights_sha256
    return (trained_on, sample, base_fingerprint) if sample else None


# ---- weights --------------------------------------------------------------------------------------------------------


def load_weights(saved: SavedModel, dtype_name: str, device: torch.device) -> Any:
    """Load the model, or an adapter on its base (which can be switched off), in evaluation mode.

    Raises:
        ModelError, HubError: if weights are damaged, or an adapter does not fit its base.
    """
    dtype = load.resolve_dtype(dtype_name, device)
    model = load.load_model(saved.base, dtype=dtype, device=device, revision=saved.revision)
    return with_adapter(model, saved) if saved.is_adapter else model


def with_adapter(model: Any, saved: SavedModel, *, trainable: bool = False) -> Any:
    """Put an adapter on its base, in evaluation mode. trainable: the adapter will be trained further.

    Raises:
        ModelError: if it does not fit the base.
    """
    whole = saved.vocabulary is not None and not saved.tokens  # the embedding is in the file, longer or shorter
    embedding_rows.resize(model, saved.vocabulary, shrink=whole)
    misfit = f"the adapter {saved.name} does not fit the base {saved.base}"
    remedy = "give the base that it was trained on with --base_model"
    try:
        tuned, missing, unexpected = adapter.load_adapter(model, saved.folder, trainable=trainable)
    except Exception as error:  # PEFT raises a different kind for each way in which an adapter can be wrong
        raise ModelError(f"{misfit} ({one_line(error, 200)}); {remedy}") from None
    for words, names in (("the base has layers without it", missing), ("layers are left over", unexpected)):
        if names:
            raise ModelError(f"{misfit}: {words} ({names[0]} and {len(names) - 1} more); {remedy}")
    _check_finite(saved)
    lora_linear.fuse(tuned)
    return tuned.eval()


def _check_finite(saved: SavedModel) -> None:
    """Raise for an adapter of a run that broke: its answers would be noise, and its losses left out of means."""
    with safe_open(saved.folder / ADAPTER, framework="pt") as file:
        for name in file.offset_keys():
            if not file.get_tensor(name).isfinite().all():
                raise ModelError(
                    f"the adapter {saved.name} is broken: {name} holds NaN or infinity; use an earlier checkpoint of "
                    "its run, or train again with a lower learning rate"
                )


# ---- the prompt --------------------------------------------------------------------------------------------------


def template_of(saved: SavedModel, spec: str | None) -> Template | None:
    """Return the template that is named, or else saved with the weights; None for the tokenizer's chat template.

    Raises:
        TemplateError: if no template is named and none was saved.
    """
    path = saved.folder / TEMPLATE
    if spec is not None:
        return template.resolve(spec)
    if path.is_file():
        return read_template(path)
    if saved.tokenizer.chat_template:
        return None
    raise TemplateError(f"{saved.name} has neither a saved {TEMPLATE} nor a chat template; give --template")


def read_template(path: Path) -> Template:
    """Read the template that was saved with trained weights.

    Raises:
        TemplateError: if it is damaged.
    """
    try:
        return template.parse(read_text(path, TemplateError), TEMPLATE, lenient=True)
    except OSError as error:
        raise TemplateError(f"cannot read {path} ({error.strerror}); copy it again") from None


def encoding(saved: SavedModel, chosen: Template | None, *, cutoff_len: int = sys.maxsize) -> Encoding:
    """Return how rows become tokens for it: control tokens in their text as in its training.

    Runs whose settings do not record that made tokens of them.
    """
    unrecorded = "keep" if saved.settings else "escape"
    return tokenize.make_encoding(
        saved.tokenizer,
        chosen,
        cutoff_len=cutoff_len,
        add_eos_token=saved.tokenizer.eos_token_id is not None,
        train_on_inputs=False,
        special_tokens_in_text=saved.settings.get("special_tokens_in_text", unrecorded),
    )


def raw_encoding(saved: SavedModel) -> Encoding:
    """Return the encoding of text that is a finished prompt, whose template is not used."""
    return encoding(saved, template.parse("{text}"))
