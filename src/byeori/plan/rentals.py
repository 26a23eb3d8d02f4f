"""Files that rent a machine, set it up and run the planned settings on it.

A SkyPilot task (docs.skypilot.co, "YAML spec"), a dstack task (dstack.ai, "reference: .dstack.yml") and the body of a
RunPod template (docs.runpod.io, POST /templates). SkyPilot and dstack bring along the local files that the settings
name (rows, a template, a model), and SkyPilot the checkout that byeori is installed from; a RunPod template waits until
they are copied.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from byeori.artifacts import layout, records
from byeori.data import places, template
from byeori.errors import ConfigError
from byeori.plan.candidates import Candidate
from byeori.plan.machines import GIB

_DISK = 64  # GB besides the weights: packages, rows, checkpoints
_FILES = "/tmp/byeori"  # where local files are mounted on the rented machine, each in a folder of its own
_ENVIRONMENT = "~/byeori-env"
# RunPod's own, for its SSH server, by which files are copied.
_RUNPOD_IMAGE = "runpod/pytorch:2.4.0-py3.11-cuda12.4.1-devel-ubuntu22.04"
_REPOSITORY = "git+https://github.com/byeori/byeori"


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
    for given in settings["data_path"]:
        path, weight = places.split_weight(given)
        local = [Path(path)] if Path(path).exists() else places.matching(path)
        rows += [mount(file) + (f":{weight:g}" if weight else "") for file in local] or [given]
    if settings.get("validation_path"):
        out["validation_path"] = [
            mount(Path(path)) if Path(path).exists() else path for path in settings["validation_path"]
        ]
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
    is_adapter = (folder / layout.ADAPTER_CONFIG).is_file()
    base = records.adapter_config(folder).get("base_model_name_or_path") if is_adapter else None
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Rental:
    """What is to be rented and run. settings: with paths of the machine; text: the same as YAML.

    mounts: the path there -> the local path. weight_bytes: of the base model's files.
    """

    candidate: Candidate
    objective: str
    settings: dict[str, Any]
    text: str
    mounts: dict[str, str]
    weight_bytes: int

    @property
    def disk(self) -> int:
        """Return GB of disk."""
        return _DISK + 2 * self.weight_bytes // 10**9

    @property
    def spot(self) -> bool:
        """Return whether the machine may be taken away."""
        return self.candidate.price is not None and self.candidate.price.kind == "spot"

    def run(self, python: str) -> str:
        """Return the commands that write the settings and train."""
        return (
            f"cat > run.yaml <<'END_OF_SETTINGS'\n{self.text}END_OF_SETTINGS\n"
            f"{python} -m byeori {self.objective} --config run.yaml\n"
        )


def sky(rental: Rental) -> dict[str, Any]:
    """Return the SkyPilot task.

    Raises:
        ConfigError: if SkyPilot has no such machine.
    """
    machine, count = rental.candidate.machine, rental.candidate.count
    if machine.skypilot is None:
        raise ConfigError(f"SkyPilot rents no {machine.name}; choose a GPU with --gpu")
    resources: dict[str, Any] = {"accelerators": f"{machine.skypilot}:{count}", "disk_size": rental.disk}
    resources |= {"any_of": [{"infra": cloud} for cloud in ("runpod", "lambda", "aws", "gcp")]}
    resources |= {"use_spot": True, "job_recovery": {"strategy": "FAILOVER"}} if rental.spot else {}
    python, extras = f"{_ENVIRONMENT}/bin/python", ",".join(_extras(rental.settings))
    package = f"'.[{extras}]'" if extras else "."
    return {
        "name": f"byeori-{rental.objective}",
        "resources": resources,
        "workdir": checkout(),
        **({"file_mounts": rental.mounts} if rental.mounts else {}),
        "setup": f"pip install --upgrade uv\nuv venv --allow-existing --python 3.12 {_ENVIRONMENT}\n"
        f"uv pip install --python {python} --torch-backend auto {package}\n",
        "run": rental.run(python),
    }


def dstack(rental: Rental) -> dict[str, Any]:
    """Return the dstack task."""
    machine, count = rental.candidate.machine, rental.candidate.count
    gpu = {"name": dstack_name(machine.name), "memory": f"{machine.memory * 0.9 / GIB:.0f}GB..", "count": count}
    return {
        "type": "task",
        "name": f"byeori-{rental.objective}",
        "python": "3.12",
        **({"files": [f"{local}:{remote}" for remote, local in rental.mounts.items()]} if rental.mounts else {}),
        "commands": [_install(rental.settings), rental.run("python")],
        "resources": {"gpu": gpu, "disk": f"{rental.disk}GB.."},
        "spot_policy": "spot" if rental.spot else "on-demand",
    }


def dstack_name(name: str) -> str:
    """Return what dstack calls a GPU: `A100 80GB` -> `A100`, `RTX A6000` -> `A6000`, `RTX 6000 Ada` -> `RTX6000Ada`."""
    return re.sub(r"^RTX (?=A\d)| \d+GB$| PCIe$| ", "", name)


def runpod(rental: Rental) -> dict[str, Any]:
    """Return the body of a RunPod template; a pod of it needs the GPU that `readme` names."""
    machine, count = rental.candidate.machine, rental.candidate.count
    waits = [f"until [ -e {path} ]; do echo waiting for {path}; sleep 10; done\n" for path in rental.mounts]
    start = f"/start.sh &\ncd /workspace\n{_install(rental.settings)}\n{''.join(waits)}{rental.run('python')}"
    copies = [f"- copy {local} to {remote}" for remote, local in rental.mounts.items()]
    pod = {"gpuTypeIds": [machine.runpod], "gpuCount": count, "interruptible": rental.spot}
    return {
        "name": f"byeori-{rental.objective}",
        "imageName": _RUNPOD_IMAGE,
        "category": "NVIDIA",
        "containerDiskInGb": rental.disk,
        "volumeInGb": rental.disk,
        "volumeMountPath": "/workspace",
        "ports": ["22/tcp"],
        "env": {"HF_TOKEN": "{{ RUNPOD_SECRET_hf_token }}", "HF_HOME": "/workspace/hf"},
        "dockerStartCmd": ["bash", "-c", start],
        "readme": "\n".join(
            [f"Pod: {json.dumps(pod)}", *copies, "The adapter stays on the volume; stop the pod when it is done."]
        ),
    }


def _install(settings: dict[str, Any]) -> str:
    extras = ",".join(_extras(settings))
    package = f"'byeori{f'[{extras}]' if extras else ''} @ {_REPOSITORY}'"
    return f"pip install uv && uv pip install --system --torch-backend auto {package}"


def _extras(settings: dict[str, Any]) -> list[str]:
    """The optional dependencies of the run, as pyproject.toml names them."""
    quantized = settings.get("load_in_4bit") is True or settings.get("load_in_8bit")
    optim = settings.get("optim", "adamw")
    quant = quantized or "8bit" in optim or "lion" in optim or "paged" in optim
    free = optim.startswith("schedule_free")
    return (
        ["quant"] * bool(quant)
        + ["schedulefree"] * free
        + [name for name in settings.get("report_to", []) if name != "none"]
    )
