"""A log of any length as curves of bounded size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from byeori.studio.log_curves import CURVES, Log, Series, last_step, log_of
from byeori.studio.train import CHARTS


def line(step: int, **more: object) -> str:
    return (
        json.dumps({"step": step, "epoch": step / 100, "loss": 5 / step, "seconds": 0.5, "tokens": 100, **more}) + "\n"
    )


def test_buckets_are_means_of_neighbours() -> None:
    values = np.random.default_rng(0).normal(size=6000)
    series, at = Series(), 0
    for count in [1, 2, 500, 20, *[97] * 50]:  # as they come
        series.extend(range(at + 1, at + count + 1), values[at : at + count].tolist())
        at += count
    values = values[:at]
    assert 256 <= len(series.buckets) <= 512 and series.width == 16
    expected = [values[at : at + 16].mean() for at in range(0, len(values), 16)]
    assert np.allclose([value for _, value in series.points()], expected)
    assert series.range() == (values.min(), values.max())


def test_only_new_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "train_log.jsonl"
    path.write_text("".join(map(line, range(1, 101))), encoding="utf-8")
    log = Log(path)
    before = log.update().version
    assert log.lines == 100 and log.seconds == 50 and log.last["step"] == 100
    with path.open("a", encoding="utf-8") as file:
        file.write(line(101) + '{"step": 102, "lo')  # half a line
    assert log.update().lines == 101 and log.version != before
    with path.open("a", encoding="utf-8") as file:
        file.write('ss": 1.0}\n')
    assert log.update().lines == 102 and log.last["loss"] == 1.0
    assert log.update().version == log.version


def test_a_resumed_run_starts_its_log_anew(tmp_path: Path) -> None:
    path = tmp_path / "train_log.jsonl"
    path.write_text("".join(map(line, range(1, 101))), encoding="utf-8")
    log = log_of(path)
    new = tmp_path / "new"
    new.write_text("".join(map(line, range(1, 41))), encoding="utf-8")
    new.replace(path)
    assert log_of(path) is log and log.lines == 40 and log.last["step"] == 40 and log.seconds == 20


def test_nonsense_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "train_log.jsonl"
    deep = "[" * 5000
    path.write_text(
        f'{deep}\n[]\n\n"x"\n{{"step": "one"}}\n{{"step": 1, "loss": null, "seconds": NaN}}\n'
        f'[1\n2]\n{{"step": 1{"0" * 400}}}\n' + line(2),
        encoding="utf-8",
    )
    log = Log(path).update()
    assert log.last["step"] == 2 and len(log.series["loss"].buckets) == 1
    path.unlink()
    assert log.update().lines == 0


def test_the_newest_step_is_read_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "train_log.jsonl"
    assert last_step(path) == {}
    path.write_text(line(1), encoding="utf-8")
    assert last_step(path)["step"] == 1
    long = json.dumps({"step": 7, "samples": [{"answer": "가" * 100_000}]}) + "\n"
    path.write_text(line(1) + line(2) + long + '{"step": 3, "loss"', encoding="utf-8")
    assert last_step(path)["step"] == 2
    path.write_text(long, encoding="utf-8")
    assert last_step(path) == {}


def test_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "train_log.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for step in range(1, 100_001):
            file.write(line(step, **{f"key{step % 500}": 1.0}))
    log = Log(path).update()
    assert log.lines == 100_000 and len(log.series) <= 48
    assert max(len(series.buckets) for series in log.series.values()) <= 512


def test_what_the_charts_draw_is_read_and_nothing_else(tmp_path: Path) -> None:
    assert {key for _, keys, _ in CHARTS for key in keys} == set(CURVES)
    path = tmp_path / "train_log.jsonl"
    path.write_text(line(1, **dict.fromkeys(CURVES, 2.0), rows=8, grad_norm=1.0), encoding="utf-8")
    series = Log(path).update().series
    assert set(series) == set(CURVES) and series["speed"].points() == [(1.0, 200.0)]


def test_answers_at_the_last_evaluations(tmp_path: Path) -> None:
    path = tmp_path / "train_log.jsonl"
    answers = [[{"prompt": "하나", "answer": "둘"}], [{"prompt": "셋", "answer": "넷"}] * 20]
    path.write_text(
        "".join(
            json.dumps({"step": step, "samples": found}) + "\n" + line(step + 1) for step, found in enumerate(answers)
        ),
        encoding="utf-8",
    )
    first, second = Log(path).update().samples
    assert first == {"step": 0, "answers": answers[0]} and second == {"step": 1, "answers": answers[1][:10]}
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step, "samples": [{"answer": "x"}]}) + "\n" for step in range(9))
    assert [found["step"] for found in Log(path).update().samples] == [4, 5, 6, 7, 8]
