"""`byeori audit` on a tiny model that learned a rule: planted mistakes, copies and leaks are found, nothing else."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import byeori
from byeori import cli
from byeori.errors import CheckpointError, ConfigError, DataError
from byeori.support import language
from tiny_models import byte_level_tokenizer, short_sft, tiny_llama

ANSWERS = {"x": "A", "y": "B", "z": "C"}  # a question's last letter decides
WRONG = (17, 44)
RUN: dict[str, Any] = {
    "template": "{question}{answer}", "batch_size": 24, "num_epochs": 60, "max_steps": 60, "learning_rate": 1e-2,
    "lora_target_modules": "all-linear", "lora_r": 16, "warmup_steps": 5,
}  # fmt: skip


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def made(count: int, seed: int) -> list[dict[str, str]]:
    drawn = random.Random(seed)
    letters = [list(ANSWERS)[row % 3] for row in range(count)]
    return [{"question": f"{drawn.randrange(10**6)} {letter}", "answer": ANSWERS[letter]} for letter in letters]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that learned the rule from right rows."""
    folder = tmp_path_factory.mktemp("audited")
    tokenizer = byte_level_tokenizer()
    tiny_llama(len(tokenizer), initializer_range=0.6).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return short_sft(folder / "model", write(folder / "rows.jsonl", made(144, 1)), folder / "adapter", **RUN)


def test_wrong_answers_and_near_copies_are_found(learned: Path, tmp_path: Path) -> None:
    rows = made(60, 2)
    for row in WRONG:
        rows[row]["answer"] = "A"
    text = "the council of the district decided the plan for the new library and its cost in the coming year x"
    rows += [{"question": text, "answer": "A"}, {"question": text.replace("coming", "next"), "answer": "nothing of it"}]
    rows += [rows[3]]
    test = [{"question": text.upper(), "answer": "A"}, *made(5, 3)]
    files = {"data_path": write(tmp_path / "rows.jsonl", rows), "test": write(tmp_path / "test.jsonl", test)}
    result = byeori.audit(adapter=learned, output_dir=tmp_path / "audit", dtype="float32", **files)
    found = result.found
    wrong = [f"rows.jsonl line {row + 1}" for row in WRONG]
    assert set(wrong) <= {item["row"] for item in found["contradicted"]}
    assert {item["row"] for item in found["contradicted"]} <= {*wrong, "rows.jsonl line 61", "rows.jsonl line 62"}
    assert [item["rows"] for item in found["different_answers"]] == [["rows.jsonl line 61", "rows.jsonl line 62"]]
    assert found["copies"] == 1 and found["test_rows"] == 6
    assert [(item["test_row"], item["row"], item["same_answer"]) for item in found["leaked"]] == [
        ("test.jsonl line 1", "rows.jsonl line 61", True)
    ]
    lines = [json.loads(line) for line in result.rows.read_text(encoding="utf-8").splitlines()]
    assert [line["columns"] for line in lines] == rows
    assert "contradicted" in lines[WRONG[0]]["found"] and "leaked" in lines[60]["found"]
    assert lines[60]["near_copies"] == ["rows.jsonl line 62"] and lines[1]["near_copies"] == []
    assert json.loads(result.file.read_text(encoding="utf-8")) == found


def test_the_rows_of_the_run_are_audited_with_the_losses_of_compare(
    trained: Path, title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", str(trained), "--output_dir", str(tmp_path / "audit"), "--dtype", "float32"]) == 0
    said = capsys.readouterr().err
    assert "24 rows; the mean loss of their answers is " in said
    given: dict[str, Any] = {"adapter": trained, "max_new_tokens": 1, "dtype": "float32", "few_shots": 0}
    compared = byeori.compare(**given, data_path=title_rows, output_dir=tmp_path / "report")
    found = json.loads((tmp_path / "audit" / "audit.json").read_text(encoding="utf-8"))
    for side in ("base", "tuned"):
        assert found[f"{side}_loss"] == pytest.approx(compared.metrics[side]["loss"], abs=1e-3)
    assert len(said.splitlines()) < 24


def test_pairs_are_audited_by_the_loss_of_their_margin(tiny_model: Path, tmp_path: Path) -> None:
    pairs = [
        {"question": f"{row} 구청은 {word}을 지었나", "chosen": f"{word}을 지었다", "rejected": "아니다"}
        for row, word in enumerate(["도서관", "공원", "수영장", "학교", "병원", "시장", "극장", "역", "다리"])
    ]
    rows = write(tmp_path / "pairs.jsonl", pairs)
    adapter = tmp_path / "adapter"
    given: dict[str, Any] = {"template": "{question}{answer}", "dtype": "float32", "max_steps": 1}
    byeori.dpo(base_model=tiny_model, data_path=rows, output_dir=adapter, cutoff_len=512, **given)
    found = byeori.audit(adapter=adapter, output_dir=tmp_path / "audit", dtype="float32").found
    report = {"max_new_tokens": 1, "dtype": "float32", "few_shots": 0}
    byeori.compare(adapter=adapter, data_path=rows, output_dir=tmp_path / "report", **report)
    lines = (tmp_path / "report" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    for side in ("base", "tuned"):
        margins = np.array([json.loads(line)[side]["preference_margin"] for line in lines])
        assert found[f"{side}_loss"] == pytest.approx(float(np.logaddexp(0, -margins).mean()), abs=2e-3)


def test_every_line_has_its_korean(learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(tmp_path / "rows.jsonl", [*made(60, 2), {"question": "1 x", "answer": "C"}, *made(1, 2)])
    given = [str(learned), str(rows), "--output_dir", str(tmp_path / "a"), "--test", str(rows), "--dtype", "float32"]
    language.use("ko")
    try:
        assert cli.main(["audit", *given]) == 0
    finally:
        language.use(None)
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("Los", "Look", "Load"))]
    assert len(said) > 4 and all(re.search("[가-힣]", line) for line in said), said


def test_errors_are_sentences(trained: Path, title_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is the folder of a run; choose another"):
        byeori.audit(adapter=trained, output_dir=trained)
    with pytest.raises(DataError, match="there is no file"):
        byeori.audit(adapter=trained, output_dir=tmp_path / "a", test=tmp_path / "tst.jsonl")
    with pytest.raises(ConfigError, match="--dataset_split is about data_path"):
        byeori.audit(adapter=trained, output_dir=tmp_path / "a", dataset_split="test")
    moved = shutil.copytree(trained, tmp_path / "moved")
    settings = (moved / "byeori.yaml").read_text(encoding="utf-8")
    (moved / "byeori.yaml").write_text(settings.replace(str(title_rows), "gone.jsonl"), encoding="utf-8")
    with pytest.raises(DataError, match="was trained on are not here, or it does not record them; name them with"):
        byeori.audit(adapter=moved, output_dir=tmp_path / "a")
    assert not (tmp_path / "a").exists()
