"""Conditions of a comparison: what they mean, what is wrong with one, and the exit code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import byeori
import forks
from byeori.errors import ConfigError, GateError
from byeori.evaluate import baselines, gate

NAMES = ["chrf", "loss", "my_module:score", "retention.loss"]
METRICS: dict[str, Any] = {
    "rows": 40,
    "base": {"chrf": 20.0, "loss": 3.0, "my_module:score": None},
    "tuned": {"chrf": 31.0, "loss": 2.0, "my_module:score": None},
    "difference": {
        "chrf": {"mean": 11.0, "low": 8.0, "high": 14.0},
        "loss": {"mean": -1.0, "low": -1.5, "high": -0.5},
        "my_module:score": {"mean": None, "low": None, "high": None},
    },
    "retention": {"difference": {"loss": {"mean": 0.02, "low": 0.01, "high": 0.04}}},
    "baselines": [{"name": "copy", "lead": {"chrf": {"mean": 2.0, "low": -1.0, "high": 5.0}}}],
    "findings": [{"undermines": True}, {"undermines": False}],
}


def failed(*texts: str) -> str:
    try:
        gate.check(gate.parse(texts, NAMES, baselines.NAMES), METRICS)
    except GateError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "text",
    [
        "chrf.low > 0",
        "chrf.low>=8",
        "  chrf.mean == 11.0 ",
        "chrf.tuned > 3.05e1",
        "loss.high < -.4",
        "loss.base != 2",
        "retention.loss.high < 0.05",
        "lead.copy.chrf.high > 0",
        "doubts <= 1",
        "rows >= 40",
    ],
)
def test_conditions_that_are_met(text: str) -> None:
    assert failed(text) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("chrf.low > 8", "chrf.low > 8 (the number is 8)"),
        ("retention.loss.high < 0.03", "retention.loss.high < 0.03 (the number is 0.04)"),
        ("lead.copy.chrf.low > 0", "lead.copy.chrf.low > 0 (the number is -1)"),
        ("lead.few_shots.chrf.low > 0", "lead.few_shots.chrf.low > 0 (not measured)"),
        ("my_module:score.low > 0", "my_module:score.low > 0 (not measured)"),
        ("doubts == 0", "doubts == 0 (the number is 1)"),
    ],
)
def test_conditions_that_are_not(text: str, shown: str) -> None:
    assert failed("rows > 1", text) == f"the comparison does not meet --fail-unless: {shown}"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "chrf.lo > 0",
            "'chrf.lo' is not a number of the comparison (did you mean low?); give one of chrf.low,",
        ),
        ("chrf > 0", "'chrf' is not a number of the comparison"),
        ("chr.low > 0", "there is no measure 'chr' (did you mean chrf?)"),
        ("lead.cpy.chrf.low > 0", "there is no baseline 'cpy' (did you mean copy?)"),
        ("lead.copy.chrf.base > 0", "of a lead there are low, mean and high, and no 'base'"),
        ("chrf.low", "is no condition; write one such as 'chrf.low > 0'"),
        ("chrf.low > loss.low", "is no condition"),
        ("__import__('os').system('x') > 0", "is not a number of the comparison"),
        ("chrf.low => 0", "'chrf.low =' is not a number"),
    ],
)
def test_conditions_that_cannot_be_read(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        gate.parse([text], NAMES, baselines.NAMES)
    assert sentence in str(error.value)


def test_the_exit_code_is_3_and_the_report_is_there(trained: Path, title_rows: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(trained, tmp_path / "adapter")
    command = ["-m", "byeori", "compare", adapter, title_rows, "--output_dir", tmp_path / "report"]
    command += ["--max_rows", "6", "--max_new_tokens", "4", "--few_shots", "0", "--dtype", "float32"]
    command += ["--fail-unless", "rows >= 6", "--fail-unless", "chrf.low > 99"]
    done = forks.run(*command)
    assert done.returncode == 3, done.stderr
    assert "error: the comparison does not meet --fail-unless: chrf.low > 99 (the number is " in done.stderr
    assert "Traceback" not in done.stderr and (tmp_path / "report" / "report.html").is_file()
    with pytest.raises(GateError, match=r"chrf\.low > 99"):
        byeori.publish(folder=adapter, repo_id="user/name", dry_run=True, fail_unless="chrf.low > 99")
    with pytest.raises(ConfigError, match="about general rows; give byeori compare --retention FILE"):
        gate.parse(["retention.loss.high < 1"], ["chrf"])
    with pytest.raises(ConfigError, match="there is no measure 'label'"):
        byeori.publish(folder=adapter, repo_id="user/name", dry_run=True, fail_unless=["label.low > 0"])
    assert byeori.publish(folder=adapter, repo_id="user/name", dry_run=True, fail_unless="rows == 6").dry_run
    (adapter / "metrics.json").unlink()
    with pytest.raises(ConfigError, match="run byeori compare"):
        byeori.publish(folder=adapter, repo_id="user/name", dry_run=True, fail_unless="rows == 6")


def test_conditions_are_read_before_anything_is_computed(trained: Path, title_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no measure 'chrff'"):
        byeori.compare(adapter=trained, data_path=title_rows, output_dir=tmp_path / "o", fail_unless="chrff.low > 0")
    assert not (tmp_path / "o").exists()
