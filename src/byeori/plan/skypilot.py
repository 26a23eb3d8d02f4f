"""A SkyPilot task (docs.skypilot.co, "YAML spec") that sets a machine up and runs the planned settings on it.

What the settings name on this machine (rows, a template, a model) travels with the task, and so does byeori itself: it
is installed from the folder that the task calls workdir, which SkyPilot copies and works in.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from byeori.data import sources, template
from byeori.errors import ConfigError
from byeori.plan.candidates import Candidate

_DISK = 64  # GB beside the weights: packages, rows, checkpoints
_FILES = "/tmp/byeori"  # where a rented machine finds what was local, each in a folder of its own
_ENVIRONMENT = "~/byeori-env"


def travelling(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings as the rented machine reads them, and what is copied to it: the path there -> the path here.

    Raises:
        ConfigError: they need a folder of this machine that cannot go along.
    """
    mounts: dict[str, str] = {}

    def there(path: str | Path) -> str:
        here = Path(path).absolute()
        name = f"{_FILES}/{len(mounts)}/{here.name}"
        mounts[name] = str(here)
        return name

    out, start = dict(settings), settings.get("resume_from_checkpoint")
    if start and Path(start).exists():
        raise ConfigError(
            f"--resume_from_checkpoint {start} is a folder of this machine, which a rented one does not have; copy it "
            "to a URL, give that as --mirror_to, and resume from latest"
        )
    rows: list[str] = []
    for path in settings["data_path"]:
        local = [Path(path)] if Path(path).exists() else sources.matching(path)
        rows += [there(file) for file in local] or [path]
    base, form = settings["base_model"], settings.get("template")
    if Path(base).exists():
        _check_base(Path(base))
        out["base_model"] = there(base)
    if settings.get("trust_remote_code"):  # names the same
        out["trust_remote_code"] = out["base_model"]
    if form and template.is_file(form):
        out["template"] = there(form)
    return out | {"data_path": rows}, mounts


def _check_base(folder: Path) -> None:
    """See whether a model's folder is all that the rented machine needs of it.

    Raises:
        ConfigError: it is an adapter whose own base is a folder of this machine.
    """
    record = folder / "adapter_config.json"
    base = json.loads(record.read_text(encoding="utf-8"))["base_model_name_or_path"] if record.is_file() else None
    if base and Path(base).exists():
        raise ConfigError(
            f"the adapter {folder} needs {base}, a folder of this machine, which a rented one does not have; merge it "
            "with byeori merge and give the merged model as --base_model"
        )


def checkout() -> str:
    """The folder that this byeori was installed from; `.` where it is not there any more."""
    around = Path(__file__).parents[3]
    if (around / "pyproject.toml").is_file():
        return str(around)
    record = json.loads(metadata.distribution("byeori").read_text("direct_url.json") or "{}")
    folder = Path(url2pathname(urlsplit(record.get("url", "")).path))
    return str(folder) if folder.is_absolute() and (folder / "pyproject.toml").is_file() else "."


def task(
    offer: Candidate, *, objective: str, settings: dict[str, Any], text: str, weight_bytes: int, mounts: dict[str, str]
) -> dict[str, Any]:
    """settings: those of the run on that machine; text: the same as a YAML file, which travels inside the task.

    mounts: the path there -> the path here.

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
    found: dict[str, Any] = {"name": f"byeori-{objective}", "resources": resources, "workdir": checkout()}
    if mounts:
        found["file_mounts"] = mounts
    python, extras = f"{_ENVIRONMENT}/bin/python", ",".join(_extras(settings))
    package = f"'.[{extras}]'" if extras else "."
    written = f"cat > run.yaml <<'END_OF_SETTINGS'\n{text}END_OF_SETTINGS\n"
    return found | {
        "setup": f"pip install --upgrade uv\nuv venv --allow-existing --python 3.12 {_ENVIRONMENT}\n"
        f"uv pip install --python {python} {package}\n",
        "run": f"{written}{python} -m byeori {objective} --config run.yaml\n",
    }


def _extras(settings: dict[str, Any]) -> list[str]:
    """What the run needs beside byeori's own packages, by the names that pyproject.toml has for it."""
    packed = settings.get("load_in_4bit") is True or settings.get("load_in_8bit")
    quant = packed or settings.get("optim", "adamw") != "adamw"
    return ["quant"] * bool(quant) + [name for name in settings.get("report_to", []) if name != "none"]
