"""byeori rent: the files that rent the best machine, and what they take along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from byeori import config
from byeori.commands import rent
from byeori.errors import ConfigError


def _rent(folder: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    rent.rent(config.check(config.RentSettings, settings | {"rent_dir": str(folder)}))
    read = [(folder / name).read_text(encoding="utf-8") for name in ("sky.yaml", ".dstack.yml", "runpod.json")]
    return yaml.safe_load(read[0]), yaml.safe_load(read[1]), json.loads(read[2])


def test_local_files_are_taken_along(
    tiny_model: Path, title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two tables of one name, those of a glob, the model and the template."""
    tables = [tmp_path / name for name in ("a/rows.jsonl", "b/rows.jsonl", "c/one.jsonl", "c/two.jsonl")]
    for table in tables:
        table.parent.mkdir(exist_ok=True)
        table.write_bytes(title_rows.read_bytes())
    form, folder = tmp_path / "form.txt", tmp_path / "rent"
    form.write_text("{document}\n{title}")
    rows = [str(tables[0]), str(tables[1]), str(tmp_path / "c" / "*.jsonl")]
    how = {"base_model": str(tiny_model), "data_path": rows, "template": str(form), "cutoff_len": 256, "gpu": "4090"}
    sky, dstack, runpod = _rent(folder, **how, optim="adamw_8bit")
    mounts, written = sky["file_mounts"], sky["run"].split("END_OF_SETTINGS")[1].removeprefix("'")
    settings = config.check(config.SftSettings, yaml.safe_load(written))
    assert [mounts[path] for path in settings.data_path] == list(map(str, tables))
    assert (mounts[settings.base_model], mounts[settings.template]) == (str(tiny_model), str(form))
    assert "'.[quant]'" in sky["setup"]
    assert (Path(sky["workdir"]) / "pyproject.toml").is_file()
    assert sky["resources"]["accelerators"] == "RTX4090:1"
    assert dstack["files"] == [f"{local}:{there}" for there, local in mounts.items()]
    assert sky["run"].split("\n", 1)[1].split("END_OF")[0] in runpod["dockerStartCmd"][-1]
    said = capsys.readouterr().err
    assert f"sky launch {folder}/sky.yaml\n" in said
    assert f"dstack apply -f {folder}/.dstack.yml\n" in said


def test_a_spot_machine_is_rented_as_one_and_saves_often(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    how = {
        "base_model": str(tiny_model),
        "data_path": str(title_rows),
        "cutoff_len": 256,
        "gpu": "A100-80",
        "spot": True,
    }
    sky, dstack, runpod = _rent(tmp_path, **how)
    assert (
        sky["resources"]["use_spot"] and dstack["spot_policy"] == "spot" and '"interruptible": true' in runpod["readme"]
    )
    assert "save_steps: " in sky["run"]


def test_nothing_is_written_for_a_cpu(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    how = {"base_model": str(tiny_model), "data_path": str(title_rows), "cutoff_len": 256, "gpu": "CPU"}
    with pytest.raises(ConfigError, match="this one's CPU, which nobody rents; choose a GPU with --gpu"):
        _rent(tmp_path / "rent", **how)
    assert not (tmp_path / "rent").exists()
