"""The screens of comparisons and of what leaves, with the commands themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from byeori.studio import jobs
from byeori.studio.compare import verdict_of
from studio_page import meant, studio, wait_for


@pytest.fixture
def page(trained: Path, title_rows: Path, tmp_path: Path) -> Iterator[TestClient]:
    shutil.copytree(trained, tmp_path / "tuned")
    shutil.copy(title_rows, tmp_path / "my test rows.jsonl")
    with studio(tmp_path, models=(trained.parents[1],)) as client:
        yield client


def done(client: TestClient, command: str, state: str = "done") -> jobs.Job:
    job = wait_for(lambda: (job := jobs.latest(client.app.state.workspace, command)) and job.state != "running" and job)
    assert job.state == state, job.tail()
    return job


def test_it_compares_and_shows_the_report(page: TestClient, tmp_path: Path) -> None:
    html = page.get("/compare").text
    command, settings = meant(html)
    assert command == "compare" and settings.adapter == ["tuned"] and settings.data_path == ["my test rows.jsonl"]
    given = {
        "adapter": "tuned",
        "data_path": "my test rows.jsonl",
        "max_new_tokens": "4",
        "max_rows": "4",
        "few_shots": "0",
    }
    answer = page.post("/compare-start", data=given)
    assert 'class="error"' not in answer.text, answer.text
    job = done(page, "compare")
    assert job.settings()["max_rows"] == 4 and job.output == "report-1"
    html = page.get("/compare").text
    assert "compare-report?folder=report-1" in html and "sandbox=" in html
    report = page.get("/compare-report", params={"folder": "report-1"})
    assert report.headers["content-security-policy"].startswith("sandbox allow-scripts")
    assert report.text == (tmp_path / "report-1" / "report.html").read_text(encoding="utf-8")
    metrics = json.loads((tmp_path / "report-1" / "metrics.json").read_text())
    assert f"{metrics['tuned']['loss']:.3f}" in html
    assert "4개 행" in verdict_of(metrics, "ko") and "4 rows" in verdict_of(metrics, "en")
    assert meant(html)[1].output_dir == "report-2"
    page.post("/compare-start", data=given | {"max_rows": "3"})
    done(page, "compare")
    html = page.get("/compare").text
    assert html.count("compare?report=report-") == 2  # against each other
    page.post("/compare-start", data=given | {"max_rows": "3", "fail_unless": "'rows > 1000'"})
    done(page, "compare", "gate not met")
    html = page.get("/compare").text
    assert 'class="state gate not met"' in html and "does not meet --fail-unless: rows" in html
    assert html.count("compare?report=report-") == 3  # its report is there all the same


def test_a_report_of_elsewhere_is_not_shown(page: TestClient) -> None:
    for folder in ("/etc", "..", "nothing"):
        assert page.get("/compare-report", params={"folder": folder}).status_code == 400
    assert page.get("/compare", params={"report": "../x"}).status_code == 400


def test_what_is_wrong_is_said_and_starts_nothing(page: TestClient) -> None:
    assert (
        "there is no file none.jsonl"
        in page.post("/compare-start", data={"adapter": "tuned", "data_path": "none.jsonl"}).text
    )
    assert "--max_new_tokens" in page.post("/compare-start", data={"adapter": "tuned", "max_new_tokens": "0"}).text
    assert "is outside" in page.post("/ship-merge", data={"peft_model_path": "tuned", "output_dir": "/tmp/x"}).text
    assert "repo_id is missing" in page.post("/ship-publish", data={"folder": "tuned"}).text
    assert not jobs.every(page.app.state.workspace)


def test_it_merges_exports_and_rehearses_publishing(page: TestClient, tmp_path: Path) -> None:
    assert meant(page.get("/ship", params={"do": "merge"}).text)[1].peft_model_path == "tuned"
    page.post("/ship-merge", data={"peft_model_path": "tuned"})
    done(page, "merge")
    html = page.get("/ship", params={"do": "merge"}).text
    assert "merged-1" in html and "What its check found" in html and (tmp_path / "merged-1" / "config.json").is_file()
    command, settings = meant(page.get("/ship", params={"do": "export"}).text)
    assert command == "export" and settings.model == "merged-1" and settings.format == "gguf"
    command, settings = meant(page.get("/ship", params={"do": "serve"}).text)
    assert command == "serve" and settings.model == "merged-1"
    page.post("/ship-export", data={"model": "merged-1", "format": "vllm", "check": "off"})
    done(page, "export")
    assert "export-1" in page.get("/ship", params={"do": "export"}).text
    page.post("/ship-publish", data={"folder": "merged-1", "repo_id": "me/titles"})
    done(page, "publish")
    html = page.get("/ship", params={"do": "publish"}).text
    assert "What it printed" in html and "library_name: transformers" in html
    assert meant(html)[1].dry_run


def test_the_home_screen_offers_a_first_run(page: TestClient) -> None:
    command, settings = meant(page.get("/").text)
    assert command == "demo" and settings.output_dir == "first-run"
