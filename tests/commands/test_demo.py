"""The demo: its one decision, and its wiring; its steps are the commands, which have tests of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import byeori
from byeori import cli
from byeori.commands import demo


@pytest.mark.parametrize(("speed", "epochs"), [(419e9, 3), (127e9, 1)])
def test_a_slow_processor_trains_one_epoch_and_says_so(
    speed: float, epochs: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(demo, "measured_peak", lambda dtype: speed)
    assert demo._epochs() == epochs
    assert ("One epoch instead of three: this processor reaches 127 GFLOP/s" in capsys.readouterr().err) == (
        epochs == 1
    )


@pytest.fixture
def small_demo(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache where the tiny model lies in the place of the embedded one; the demo's output_dir."""
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_model, tmp_path / "cache" / "gemma-3-270m")
    return tmp_path / "out"


def test_the_demo_runs_every_step_and_prints_its_report(
    small_demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_epochs", lambda: 0.2)  # how many it chooses is tested above
    assert cli.main(["demo", "--output_dir", str(small_demo)]) == 0
    captured = capsys.readouterr()
    told = captured.err
    assert told.startswith(
        "Gemma 3 270M is used under Google's Gemma Terms of Use: https://ai.google.dev/gemma/terms\n"
    )
    said = [
        "[1/5] the embedded model",
        "[2/5] fine-tune",
        "Template title-ko: trains the column 'title'",
        "204 rows to train, 16 held out",
        f"Adapter in {small_demo / 'adapter'}",
        "[3/5] merge",
        f"Merged model in {small_demo / 'merged'}",
        "[4/5] generate",
        "document: ",
        "[5/5] compare",
        "Comparing base and tuned on 44 rows",
        "Finished in ",
    ]
    told = " ".join(told.split())
    places = [told.find(words) for words in said]
    assert -1 not in places and places == sorted(places)
    answer, report = captured.out.rstrip("\n").rsplit("\n", 1)
    assert answer  # of the merged model
    assert report == str(small_demo / "report" / "report.html")
    assert "<html" in Path(report).read_text(encoding="utf-8")
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors", "report/metrics.json"):
        assert (small_demo / name).is_file()
    result = byeori.demo(output_dir=small_demo)  # again, from Python and in the same folder
    assert str(result.report) == report
    assert set(result.metrics) >= {"base", "tuned", "difference"}
