"""What an installation gets: the whole package, and nothing but the package."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_CODE = [
    "data/samples/alpaca-ko.jsonl",
    "data/samples/preference-ko.jsonl",
    "data/samples/titles-ko-test.jsonl",
    "data/samples/titles-ko-train.jsonl",
    "data/templates/alpaca.txt",
    "data/templates/prompt-completion.txt",
    "data/templates/question-answer.txt",
    "data/templates/title-ko.txt",
    "kernels/csrc/attention.c",
    "kernels/csrc/kernels.c",
    "kernels/csrc/linear.c",
    "kernels/csrc/strips.c",
    "kernels/csrc/tiles.c",
    "plan/machines.yaml",
    "plan/prices.yaml",
    "py.typed",
    "evaluate/report.html.j2",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built as pip does, but with the backend that is here: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    how = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *how, str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("byeori-*.whl")
    return zipfile.ZipFile(path)


def test_it_holds_the_whole_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert found == sources | {f"byeori/{name}" for name in NO_CODE}


def test_it_has_the_licence_and_the_command(wheel: zipfile.ZipFile) -> None:
    (about,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert wheel.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "byeori = byeori.cli:main" in wheel.read(f"{about}/entry_points.txt").decode()
    metadata = wheel.read(f"{about}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata and "Provides-Extra: demo" in metadata


def test_it_runs_from_where_it_is_unpacked(
    wheel: zipfile.ZipFile, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path / "site")
    values = {"base_model": tiny_model, "data_path": title_rows, "output_dir": tmp_path / "out"}
    code = "import sys, byeori, byeori.cli; print(byeori.__file__); sys.exit(byeori.cli.main())"
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-c", code, "sft", *flags, "--cutoff_len", "256", "--max_steps", "1"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site" / "byeori"))
    assert "Template title-ko" in done.stderr and (tmp_path / "out" / "adapter_model.safetensors").is_file()
