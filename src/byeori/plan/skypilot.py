"""A SkyPilot task (docs.skypilot.co, "YAML spec") that sets up a machine and runs the planned settings on it.

Local files that the settings name (rows, a template, a model) are mounted by the task. byeori itself is installed from
the task's workdir, which SkyPilot copies.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from byeori.artifacts import layout
from byeori.data import sources, template
from byeori.errors import ConfigError
from byeori.plan.candidates import Candidate

_DISK = 64  # GB besides the weights: packages, rows, checkpoints
_FILES = "/tmp/byeori"  # where local files are mounted on the rented machine, each in a folder of its own
_ENVIRONMENT = "~/byeori-env"


def mounted(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings with paths of the rented machine, and the mounts: the path there -> the local path.

    Raises:
        ConfigError: if they need a local folder that cannot be mounted.
    """
    mounts: dict[str, str] = {}

    def mount(path: str | Path) -> str:
        local = Path(path).absolute()
        remote = f"{_FILES}/{len(mounts)}/{local.name}"
        mounts[remote] = str(local)
        return remote

    out, checkpoint = dict(settings), settings.get("resume_from_checkpoint")
    if checkpoint and Path(checkpoint).exists():
        raise ConfigError(
            f"--resume_from_checkpoint {checkpoint} is a local folder, which a rented machine does not have; copy it "
            "to a URL, give that as --mirror_to, and resume from latest"
        )
    rows: list[str] = []
    for path in settings["data_path"]:
        local = [Path(path)] if Path(path).exists() else sources.matching(path)
        rows += [mount(file) for file in local] or [path]
    base, form = settings["base_model"], settings.get("template")
    if Path(base).exists():
        _check_base(Path(base))
        out["base_model"] = mount(base)
    if settings.get("trust_remote_code"):  # its value is the model's name
        out["trust_remote_code"] = out["base_model"]
    if form and template.is_file(form):
        out["template"] = mount(form)
    return out | {"data_path": rows}, mounts


def _check_base(folder: Path) -> None:
    """Raise unless a model's folder is complete without other local folders.

    Raises:
        ConfigError: if it is an adapter whose own base is a local folder.
    """
    record = folder / layout.ADAPTER_CONFIG
    base = json.loads(record.read_text(encoding="utf-8"))["base_model_name_or_path"] if record.is_file() else None
    if base and Path(base).exists():
        raise ConfigError(
            f"the adapter {folder} needs its base model in the local folder {base}, which a rented machine does not "
            "have; merge it with byeori merge and give the merged model as --base_model"
        )


def checkout() -> str:
    """Return the folder that this byeori was installed from; `.` if it no longer exists."""
    around = Path(__file__).parents[3]
    if (around / "pyproject.toml").is_file():
        return str(around)
    record = json.loads(metadata.distribution("byeori").read_text("direct_url.json") or "{}")
    folder = Path(url2pathname(urlsplit(record.get("url", "")).path))
    return str(folder) if folder.is_absolute() and (folder / "pyproject.toml").is_file() else "."


def task(
    candidate: Candidate,
    *,
    objective: str,
    settings: dict[str, Any],
    text: str,
    weight_bytes: int,
    mounts: dict[str, str],
) -> dict[str, Any]:
    """Return the task. settings: those of the run on that machine; text: the same as YAML, which the task contains.

    mounts: the path there -> the local path.

    Raises:
        ConfigError: if SkyPilot has no such machine.
    """
    machine = candidate.machine
    if machine.skypilot is None:
        raise ConfigError(f"SkyPilot rents no {machine.name}; choose a GPU with --gpu")
    resources = {
        "accelerators": f"{machine.skypilot}:{candidate.count}",
        "disk_size": _DISK + 2 * weight_bytes // 10**9,
        "any_of": [{"infra": cloud} for cloud in ("runpod", "lambda", "aws", "gcp")],
    }
    python, extras = f"{_ENVIRONMENT}/bin/python", ",".join(_extras(settings))
    package = f"'.[{extras}]'" if extras else "."
    return {
        "name": f"byeori-{objective}",
        "resources": resources,
        "workdir": checkout(),
        **({"file_mounts": mounts} if mounts else {}),
        "setup": f"pip install --upgrade uv\nuv venv --allow-existing --python 3.12 {_ENVIRONMENT}\n"
        f"uv pip install --python {python} {package}\n",
        "run": f"cat > run.yaml <<'END_OF_SETTINGS'\n{text}END_OF_SETTINGS\n"
        f"{python} -m byeori {objective} --config run.yaml\n",
    }


def _extras(settings: dict[str, Any]) -> list[str]:
    """The optional dependencies of the run, as pyproject.toml names them."""
    quantized = settings.get("load_in_4bit") is True or settings.get("load_in_8bit")
    quant = quantized or settings.get("optim", "adamw") != "adamw"
    return ["quant"] * bool(quant) + [name for name in settings.get("report_to", []) if name != "none"]
