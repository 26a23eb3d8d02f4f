"""The files beside weights whose fields decide something, with their types. Other fields are kept and not checked."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from byeori.artifacts import layout
from byeori.errors import ByeoriError, ModelError
from byeori.model.fingerprint import read_header
from byeori.support import patterns
from byeori.support.foreign_files import json_record
from byeori.support.text_files import one_line

_Number = int | Annotated[float, Field(allow_inf_nan=False)]  # a whole one stays an int
_Rank = Annotated[int, Field(ge=1, le=1 << 20)]
_Count = Annotated[int, Field(ge=0, lt=1 << 62)]
_OPEN = ConfigDict(extra="allow")
_LAYER = "model.layers.0.post_attention_layernorm"


@with_config(_OPEN)
class AdapterConfig(TypedDict, total=False):
    """adapter_config.json, as PEFT writes it."""

    peft_type: Required[str]
    base_model_name_or_path: str | None
    revision: str | None
    r: _Rank
    lora_alpha: _Number
    lora_dropout: Annotated[float, Field(ge=0, le=1)]
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    rank_pattern: dict[str, _Rank] | None
    alpha_pattern: dict[str, _Number] | None
    init_lora_weights: bool | str | None
    modules_to_save: list[str] | None


@with_config(_OPEN)
class BaseRecord(TypedDict, total=False):
    """byeori_base.json: what a run started from. sha256: of samples of the tensors, by byeori 0.1.

    day: what the chat template wrote as today into the rows.
    """

    base_model: Required[str]
    weights_sha256: str | None
    sha256: str | None
    rows_sha256: str | None
    day: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]


class Manifest(TypedDict):
    """manifest.json of a checkpoint: file -> SHA-256."""

    sha256: dict[str, str]


@with_config(_OPEN)
class RunState(TypedDict, total=False):
    """The counters of a run in a checkpoint; see train.state.Progress."""

    step: Required[_Count]
    best_loss: float | None
    best_step: _Count | None
    evaluations_without_gain: _Count
    bad_steps: _Count
    last_loss: float
    first_loss: float
    tokens: _Count
    unique_tokens: _Count
    halvings: Annotated[int, Field(ge=0, le=64)]


def adapter_config(folder: Path, error: type[ByeoriError] = ModelError) -> dict[str, Any]:
    """Return an adapter's configuration.

    Raises:
        ByeoriError: of the class `error`, if it cannot be read, or a field is not what PEFT writes.
    """
    path, advice = folder / layout.ADAPTER_CONFIG, "copy the adapter again"
    config = dict(json_record(path, AdapterConfig, error, advice=advice))
    names = _layers(folder / layout.ADAPTER)
    for field in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"):
        given = config.get(field) or ()
        for pattern in [given] if isinstance(given, str) else given if isinstance(given, dict) else ():
            if why := patterns.problem(pattern, names):
                raise error(f"{path} is damaged: {field} {pattern[:80]!r} {one_line(why, 120)}; {advice}")
    return config


def _layers(weights: Path) -> list[str]:
    """The names of the layers that an adapter changes, and of one that most models have."""
    with suppress(ModelError):  # a file that is missing or damaged is reported where it is needed
        return [
            *dict.fromkeys(
                name.removeprefix("base_model.model.").partition(".lora_")[0] for name in read_header(weights)
            ),
            _LAYER,
        ]
    return [_LAYER]


def base_record(folder: Path) -> BaseRecord | None:
    """Return what training recorded about the base of an adapter or a checkpoint, if it did.

    Raises:
        ModelError: if it is damaged.
    """
    path = folder / layout.BASE
    return json_record(path, BaseRecord, advice="copy the adapter again") if path.is_file() else None
