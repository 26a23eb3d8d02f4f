"""What an installation gets: the whole package, and nothing but the package. `make dist` also runs the demo."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import byeori

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "byeori"
# Endings of files that are no Python, with one that must be there.
OTHER_FILES = {
    ".css": "studio/static/studio.css",
    ".csv": "plan/prices.csv",
    ".html": "studio/templates/base.html",
    ".js": "studio/static/htmx.min.js",
    ".svg": "studio/static/icon.svg",
    ".c": "kernels/csrc/kernels.c",
    ".j2": "evaluate/report.html.j2",
    ".jinja": "data/chat_templates/chatml.jinja",
    ".jsonl": "data/samples/titles-ko-train.jsonl",
    ".txt": "data/templates/title-ko.txt",
    ".typed": "py.typed",
    ".yaml": "plan/machines.yaml",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an sdist and of the wheel that is built from it, with the backend that is here: no downloads."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("byeori-*.whl")
    return zipfile.ZipFile(path)


def test_it_holds_the_whole_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed == {f"byeori/{path.relative_to(PACKAGE).as_posix()}" for path in files}
    assert packed >= {f"byeori/{name}" for name in OTHER_FILES.values()}
    assert {Path(name).suffix or f".{name.rpartition('.')[2]}" for name in packed} <= {
        ".py", ".pyi", ".h", ".md", *OTHER_FILES,
    }  # fmt: skip


def test_it_has_the_licence_the_version_and_the_command(wheel: zipfile.ZipFile) -> None:
    (about,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert about == f"byeori-{byeori.__version__}.dist-info"
    assert wheel.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "byeori = byeori.cli:main" in wheel.read(f"{about}/entry_points.txt").decode()
    metadata = wheel.read(f"{about}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata and "Provides-Extra: demo" in metadata


def test_the_sdist_holds_what_the_tests_and_the_documents_need(built: Path) -> None:
    (path,) = built.glob("byeori-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "pyproject.toml", "LICENSE", "README.md", "README.ko.md", "CHANGELOG.md", "Makefile", "constraints.txt",
        "src/byeori/cli.py", "tests/test_wheel.py", "docs/dpo.ko.md", "examples/colab.ipynb", "scripts/merge.py",
    ):  # fmt: skip
        assert name in names, name
    assert not any("__pycache__" in name or name.startswith(".git/") for name in names)


def test_the_installed_command_trains(built: Path, tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """Installed from the wheel into a folder of its own; its requirements are those of this environment."""
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([*map(str, command)], check=True)

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [site / "bin" / "byeori", *arguments],
            env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    assert run("--version").stdout.split() == ["byeori", byeori.__version__]
    flags = ["--base_model", tiny_model, "--data_path", title_rows, "--output_dir", "out"]
    done = run("sft", *flags, "--cutoff_len", "256", "--max_steps", "1")
    assert done.returncode == 0, done.stderr
    assert "Template title-ko" in done.stderr and (tmp_path / "out" / "adapter_model.safetensors").is_file()
    code = f"import byeori, sys; sys.exit(not byeori.__file__.startswith({str(site)!r}))"
    place = os.environ | {"PYTHONPATH": str(site)}
    assert subprocess.run([sys.executable, "-c", code], env=place, cwd=tmp_path, check=False).returncode == 0
