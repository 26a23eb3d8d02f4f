"""Forgetting: the losses on general rows equal those of a comparison of these rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import byeori
from byeori.evaluate.verdict import retention_sentence


def test_general_rows_are_measured_beside_the_gain(trained: Path, title_rows: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"adapter": trained, "max_new_tokens": 2, "dtype": "float32", "few_shots": 0}
    general = tmp_path / "general.jsonl"
    rows = [json.loads(line) for line in title_rows.read_text(encoding="utf-8").splitlines()[10:20]]
    asked = [{"question": row["document"], "answer": row["title"]} for row in rows]
    general.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked), encoding="utf-8")
    limits = ["retention.loss.low > -100", "retention.loss.base > 0"]
    result = byeori.compare(
        **given, data_path=title_rows, max_rows=6, output_dir=tmp_path / "a", retention=general, fail_unless=limits
    )
    alone = byeori.compare(**given, data_path=general, template="question-answer", output_dir=tmp_path / "b")
    found = result.metrics["retention"]
    assert found["rows"] == 10
    for side in ("base", "tuned"):
        assert found[side]["loss"] == pytest.approx(alone.metrics[side]["loss"], rel=1e-5)
    assert found["difference"]["loss"] == pytest.approx(alone.metrics["difference"]["loss"], rel=1e-4)
    assert "On 10 general rows the loss " in result.verdict
    with pytest.raises(byeori.ConfigError, match=r"retention\.loss"):
        byeori.compare(**given, data_path=title_rows, output_dir=tmp_path / "c", fail_unless="retention.loss.high < 1")
    with pytest.raises(byeori.DataError, match="there is no file"):
        byeori.compare(**given, data_path=title_rows, output_dir=tmp_path / "c", retention=tmp_path / "generl.jsonl")


def test_sentences() -> None:
    def said(low: float, high: float, rows: int = 40) -> str:
        mean = (low + high) / 2
        return retention_sentence({"rows": rows, "difference": {"loss": {"mean": mean, "low": low, "high": high}}})

    assert said(0.1, 0.3) == (
        "On 40 general rows the loss rose by 0.200 (95% interval 0.100 to 0.300): the tuned model forgot some of what "
        "the base knew."
    )
    assert said(-0.3, -0.1) == "On 40 general rows the loss fell by 0.200 (95% interval 0.100 to 0.300)."
    assert said(-0.1, 0.1) == "On 40 general rows the loss did not clearly change (95% interval -0.100 to +0.100)."
    assert said(0.1, 0.3, rows=3).startswith("On 3 general rows nothing can be said")
