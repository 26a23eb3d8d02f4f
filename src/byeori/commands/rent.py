"""byeori rent: plan, and write the files that rent the best machine and train there. Nothing is rented by it."""

from __future__ import annotations

import json
from pathlib import Path

from byeori.commands.plan import chosen_settings, plan
from byeori.config import RentSettings
from byeori.errors import ConfigError
from byeori.plan import rentals
from byeori.plan.report import PlanResult
from byeori.support import atomic_files
from byeori.support.console import say
from byeori.support.yaml_files import yaml_text


def rent(settings: RentSettings) -> PlanResult:
    """Print the plan and write sky.yaml, .dstack.yml and runpod.json for its best machine.

    Raises:
        ByeoriError: if the plan fails, nothing fits, or what is local cannot be taken along.
    """
    result = plan(settings)
    assert result is not None  # there is a model
    chosen = chosen_settings(settings, result)
    assert result.best is not None
    if result.best.machine.device == "cpu":
        raise ConfigError("the best machine is this one's CPU, which nobody rents; choose a GPU with --gpu")
    remote, mounts = rentals.mounted(chosen)
    rental = rentals.Rental(
        candidate=result.best,
        objective=settings.planned,
        settings=remote,
        text=yaml_text(remote),
        mounts=mounts,
        weight_bytes=2 * result.weights,
    )
    folder, machine = Path(settings.rent_dir), result.best.machine
    folder.mkdir(parents=True, exist_ok=True)
    say(f"For {machine.name} x {result.best.count}:")
    if machine.skypilot:
        task = rentals.sky(rental)
        atomic_files.write(folder / "sky.yaml", yaml_text(task))
        inside = " (inside a checkout of byeori)" if task["workdir"] == "." else ""
        say(f"  SkyPilot  sky {'jobs launch' if rental.spot else 'launch'} {folder / 'sky.yaml'}{inside}")
    atomic_files.write(folder / ".dstack.yml", yaml_text(rentals.dstack(rental)))
    say(f"  dstack    dstack apply -f {folder / '.dstack.yml'}")
    if machine.runpod:
        atomic_files.write(folder / "runpod.json", json.dumps(rentals.runpod(rental), indent=1, ensure_ascii=False))
        post = "curl https://rest.runpod.io/v1/templates -H 'Content-Type: application/json'"
        say(f'  RunPod    {post} -H "Authorization: Bearer $RUNPOD_API_KEY" -d @{folder / "runpod.json"}')
    return result
