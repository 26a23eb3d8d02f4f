"""Whether an adapter belongs to a base: by the fingerprint that training left with it, or by names on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from byeori.artifacts.layout import BASE
from byeori.artifacts.model_card import is_hub_id
from byeori.errors import ModelError
from byeori.model.fingerprint import base_fingerprint


def check_name(adapter: Path, recorded: str | None, given: str | None, *, option: str) -> None:
    """Compare the Hub ids that the adapter records and the user gives, where no fingerprint tells the weights apart.

    A record without an owner (`gemma-3-270m`) may be the last name of any folder, and says nothing.
    option: that names the base.

    Raises:
        ModelError: they name two repositories.
    """
    if recorded is None or given is None or "/" not in recorded or not (is_hub_id(recorded) and is_hub_id(given)):
        return
    same = f"/{recorded}".lower().endswith(f"/{given}".lower())  # old models are on the Hub without their owner too
    if not same and _recorded(adapter) is None:
        raise ModelError(
            f"{adapter} was trained on {recorded}, and {given} is another model on the Hub; leave {option} out, or, "
            "where both have the same weights, download it and give its folder"
        )


def check_weights(adapter: Path, folder: Path, name: str, *, option: str) -> None:
    """Compare the fingerprint that training left with the adapter with that of the base, where both are here.

    name: the base's, as it was given. option: that names the base.

    Raises:
        ModelError: they differ, or the record is damaged.
    """
    recorded = _recorded(adapter) if folder.is_dir() else None
    if recorded is None:
        return
    trained_on, wanted = recorded
    if base_fingerprint(folder) != wanted:
        raise ModelError(
            f"{adapter} was trained on {trained_on}, and the weights of {name} are not those; give that base with "
            f"{option}"
        )


def _recorded(adapter: Path) -> tuple[str, str] | None:
    """The name and the fingerprint of the base that training left with the adapter, where it did."""
    path = adapter / BASE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        trained_on, wanted = record["base_model"], record["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{path} is damaged; copy the adapter again") from None
    return (trained_on, wanted) if wanted else None
