"""Tasks for SkyPilot and dstack, templates for RunPod: resources, mounts, and where byeori is installed from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from byeori.errors import ConfigError
from byeori.plan import rentals
from byeori.plan.candidates import Candidate
from byeori.plan.machines import GIB, Machine
from byeori.plan.prices import Price
from byeori.plan.rentals import Rental

GPU = Machine(
    name="RTX A6000", device="cuda", memory=48 * GIB, workspace=0, skypilot="RTXA6000", runpod="NVIDIA RTX A6000"
)


def _rental(machine: Machine = GPU, kind: str = "on-demand", **settings: Any) -> Rental:
    price = Price(gpu=machine.name, provider="x", usd_per_gpu_hour=1.0, kind=kind)
    return Rental(
        candidate=Candidate(machine=machine, count=4, price=price),
        objective="sft",
        settings=settings,
        text="batch_size: 8\n",
        mounts={"/a": "b"},
        weight_bytes=16 * 10**9,
    )


def test_a_task_for_skypilot() -> None:
    made = rentals.sky(_rental())
    assert made["resources"]["accelerators"] == "RTXA6000:4"
    assert "use_spot" not in made["resources"]
    assert made["file_mounts"] == {"/a": "b"}
    assert made["run"].endswith("byeori sft --config run.yaml\n")
    assert made["setup"].endswith("--torch-backend auto .\n")
    assert rentals.sky(_rental(load_in_4bit=True))["setup"].endswith("'.[quant]'\n")
    assert rentals.sky(_rental(load_in_8bit=True))["setup"].endswith("'.[quant]'\n")
    assert rentals.sky(_rental(optim="paged_adamw_8bit", report_to=["wandb"]))["setup"].endswith("'.[quant,wandb]'\n")
    assert rentals.sky(_rental(kind="spot"))["resources"]["use_spot"]
    with pytest.raises(ConfigError, match="SkyPilot rents no CPU"):
        rentals.sky(_rental(replace(GPU, name="CPU", skypilot=None)))


def test_a_task_for_dstack() -> None:
    made = rentals.dstack(_rental(kind="spot", load_in_4bit=True))
    assert made["resources"] == {"gpu": {"name": "A6000", "memory": "43GB..", "count": 4}, "disk": "96GB.."}
    assert made["files"] == ["b:/a"]
    assert made["spot_policy"] == "spot"
    assert "byeori[quant] @ git+" in made["commands"][0]


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("A100 80GB", "A100"),
        ("RTX 6000 Ada", "RTX6000Ada"),
        ("H100 PCIe", "H100"),
        ("H100 NVL", "H100NVL"),
        ("T4", "T4"),
    ],
)
def test_names_of_gpus_at_dstack(name: str, there: str) -> None:
    assert rentals.dstack_name(name) == there


def test_a_template_for_runpod_waits_for_local_files() -> None:
    made = rentals.runpod(_rental())
    start = made["dockerStartCmd"][-1]
    assert start.index("until [ -e /a ]") < start.index("byeori sft --config run.yaml")
    assert '"gpuTypeIds": ["NVIDIA RTX A6000"], "gpuCount": 4' in made["readme"]
    assert "- copy b to /a" in made["readme"]


def test_local_folders_that_cannot_be_mounted(tmp_path: Path) -> None:
    settings = {"base_model": str(tmp_path), "data_path": ["user/rows"]}
    assert rentals.mounted(settings) == (
        settings | {"base_model": f"/tmp/byeori/0/{tmp_path.name}"},
        {f"/tmp/byeori/0/{tmp_path.name}": str(tmp_path)},
    )
    with pytest.raises(ConfigError, match="copy it to a URL"):
        rentals.mounted(settings | {"resume_from_checkpoint": str(tmp_path)})
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path)})
    )
    with pytest.raises(ConfigError, match=r"the adapter .* needs its base model in the local folder .* byeori merge"):
        rentals.mounted(settings)


def test_byeori_is_installed_from_its_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Path(rentals.checkout()) / "src" / "byeori").is_dir()
    monkeypatch.setattr(rentals, "__file__", "/usr/lib/python3/site-packages/byeori/plan/rentals.py")
    record = {"url": tmp_path.as_uri(), "dir_info": {}}

    class Installed:
        def read_text(self, name: str) -> str:
            return json.dumps(record)

    monkeypatch.setattr(rentals.metadata, "distribution", lambda name: Installed())
    assert rentals.checkout() == "."  # it is gone
    (tmp_path / "pyproject.toml").touch()
    assert rentals.checkout() == str(tmp_path)
