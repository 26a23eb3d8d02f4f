"""The screen of the plan: every setting of the run, what fits here, and what to rent."""

from __future__ import annotations

import functools
from typing import Any

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from byeori import config
from byeori.config.flags import flags
from byeori.errors import ConfigError
from byeori.studio import jobs, live_row, pages, settings_text
from byeori.studio.template import FIELDS
from byeori.studio.workspace import Workspace

_KINDS: dict[str, type[config.TrainSettings]] = {"sft": config.SftSettings, "dpo": config.DpoSettings}
_PICTURE = "plan.html"
_GIB = 2**30
# Settings of the other screens, and those that belong to a button.
ELSEWHERE = (
    *FIELDS,
    "base_model",
    "data_path",
    "columns",
    "template",
    "val_set_size",
    "dataset_split",
    "dataset_config",
)
_BUTTONS = ("resume_from_checkpoint", "overwrite_output_dir")


def presets(command: str) -> dict[str, dict[str, Any]]:
    """Return name -> the settings of each preset."""
    peak = {"sft": (3e-4, 2e-4, 1e-4), "dpo": (2e-5, 1e-5, 5e-6)}[command]
    shared = {"lr_scheduler": "cosine", "warmup_ratio": 0.05}
    return {
        "quick": {"max_steps": 20, "num_epochs": 1, "lora_r": 8, "lora_alpha": 8, "learning_rate": peak[0], **shared},
        "balanced": {"num_epochs": 3, "lora_r": 16, "lora_alpha": 16, "learning_rate": peak[1], **shared},
        "best": {"num_epochs": 5, "lora_r": 64, "lora_alpha": 64, "learning_rate": peak[2], **shared}
        | {"val_set_size": 0.05, "early_stopping_patience": 3},
    }


def screen(request: Request, error: str = "") -> Response:
    """Show the settings and the last plan."""
    space = pages.workspace(request)
    command, draft = command_of(space), settings_of(space)
    kind = _KINDS[command]
    return pages.render(
        request,
        "plan.html",
        here="plan",
        error=error,
        draft=draft,
        command=command,
        presets=presets(command),
        kind=kind,
        groups=settings_text.fields(kind, draft, without=(*ELSEWHERE, *_BUTTONS)),
        ready=bool(draft.get("base_model") and draft.get("data_path")),
        plan=result_of(space),
        copies=pages.copies(command, kind, draft),
    )


def command_of(space: Workspace) -> str:
    """Return sft or dpo: as chosen, or as the columns of the rows say."""
    chosen = space.draft("road").get("command")
    if chosen in _KINDS:
        return str(chosen)
    draft = space.draft("train")
    return live_row.live(space, {**draft, "base_model": None}, 0).kind if draft.get("data_path") else "sft"


def settings_of(space: Workspace) -> dict[str, Any]:
    """Return the settings of the run that is being prepared, with a folder for it."""
    draft = space.draft("train")
    known = flags(_KINDS[command_of(space)])
    values = {name: value for name, value in draft.items() if name in known}
    return values | {"output_dir": values.get("output_dir") or free_folder(space, "run")}


def free_folder(space: Workspace, word: str) -> str:
    """Return a name for a folder that does not exist and that no job is about to make."""
    taken = {job.output for job in jobs.every(space)}
    return next(
        name
        for number in range(1, 10_000)
        if (name := f"{word}-{number}") not in taken and not (space.folder / name).exists()
    )


def result_of(space: Workspace) -> dict[str, Any] | None:
    """Return the last plan, ready for the page; None without one."""
    job = jobs.latest(space, "plan")
    if job is None:
        return None
    found: dict[str, Any] = {"state": job.state, "tail": job.tail()[-400:], "error": "", "orders": [], "facts": {}}
    if job.state in ("failed", "killed"):
        return found | {"error": job.error()}
    plan = job.result()
    if isinstance(plan, dict):
        found["facts"] = plan
        found["orders"] = _orders(plan.get("offers") or [])
        found["picture"] = (space.state / _PICTURE).is_file()
    return found


def _orders(offers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the machine here, the cheapest, the fastest and the smallest, ready for the page."""
    fitting = [offer for offer in offers if offer["fits"] and offer["hours"]]
    rented = [offer for offer in fitting if offer["cost_usd"]]
    best = {
        "cheapest": min(rented, key=lambda offer: sum(offer["cost_usd"]), default=None),
        "fastest": min(rented, key=lambda offer: sum(offer["hours"]), default=None),
        "smallest": min(rented, key=lambda offer: offer["memory_bytes"] * offer["count"], default=None),
    }
    name = _this_machine()
    here = next((offer for offer in offers if offer["machine"] == name and offer["count"] == 1), None)
    lines = [("this machine", here), *best.items()]
    return [{"order": order} | _offer(offer) for order, offer in lines if offer is not None]


def _offer(offer: dict[str, Any]) -> dict[str, Any]:
    from byeori.plan.report import dollars, hours

    return {
        "machine": f"{offer['machine']} × {offer['count']}",
        "fits": offer["fits"],
        "time": hours(tuple(offer["hours"])) if offer["hours"] else "",
        "cost": dollars(tuple(offer["cost_usd"])) if offer["cost_usd"] else "",
        "need": offer["need_bytes"] / _GIB,
        "memory": offer["memory_bytes"] / _GIB,
        "provider": offer["provider"] or "",
        "settings": ", ".join(f"{name} {value}" for name, value in (offer["settings"] or {}).items()),
    }


@functools.cache
def _this_machine() -> str:
    from byeori.plan import machines

    gpu = machines.this_gpu(machines.read())
    return gpu.name if gpu else "CPU"


# ---- what a person does ----------------------------------------------------------------------------------------------


def _keep(space: Workspace, form: FormData) -> None:
    command = str(form.get("command") or command_of(space))
    if command not in _KINDS:
        raise ConfigError(f"there is no training {command[:40]!r}; choose sft or dpo")
    kind = _KINDS[command]
    known = [name for name in flags(kind) if name in form]
    draft = {name: value for name, value in space.draft("train").items() if name not in known}
    draft |= settings_text.from_form(kind, dict(form))
    trial = {"base_model": "x", "data_path": ["x"], "output_dir": "x"} | draft
    config.check(kind, {name: value for name, value in trial.items() if name in flags(kind)})
    if "output_dir" in draft:
        space.inside(str(draft["output_dir"]))
    space.save_draft("train", draft)
    space.save_draft("road", space.draft("road") | {"command": command})


@pages.action(screen)
def keep(request: Request, form: FormData) -> Response:
    """Keep the settings, and do what the button says."""
    space = pages.workspace(request)
    _keep(space, form)
    if form.get("do") == "plan":
        _plan(space)
        return pages.go("plan#planned")
    if form.get("do") == "train":
        return _train(space)
    return pages.go("plan")


def _plan(space: Workspace) -> None:
    known = flags(config.PlanSettings)
    values = {name: value for name, value in settings_of(space).items() if name in known}
    picture = space.state / _PICTURE
    picture.unlink(missing_ok=True)
    jobs.start(space, "plan", values | {"objective": command_of(space), "json": True, "html": str(picture)})


def _train(space: Workspace) -> Response:
    values = settings_of(space)
    job = jobs.start(space, command_of(space), values)
    space.change_draft("train", output_dir=None)
    return pages.go(pages.address("train", run=job.output))


@pages.action(screen)
def preset(request: Request, form: FormData) -> Response:
    """Take the settings of a preset, and forget those of another."""
    space = pages.workspace(request)
    every = presets(command_of(space))
    if (name := str(form.get("name"))) not in every:
        raise ConfigError(f"there is no preset {name[:40]!r}; choose quick, balanced or best")
    others = {key: None for values in every.values() for key in values if key != "val_set_size"}
    space.change_draft("train", **others | every[name])
    return pages.go("plan")


def planned(request: Request) -> Response:
    """The part of the screen that shows the plan, while it is made."""
    space = pages.workspace(request)
    return pages.render(request, "plan_result.html", plan=result_of(space))


def picture(request: Request) -> Response:
    """The picture of the plan."""
    return pages.document(pages.workspace(request).state / _PICTURE)


routes = [
    Route("/plan", pages.view(screen)),
    Route("/plan-keep", keep, methods=["POST"]),
    Route("/plan-preset", preset, methods=["POST"]),
    Route("/plan-result", pages.view(planned)),
    Route("/plan-picture", pages.view(picture)),
]
