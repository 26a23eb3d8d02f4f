"""The numbers of a comparison in the trackers of the training: in its run where that is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from byeori.artifacts import layout
from byeori.artifacts.saved_model import SavedModel
from byeori.errors import ByeoriError
from byeori.support.console import say
from byeori.train import log


def report(names: list[str], saved: SavedModel, metrics: Mapping[str, Any]) -> None:
    """Send means, differences and their intervals to trackers, at the last step of the training.

    names: of the trackers; [] are those that the training used, as far as they are installed.
    """
    folder = saved.folder.parent if saved.folder.name.startswith("checkpoint-") else saved.folder
    if not names:
        used = [name for name in saved.settings.get("report_to") or [] if name != "none"]
        names = [name for name in used if find_spec(name) is not None]
        if missing := [name for name in used if name not in names]:
            say(f"The numbers are not logged to {', '.join(missing)}, which is not installed here")
    if names and (Path(saved.name).is_dir() or (folder / layout.LOG).is_file()):
        step = max((line.get("step", 0) for line in log.read(folder)), default=0)
        try:
            with log.Trackers(names, folder=folder, settings={}, say=say, again=True) as trackers:
                trackers.write({"step": step, **dict(_numbers(metrics, "compare"))})
        except ByeoriError as error:  # the comparison is not lost for it
            say(f"The numbers are not logged: {error}")


def _numbers(metrics: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, interval in metrics["difference"].items():
        ends = {"difference": interval["mean"], "low": interval["low"], "high": interval["high"]}
        sides = {side: metrics[side].get(name) for side in ("base", "tuned")}
        for part, value in {**sides, **ends}.items():
            if value is not None:
                yield f"{prefix}/{name}/{part}", float(value)
    if "retention" in metrics:
        yield from _numbers(metrics["retention"], f"{prefix}/retention")
