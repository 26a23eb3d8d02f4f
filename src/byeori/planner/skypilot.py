"""A SkyPilot task (docs.skypilot.co, "YAML spec") that sets a machine up and runs the planned settings on it."""

from __future__ import annotations

from typing import Any

from byeori.errors import ConfigError
from byeori.planner.advice import Offer

_DISK = 64  # GB beside the weights: packages, rows, checkpoints


def task(offer: Offer, *, objective: str, settings: str, weight_bytes: int, rows: dict[str, str]) -> dict[str, Any]:
    """settings: the run's YAML file, as text; it travels inside the task. rows: where a local file is put -> the file.

    Raises:
        ConfigError: SkyPilot has no such machine.
    """
    if offer.machine.skypilot is None:
        raise ConfigError(f"SkyPilot rents no {offer.machine.name}; choose a GPU with --gpu")
    resources: dict[str, Any] = {
        "accelerators": f"{offer.machine.skypilot}:{offer.count}",
        "disk_size": _DISK + 2 * weight_bytes // 10**9,
        "any_of": [{"infra": cloud} for cloud in ("runpod", "lambda", "aws", "gcp")],
    }
    found: dict[str, Any] = {"name": f"byeori-{objective}", "resources": resources}
    if rows:
        found["file_mounts"] = rows
    written = f"cat > run.yaml <<'END_OF_SETTINGS'\n{settings}END_OF_SETTINGS\n"
    return found | {
        "setup": "pip install --upgrade byeori\n",
        "run": f"{written}byeori {objective} --config run.yaml\n",
    }
