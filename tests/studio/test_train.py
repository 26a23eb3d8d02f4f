"""The screen of training: real runs of a tiny model, which outlive the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from byeori.studio import jobs, runs
from studio_page import meant, studio, wait_for


@pytest.fixture
def folder(tiny_model: Path, title_rows: Path, tmp_path: Path) -> Path:
    shutil.copy(title_rows, tmp_path / "rows.jsonl")
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path


def begin(client: TestClient, **settings: str) -> str:
    client.post("/data-choose", data={"path": "rows.jsonl"})
    client.post("/template-model", data={"base_model": "model"})
    answer = client.post("/plan-keep", data={"command": "sft", "do": "train", **settings})
    assert answer.url.path == "/train", answer.text
    return str(answer.url.params["run"])


def state(client: TestClient, name: str) -> str:
    return runs.named(client.app.state.workspace, name).state


@pytest.mark.own_processes
def test_a_run_outlives_the_page_is_stopped_and_resumed(folder: Path) -> None:
    with studio(folder) as client:
        name = begin(
            client, max_steps="100000", num_epochs="10000", output_dir="out", cutoff_len="512", save_steps="100000"
        )
        wait_for(lambda: runs.named(client.app.state.workspace, name).log.last.get("step", 0) > 2)
        holder = (folder / "out" / ".lock").read_text().split()
        assert os.getsid(int(holder[1])) != os.getsid(0)  # no Ctrl-C and no closed terminal reaches it
    with studio(folder) as client:  # another server, which knows nothing but the folder
        html = client.get("/train").text
        assert "out" in html and 'class="state running"' in html and "train-live?run=out" in html
        assert client.post("/train-resume", data={"run": name}).text.count("runs already") == 1
        assert "is being written" in client.post("/plan-keep", data={"do": "train", "output_dir": "out"}).text
        client.post("/train-stop", data={"run": name})
        wait_for(lambda: state(client, name) == "stopped")
        log = runs.named(client.app.state.workspace, name).log
        step = log.last["step"]
        assert (folder / "out" / f"checkpoint-{step}").is_dir()
        html = client.get("/train", params={"run": name}).text
        assert "Resume" in html and "everything is in" in html and meant(html)[1].max_steps == 100000
        client.post("/train-resume", data={"run": name})
        wait_for(lambda: log.update().last.get("step", 0) > step + 2)
        client.post("/train-stop", data={"run": name})
        wait_for(lambda: state(client, name) == "stopped")
        steps = [json.loads(line)["step"] for line in (folder / "out" / "train_log.jsonl").read_text().splitlines()]
        assert steps == list(range(1, steps[-1] + 1))


def test_a_finished_run_and_a_copy_of_it(folder: Path) -> None:
    with studio(folder) as client:
        name = begin(client, max_steps="3", cutoff_len="512", batch_size="4", val_set_size="0")
        wait_for(lambda: state(client, name) == "done")
        html = client.get("/train", params={"run": name}).text
        assert "step 3 of 3" in html and "<svg" in html and "hx-trigger" not in html.split('id="live"')[1].split(">")[0]
        client.post("/train-duplicate", data={"run": name})
        command, settings = meant(client.get("/plan").text)
        assert (command, settings.max_steps, settings.batch_size) == ("sft", 3, 4)
        assert settings.output_dir != name


def test_a_failed_run_says_why(folder: Path) -> None:
    with studio(folder) as client:
        name = begin(client, max_steps="3", cutoff_len="8")
        wait_for(lambda: state(client, name) == "failed")
        assert "cutoff_len" in client.get("/train", params={"run": name}).text
        assert 'class="state failed"' in client.get("/").text


def test_what_the_command_would_refuse_starts_nothing(folder: Path) -> None:
    with studio(folder) as client:
        client.post("/data-choose", data={"path": "rows.jsonl"})
        assert "--base_model is missing" in client.post("/plan-keep", data={"command": "sft", "do": "train"}).text
        assert not jobs.every(client.app.state.workspace)


def test_runs_of_the_command_line_appear(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "of-a-terminal")
    with studio(tmp_path) as client:
        assert "of-a-terminal" in client.get("/").text
        html = client.get("/train", params={"run": "of-a-terminal"}).text
        assert 'class="state done"' in html and "step 9 of 9" in html
        assert meant(html)[1].max_steps == 12


def test_damaged_files_of_runs_and_jobs_are_shown_or_left_out(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    with (run / "byeori.yaml").open("a", encoding="utf-8") as file:
        file.write('template: "half a pair \\udfff"\nnum_epochs: many\n')
    (run / "report.html").touch()
    (run / "metrics.json").write_text('{"tuned": {"chrf": 1}, "difference": {"chrf": {"mean": "a"}}}', encoding="utf-8")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.html").touch()
    (tmp_path / "other" / "metrics.json").symlink_to("nowhere")
    with (run / "train_log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 10, "loss": 1, "epoch": "a", "learning_rate": [], "peak_memory_bytes": null}\n')
    for name, text in (
        ("plan.json", '{"predicted": {"peak_bytes": []}}'),
        ("audit.json", "[" * 9999),
        ("trackers.json", "5"),
    ):
        (run / name).write_text(text, encoding="utf-8")
    job = tmp_path / ".byeori-studio" / "jobs" / "20260101-000000"
    job.mkdir(parents=True)
    (tmp_path / "judgements.jsonl").write_text("[" * 9999, encoding="utf-8")
    with studio(tmp_path) as client:
        for command in ('"sft"', "{}", "5"):
            (job / "job.json").write_text(f'{{"command": {command}, "output": "run", "started": 1}}', encoding="utf-8")
            for page in ("", "train?run=run", "train-live?run=run", "try?run=run", "compare", "ship?run=run", "plan"):
                assert client.get(f"/{page}").status_code < 500, page


def test_a_run_of_the_command_line_is_stopped(folder: Path) -> None:
    words = ["sft", "model", "rows.jsonl", "--output_dir", "out", "--num_epochs", "10000", "--cutoff_len", "512"]
    process = subprocess.Popen([sys.executable, "-m", "byeori", *words], cwd=folder, stderr=subprocess.DEVNULL)
    try:
        with studio(folder) as client:
            wait_for(lambda: (folder / "out" / "train_log.jsonl").is_file() and state(client, "out") == "running")
            wait_for(lambda: runs.named(client.app.state.workspace, "out").log.last)
            (asked,) = re.findall(r'hx-get="(every[^"]*)"', client.get("/").text)  # its line is as new as the log
            wait_for(lambda: (table := client.get(f"/{asked}")).status_code == 200 and "hx-get" in table.text)
            client.post("/train-stop", data={"run": "out"})
            assert process.wait(60) == 130
            assert state(client, "out") == "stopped"
            assert "hx-get" not in client.get("/every").text
    finally:
        process.kill()


def test_preferences_show_accuracy_and_margin_over_each_other(tmp_path: Path) -> None:
    fixtures = Path(__file__).parents[1] / "fixtures" / "v0_1"
    for name in ("dpo", "sft"):
        shutil.copytree(fixtures / name, tmp_path / name)
    with studio(tmp_path) as client:
        html = client.get("/train", params=[("run", "dpo"), ("with", "sft")]).text
        assert "<b>Accuracy</b>" in html and "<b>Margin</b>" in html and "byeori dpo" in html
        assert html.count("line line-1") >= 2  # the other run's loss and learning rate
        assert client.get("/train", params={"run": "dpo", "with": "../x"}).status_code == 400


def test_nothing_new_is_not_sent_again(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "v0_1" / "sft", tmp_path / "sft")
    with studio(tmp_path) as client:
        from byeori.studio import train

        space = client.app.state.workspace
        version = train.version(runs.named(space, "sft"))
        assert client.get("/train-live", params={"run": "sft", "seen": version}).status_code == 204
        assert client.get("/train-live", params={"run": "sft", "seen": "x"}).status_code == 200


def test_money(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "v0_1" / "sft", tmp_path / "sft")
    with studio(tmp_path) as client:
        client.post("/train-price", data={"run": "sft", "usd_per_hour": "3600000"})
        assert "cost so far" not in client.get("/train", params={"run": "sft"}).text  # no such price
        client.post("/train-price", data={"run": "sft", "usd_per_hour": "3600"})
        lines = (tmp_path / "sft" / "train_log.jsonl").read_text().splitlines()
        seconds = sum(json.loads(line).get("seconds", 0) for line in lines)
        assert f"${seconds:.2f}" in client.get("/train", params={"run": "sft"}).text
        assert "is no price" in client.post("/train-price", data={"run": "sft", "usd_per_hour": "cheap"}).text
