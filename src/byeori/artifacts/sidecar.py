"""The files next to weights: tokenizer, template, settings, the base's fingerprint, the audit and the model card."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from byeori.artifacts import layout, model_card, tokenizer_files
from byeori.artifacts.layout import AUDIT, BASE, CARD, SETTINGS, TEMPLATE
from byeori.data.served_template import served_template
from byeori.data.tokenize import Encoding
from byeori.model import rope_scaling
from byeori.model.fingerprint import weights_sha256
from byeori.support import hub


def write_sidecar(
    folder: Path, encoding: Encoding, settings: dict[str, Any], tokenizer: Path, *, whole: bool = False
) -> None:
    """Write tokenizer, template, chat template and resolved settings: all that a server needs for the trained prompt.

    settings: of the run, by name, with its `row_kind`. tokenizer: the folder that the tokenizer was loaded from. whole:
    the folder will hold a model, whose config.json tells the class of the tokenizer.
    """
    served = encoding.tokenizer.chat_template
    if encoding.template is not None:
        (folder / TEMPLATE).write_text(encoding.template.text, encoding="utf-8")
        served = served_template(encoding)
    kind = type(encoding.tokenizer).__name__
    tokenizer_files.copy(tokenizer, folder, chat_template=served, class_name=None if whole else kind)
    if added := settings.get("add_tokens"):
        numbers = encoding.tokenizer.convert_tokens_to_ids(added)
        tokenizer_files.write_added(folder, dict(zip(added, numbers, strict=True)))
    text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
    (folder / SETTINGS).write_text(text, encoding="utf-8")
    names = ("byeori", "torch", "transformers", "peft", "datasets", "tokenizers", "safetensors")
    versions = {name: version(name) for name in names}
    (folder / layout.VERSIONS).write_text(json.dumps(versions, indent=1), encoding="utf-8")


def write_start(folder: Path, base: str, revision: str | None, content: str, day: datetime | None) -> None:
    """Record what a run began from: the base, a hash of its rows' tokens, and the date in them if there is one."""
    record = {
        "base_model": rope_scaling.origin(base),
        "weights_sha256": weights_sha256(base_folder(base, revision)),
        "rows_sha256": content,
    }
    record |= {"day": f"{day:%Y-%m-%d}"} if day else {}
    (folder / BASE).write_text(json.dumps(record, indent=1), encoding="utf-8")


def write_run_facts(folder: Path, output: Path, audit: dict[str, Any]) -> None:
    """Write the audit, the log, and the model card, unless `output` has a card that the user wrote."""
    (folder / AUDIT).write_text(json.dumps(audit, ensure_ascii=False, indent=1), encoding="utf-8")
    shutil.copy(output / layout.LOG, folder / layout.LOG)
    own = output / CARD
    if not own.is_file() or model_card.is_generated(own.read_text(encoding="utf-8", errors="replace")):
        (folder / CARD).write_text(model_card.model_card(folder, name=output.resolve().name), encoding="utf-8")


def base_folder(base: str, revision: str | None) -> Path:
    """Return the folder of a base's weights: its own, or that of the Hub's cache."""
    local = Path(base)
    return local if local.is_dir() else hub.cached(base, hub.WEIGHTS, revision=revision)
