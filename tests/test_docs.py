"""The pages around the code: they build, link to each other, and name what exists."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def test_links_in_the_documents_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_user_page_exists_in_both_languages() -> None:
    only_english = {"contributing.md", "objective.md"}
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    english = {name for name in pages if not name.endswith(".ko.md")} - only_english
    assert {name.replace(".ko.md", ".md") for name in pages if name.endswith(".ko.md")} == english


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    place = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    for name in ("index.html", "settings/index.html", "contributing/index.html", "ko/index.html", "ko/dpo/index.html"):
        assert (tmp_path / "site" / name).is_file(), name
    assert not (tmp_path / "site" / "hooks.py").exists()


def test_the_objective_of_the_page_trains(
    tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").symlink_to(title_rows)
    page = (ROOT / "docs" / "objective.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)).replace('"MODEL"', repr(str(tiny_model)))
    exec(compile(code.replace('"max_steps": 2', '"max_steps": 2, "cutoff_len": 256'), "objective.md", "exec"), {})
    lines = (tmp_path / "even" / "train_log.jsonl").read_text().splitlines()
    assert ["likely" in json.loads(line) for line in lines][:2] == [True, True]


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": (\S+\.md)$", text, re.MULTILINE))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md") if not path.name.endswith(".ko.md")}


def test_the_repository_has_one_address() -> None:
    """The one in pyproject.toml; whoever moves the project replaces it everywhere or hears of it here."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    home = urls["Repository"].removeprefix("https://github.com/")
    files = [*PAGES, ROOT / "pyproject.toml", ROOT / "mkdocs.yml", ROOT / "examples" / "colab.ipynb"]
    files += (ROOT / ".github").rglob("*.yml")
    for path in files:
        found = re.findall(r"(?:github\.com|colab\.research\.google\.com/github)/([\w-]+/byeori\b)", path.read_text())
        assert set(found) <= {home}, path.name


def test_security_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", text)
    assert len(named) > 10
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"
    promises = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| promise ")]
    for promise in promises:
        files = re.findall(r"`(tests/[\w/]+\.py)", promise.rsplit("|", 2)[1])
        assert files and all((ROOT / file).is_file() for file in files), promise


def test_contributing_names_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:src|tests|docs|benchmarks|\.github)/\S+\.\w+)`", text):
        assert (ROOT / name).is_file(), name
    map_ = {name for line in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)/`", line)}
    assert map_ == {path.name for path in (ROOT / "src" / "byeori").iterdir() if (path / "__init__.py").is_file()}


def test_the_changelog_has_the_version() -> None:
    from byeori import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_workflows_and_issue_forms_are_yaml() -> None:
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "permissions", "jobs"} <= set(workflow)
    for name in ("bug.yml", "feature.yml"):
        form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form)
        ids = [item["id"] for item in form["body"]]
        assert len(ids) == len(set(ids)) and all(item["attributes"]["label"] for item in form["body"])
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}, "trusted publishing, no token"
