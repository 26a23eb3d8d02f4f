"""SkyPilot tasks: resources, mounts, and where byeori is installed from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from byeori.errors import ConfigError
from byeori.plan import skypilot
from byeori.plan.candidates import Candidate
from byeori.plan.machines import GIB, Machine


def test_a_task_for_skypilot() -> None:
    gpu = Machine(name="GPU", device="cuda", memory=12 * GIB, workspace=0, skypilot="GPU")
    candidate = Candidate(machine=gpu, count=4)

    def task(candidate: Candidate, **settings: Any) -> dict[str, Any]:
        how: dict[str, Any] = {"objective": "sft", "text": "batch_size: 8\n", "weight_bytes": 16 * 10**9}
        return skypilot.task(candidate, settings=settings, mounts={"/a": "b"}, **how)

    made = task(candidate)
    assert made["resources"]["accelerators"] == "GPU:4"
    assert made["file_mounts"] == {"/a": "b"}
    assert made["run"].endswith("byeori sft --config run.yaml\n")
    assert made["setup"].endswith("bin/python .\n")
    assert task(candidate, load_in_4bit=True)["setup"].endswith("'.[quant]'\n")
    assert task(candidate, load_in_8bit=True)["setup"].endswith("'.[quant]'\n")
    assert task(candidate, optim="paged_adamw_8bit", report_to=["wandb"])["setup"].endswith("'.[quant,wandb]'\n")
    with pytest.raises(ConfigError, match="SkyPilot rents no CPU"):
        task(Candidate(machine=replace(gpu, name="CPU", skypilot=None), count=1))


def test_local_folders_that_cannot_be_mounted(tmp_path: Path) -> None:
    settings = {"base_model": str(tmp_path), "data_path": ["user/rows"]}
    assert skypilot.mounted(settings) == (
        settings | {"base_model": f"/tmp/byeori/0/{tmp_path.name}"},
        {f"/tmp/byeori/0/{tmp_path.name}": str(tmp_path)},
    )
    with pytest.raises(ConfigError, match="copy it to a URL"):
        skypilot.mounted(settings | {"resume_from_checkpoint": str(tmp_path)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ConfigError, match=r"the adapter .* needs its base model in the local folder .* byeori merge"):
        skypilot.mounted(settings)


def test_byeori_is_installed_from_its_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Path(skypilot.checkout()) / "src" / "byeori").is_dir()
    monkeypatch.setattr(skypilot, "__file__", "/usr/lib/python3/site-packages/byeori/plan/skypilot.py")
    record = {"url": tmp_path.as_uri(), "dir_info": {}}

    class Installed:
        def read_text(self, name: str) -> str:
            return json.dumps(record)

    monkeypatch.setattr(skypilot.metadata, "distribution", lambda name: Installed())
    assert skypilot.checkout() == "."  # it is gone
    (tmp_path / "pyproject.toml").touch()
    assert skypilot.checkout() == str(tmp_path)
