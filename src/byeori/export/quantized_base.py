"""Does a base belong to an adapter, where training had it quantized and it is merged onto full-precision weights?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from byeori.artifacts import saved_model
from byeori.errors import HubError, ModelError
from byeori.model import opened as opening
from byeori.model import packed
from byeori.model.fingerprint import stored_tensors
from byeori.model.opened import Opened
from byeori.support import hub

ROUNDING = 0.25
"""The largest relative distance of weights that rounding explains: 4 bit (NF4) gives 0.09, FP4 0.12, FP8 0.03."""

_COMPARED = 8  # tensors


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """The quantized base that an adapter was trained on, where another one is merged. weights: by name in the files."""

    name: str
    weights: dict[str, Opened]
    distance: float
    note: str


def check_base(adapter: Path, folder: Path, name: str, *, option: str) -> TrainedOn | None:
    """Raise unless a base has the weights that an adapter was trained on, exactly or before they were quantized.

    name: the base's, as it was given. option: the flag that names the base. Returns the base that training had, if it
    is another one.

    Raises:
        ModelError: if it is another model.
    """
    try:
        saved_model.check_base_weights(adapter, folder, name, option=option)
    except ModelError as error:
        trained_on = saved_model.recorded_base(adapter)
        found = trained_on and _opened(trained_on)
        if not trained_on or not found:
            raise
        distance = _distance(found, folder)
        if distance is None or distance > ROUNDING:
            raise ModelError(
                f"{error}: even opened, the weights of {trained_on} are "
                + ("of other shapes" if distance is None else f"{distance:.0%} away, more than rounding explains")
            ) from None
        note = (
            f"{name} is merged instead of {trained_on}, which is stored quantized; their weights differ by "
            f"{distance:.1%} of their size, which rounding explains"
        )
        return TrainedOn(name=trained_on, weights=found, distance=distance, note=note)
    return None


def _opened(name: str) -> dict[str, Opened]:
    """The quantized weights of a base that is here or in the Hub's cache."""
    folder = Path(name)
    try:
        if not folder.is_dir():
            folder = hub.cached(name, hub.WEIGHTS)
        return packed.open_stored(folder, stored_tensors(folder))[0]
    except (ModelError, HubError, OSError):
        return {}


def _distance(opened: dict[str, Opened], folder: Path) -> float | None:
    """The mean relative distance of some of the weights; None if a base lacks one of that shape."""
    stored = stored_tensors(folder)
    names = sorted(opened)[:: max(1, len(opened) // _COMPARED)]
    distances = []
    for name in names:
        if name not in stored or stored[name].shape != opened[name].shape:
            return None
        weight = opening.read(stored[name]).float()
        distances.append(float((opened[name].load() - weight).norm() / weight.norm()))
    return sum(distances) / len(distances)
