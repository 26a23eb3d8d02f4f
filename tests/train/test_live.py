"""What a run shows: the numbers, the sparkline, plain lines, and live.html."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from byeori.errors import ConfigError
from byeori.support.atomic_files import sha256
from byeori.train import live
from byeori.train.live import Display, Live, LivePage, Seen, sparkline
from runs import log, sft

LINE = {"loss": 1.0, "learning_rate": 1e-4, "tokens": 100, "seconds": 0.5, "peak_memory_bytes": 2**30, "epoch": 0.5}


def seen_of(*losses: float, total: int = 10, **more: Any) -> Seen:
    seen = Seen(total=total, epochs=2, **more)
    for step, loss in enumerate(losses, 1):
        seen.add(LINE | {"step": step, "loss": loss})
    return seen


def test_time_left_is_that_of_the_steps_of_this_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed after 4 of 10 steps; two more took a minute, so four more take two."""
    clock = [1000.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    seen = seen_of()
    with Live(seen, start=4, shown=True) as terminal:
        clock[0] += 60
        seen.add(LINE | {"step": 6})
        terminal.update()
        clock[0] += 9
        seen.add(LINE | {"step": 7})
        terminal.update()  # too early for another line
    told = capsys.readouterr().err
    assert told == "step 6/10  loss 1.0000  lr 1.00e-04  200 tokens/s  1.0 GiB  2.0 min left\n"


def test_other_processes_show_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with Display(seen_of(total=2), tmp_path, title="run", start=0, shown=False) as display:
        display.step(LINE | {"step": 2})
        display.say("words")
        display.note({"step": 2, "samples": [{"name": "row 1", "answer": "text"}]})
    captured = capsys.readouterr()
    assert captured.err == captured.out == "" and not list(tmp_path.iterdir())


def test_plain_lines_of_pairs_have_accuracy_and_margin() -> None:
    assert "accuracy 75%  margin 0.250" in live.plain(LINE | {"accuracy": 0.75, "margin": 0.25})


def test_sparkline_by_hand() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([3, 3, 3]) == "▁▁▁" and sparkline([]) == ""
    assert sparkline([4, 2, 0, 0], width=2) == "█▁"  # means of neighbours: 3 and 0
    assert len(sparkline(list(range(1000)))) == 32


def test_the_facts_by_hand() -> None:
    seen = seen_of(*[4.0] * 5, *[1.0, 2.0, 3.0, 4.0, 5.0], planned=2**31)
    seen.add({"step": 5, "eval_loss": 1.5, "eval_accuracy": 0.6, "eval_margin": 0.1})
    seen.add({"step": 10, "eval_loss": 1.75, "eval_accuracy": 0.8, "eval_margin": 0.2})
    facts = {name: (value, beside) for name, value, beside in seen.facts()}
    assert facts["Loss"] == ("3.0000", "smoothed; last 5.0000")
    assert facts["Evaluation loss"] == ("1.7500", "best 1.5000 at step 5")
    assert facts["Evaluation accuracy"] == ("80%", "margin 0.200")
    assert facts["Epoch"] == ("0.50", "of 2") and facts["Speed"] == ("200", "tokens per second")
    assert facts["Peak memory"] == ("1.0 GiB", "2.0 GiB planned")


def test_lines_of_a_run_that_is_resumed_may_lack_numbers_and_answers(tmp_path: Path) -> None:
    """Null stands for what was not finite, and there were fewer rows to answer before."""
    sample = {"name": "row 1", "prompt": "question", "reference": "right", "answer": "told"}
    earlier = [
        LINE | {"step": 3, "loss": None, "grad_norm": None},
        {"step": 3, "eval_loss": None},
        {"step": 3, "samples": []},
        {"step": 3, "samples": [sample]},
    ]
    with Display(seen_of(1.0, 2.0), tmp_path, title="run", start=3, shown=True, earlier=earlier):
        pass
    assert "told" in (tmp_path / "live.html").read_text(encoding="utf-8")


def test_a_long_run_keeps_few_losses_and_their_shape() -> None:
    seen = seen_of(*[float(step % 2) for step in range(20_000)], total=20_000)
    assert 1_000 < len(seen.points) <= 4_000 and seen.points[-1][0] >= 19_990
    assert seen.smoothed == pytest.approx(0.5, abs=0.01)


def test_the_page_refreshes_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    seen = seen_of(3.0, 2.0)
    with LivePage(tmp_path, seen, title="<b>run</b>", shown=True) as page:
        page.update()
        path = tmp_path / "live.html"
        first = path.read_text(encoding="utf-8")
        assert "location.reload()" in first and "step 2 of 10" in first
        assert "&lt;b&gt;run&lt;/b&gt;" in first and first.count("<script") == 1 and "Training loss from 3.000" in first
        seen.add(LINE | {"step": 3})
        page.update()  # too early
        assert path.read_text(encoding="utf-8") == first
        clock[0] += 6
        seen.add(
            {"step": 3, "samples": [{"name": "row 7", "prompt": "질문", "reference": "답", "answer": "</div>응답"}]}
        )
        page.update()
        assert "step 3 of 10" in (text := path.read_text(encoding="utf-8")) and "&lt;/div&gt;응답" in text
    last = path.read_text(encoding="utf-8")
    assert "<script" not in last and "finished: step 3" in last


def test_samples_are_answered_and_change_nothing(
    tiny_model: Path, title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"max_steps": 4, "val_set_size": 4, "eval_steps": 2}
    sft(tiny_model, title_rows, tmp_path / "with", sample_rows=3, **options)
    told = capsys.readouterr().err
    sft(tiny_model, title_rows, tmp_path / "without", **options)
    name = "adapter_model.safetensors"
    assert sha256(tmp_path / "with" / name) == sha256(tmp_path / "without" / name)
    found = [line for line in log(tmp_path / "with") if "samples" in line]
    assert [line["step"] for line in found] == [2, 4]
    assert [sorted(sample) for sample in found[0]["samples"]] == [["answer", "name", "prompt", "reference"]] * 3
    titles = {json.loads(line)["title"] for line in title_rows.read_text(encoding="utf-8").splitlines()}
    assert {sample["reference"] for sample in found[0]["samples"]} <= titles
    assert re.search(r"  \S*titles.jsonl line \d+: ", told)
    assert "Sample answers at step 4" in (tmp_path / "with" / "live.html").read_text(encoding="utf-8")


def test_samples_need_rows_that_are_held_out(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sample_rows needs rows to evaluate on"):
        sft(tiny_model, title_rows, tmp_path / "out", sample_rows=3)
