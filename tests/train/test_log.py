"""What a run says while it goes on: the live line, on a terminal and elsewhere, and every field of the log."""

from __future__ import annotations

import json
import os
import pty
import re
from pathlib import Path
from typing import Any

import pytest

import byeori
import forks
from byeori.train import log as run_log
from runs import environment, flags, log, settings, sft
from tiny_models import sample_rows

DOCS = Path(__file__).parents[2] / "docs"
SOMETIMES = {"skipped_rows", "micro_batches_halved"}
NUMBERS = r"loss (\S+)  lr (\S+)  (\S+) tokens/s  (\S+) GiB"


def numbers(found: tuple[str, ...]) -> list[float]:
    return [float(text.replace(",", "")) for text in found]


def expected(line: dict[str, Any]) -> list[Any]:
    """Loss, learning rate, tokens a second and GiB of a log line, as exact as they are shown."""
    values = (line["loss"], line["learning_rate"], line["tokens"] / line["seconds"], line["peak_memory_bytes"] / 2**30)
    digits = (5e-5, 5e-3 * line["learning_rate"] + 1e-12, 0.5, 0.05)
    return [pytest.approx(value, abs=shown * 1.001) for value, shown in zip(values, digits, strict=True)]


# ---- the live line -----------------------------------------------------------------------------------------------


def test_without_a_terminal_lines_show_the_logs_numbers(
    tiny_model: Path, title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft(tiny_model, title_rows, tmp_path / "out", max_steps=5)
    told, lines = capsys.readouterr().err, log(tmp_path / "out")
    shown = re.findall(rf"^step (\d+)/5  {NUMBERS}  (\d+\.\d) min left$", told, re.MULTILINE)
    assert [int(line[0]) for line in shown] == [1, 5]  # the first and the last; between them after ten seconds
    for line in shown:
        assert numbers(line[1:5]) == expected(lines[int(line[0]) - 1])
    assert shown[-1][5] == "0.0"


def test_on_a_terminal_the_picture_moves(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """`byeori sft` on a pseudo-terminal: its last state is the last line of the log."""
    near, far = pty.openpty()
    words = flags(settings(tiny_model, title_rows, tmp_path / "out"))
    env = environment() | {"TERM": "xterm", "COLUMNS": "140"}
    process = forks.start("-m", "byeori", "sft", *words, env=env, stdio=(far, far, far))
    os.close(far)
    told = b""
    try:
        while part := os.read(near, 65536):
            told += part
    except OSError:  # how Linux says that the other side has closed
        pass
    os.close(near)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told.decode())
    assert process.wait(timeout=60) == 0, text
    last = log(tmp_path / "out")[-1]
    (loss,) = re.findall(r"last (\S+)", text)[-1:]
    assert float(loss) == pytest.approx(last["loss"], abs=1e-4)
    assert re.findall(r"step +(\d+)/12", text)[-1] == "12" and re.search("[▁▂▃▄▅▆▇█]{12}", text)
    for words in ("Epoch", "Loss", "Speed", "tokens per second", "Peak memory", "left"):
        assert words in text, words
    assert "min left" not in text  # not the plain lines as well


# ---- the log -----------------------------------------------------------------------------------------------------


def documented(page: str) -> list[str]:
    table = (DOCS / page).read_text(encoding="utf-8").split("<!-- log -->")[1].split("<!-- /log -->")[0]
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


def test_both_languages_document_the_same_fields() -> None:
    assert documented("how-it-works.md") == documented("how-it-works.ko.md")
    assert set(documented("how-it-works.md")) >= SOMETIMES


def test_every_line_has_every_documented_field(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    sft(tiny_model, title_rows, tmp_path / "out", val_set_size=4, eval_steps=2, max_steps=5)
    always = [name for name in documented("how-it-works.md") if name not in SOMETIMES]
    lines = log(tmp_path / "out")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    for line in steps:
        assert list(line) == always
        assert all(type(value) in (int, float) for value in line.values())
        assert line["rows"] == 4 and 0 < line["target_tokens"] < line["unique_tokens"] <= line["tokens"]
        assert line["seconds"] > 0 and line["peak_memory_bytes"] > 2**20 and line["grad_norm"] > 0
    evaluated = [line for line in lines if "loss" not in line]
    assert [list(line) for line in evaluated] == [["step", "epoch", "eval_loss"]] * 3
    assert [line["step"] for line in evaluated] == [2, 4, 5]


@pytest.mark.parametrize("page", ["dpo.md", "dpo.ko.md"])
def test_preference_lines_have_their_documented_fields_as_well(
    page: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "pairs.jsonl"
    rows = [row | {"chosen": row["chosen"][:12]} for row in sample_rows("preference-ko.jsonl")[:8]]
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    values = settings(tiny_model, data, tmp_path / "out", cutoff_len=400, max_steps=1, val_set_size=4)
    byeori.dpo(**values)
    text = (DOCS / page).read_text(encoding="utf-8")
    paragraph = next(part for part in text.split("\n\n") if "train_log.jsonl" in part)
    own = set(re.findall(r"`(\w+)`", paragraph)) - {"eval_"}
    always = {name for name in documented("how-it-works.md") if name not in SOMETIMES}
    trained, evaluated = log(tmp_path / "out")
    assert set(trained) == own | always
    assert set(evaluated) == {"step", "epoch", "eval_loss"} | {f"eval_{name}" for name in own}


def test_what_is_no_line_of_a_run_is_left_out(tmp_path: Path) -> None:
    """Of another program, or damaged: what is shown, summed and compared afterwards are numbers."""
    step = {"step": 1, "loss": 2.5, "epoch": 1, "learning_rate": 0.1, "tokens": 9, "seconds": 1, "peak_memory_bytes": 5}
    answers = [{"name": "row 1", "prompt": "a", "reference": "b", "answer": "c"}]
    lines = [
        step | {"x": {"y": 1}},
        {"step": 1, "samples": answers},
        {"step": 1, "epoch": 1, "samples": [*answers, "a"]},
        {"step": 2, "loss": 2.5},
        {"step": "1"},
        {"loss": 1},
        {"step": None},
        [1],
        3,
    ]
    lines += [{"step": 2, "loss": "low", "tokens": 10**40, "skipped_rows": 7, "epoch": None}, {"step": True}]
    (tmp_path / "train_log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + "{", encoding="utf-8"
    )
    assert run_log.read(tmp_path) == [
        step, {"step": 1, "samples": answers}, {"step": 1, "epoch": 1}, {"step": 2, "epoch": None},
    ]  # fmt: skip
