"""Coordinates of the loss curve and of histograms by hand; what the curve says."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byeori.evaluate.chart import fit_in_words, histogram, kept_step, loss_chart


def test_loss_chart_by_hand() -> None:
    log = [{"step": 0, "loss": 3.0}, {"step": 10, "loss": 1.0}, {"step": 5, "eval_loss": 2.0}, {"epoch": 1}]
    chart = loss_chart(log)
    assert chart is not None
    left, right, top, bottom = (chart[edge] for edge in ("left", "right", "top", "bottom"))
    assert [label for _, label in chart["y_ticks"]] == ["1.0", "1.5", "2.0", "2.5", "3.0"]
    assert [label for _, label in chart["x_ticks"]] == ["0", "2", "4", "6", "8", "10"]
    assert chart["train"] == f"M{left}.0 {top}.0L{right}.0 {bottom}.0"
    assert chart["evaluated"] == [((left + right) / 2, (top + bottom) / 2)]
    assert chart["description"].startswith("Training loss from 3.000 at step 0 to 1.000 at step 10.")


def test_loss_chart_of_odd_logs() -> None:
    assert loss_chart([]) is None
    assert loss_chart([{"step": 1, "loss": math.nan}, {"step": 2, "loss": None}, {"loss": 1.0}]) is None
    one = loss_chart([{"step": 3, "loss": 2.0}])
    assert one is not None and one["dot"] and not one["train"]
    flat = loss_chart([{"step": step, "loss": 0.0} for step in range(5)])
    assert flat is not None and len(flat["y_ticks"]) >= 2
    resumed = loss_chart([{"step": 1, "loss": 9.0}, {"step": 2, "loss": 2.0}, {"step": 1, "loss": 3.0}])
    assert resumed is not None and "from 3.000" in resumed["description"]
    long = loss_chart([{"step": step, "loss": 2.0 + step % 2} for step in range(20_000)])
    assert long is not None and long["train"].count("L") == 399 and long["smooth"]


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e6, 1e6)), min_size=1, max_size=30))
def test_loss_chart_stays_inside_its_box(points: list[tuple[int, float]]) -> None:
    chart = loss_chart([{"step": step, "eval_loss": loss} for step, loss in points])
    assert chart is not None
    for x, y in chart["evaluated"]:
        assert chart["left"] <= x <= chart["right"] and chart["top"] <= y <= chart["bottom"]
    assert 1 <= len(chart["x_ticks"]) <= 10 and 2 <= len(chart["y_ticks"]) <= 10


def evaluated(*losses: float) -> list[dict[str, float]]:
    return [{"step": 10 * at, "eval_loss": loss} for at, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((), "No rows were held out"),
        ((2.0,), "One evaluation does not show overfitting"),
        ((2.0, 1.5, 1.2), "lowest at the end (1.200): no overfitting"),
        (
            (2.0, 1.0, 1.01),
            "lowest at step 20 (1.000) and flat from there (1.010 at the end). The adapter is that of step 20.",
        ),
        (
            (2.0, 1.0, 1.3),
            "Overfitting: the evaluation loss was lowest at step 20 (1.000) and rose to 1.300 by the end.",
        ),
    ],
)
def test_what_the_curve_says_about_overfitting(losses: tuple[float, ...], words: str) -> None:
    log = [{"step": 30, "loss": 0.5}, *evaluated(*losses)]
    assert words in fit_in_words(log, kept_step(log, "auto"))


def test_the_kept_step_is_the_best_evaluated_or_the_last() -> None:
    log = [{"step": 40, "loss": 1.0}, *evaluated(2.0, 1.0, 1.0, 1.5)]
    assert (kept_step(log, "auto"), kept_step(log, "best"), kept_step(log, "last"), kept_step([], "auto")) == (
        20,
        20,
        40,
        None,
    )
    assert kept_step([{"step": 7, "loss": 1.0}], "auto") == 7
    assert "that of the last step" in fit_in_words(log, kept_step(log, "last"))
    chart = loss_chart(log, 20)
    assert chart is not None and chart["kept"] == (chart["evaluated"][1][0], 20)
    single = loss_chart([{"step": 7, "loss": 1.0}], 7)
    assert single is not None and single["kept"] is None


def test_histogram_by_hand() -> None:
    chart = histogram({"a": [1, 1, 9], "b": [5, None]}, limit=8)
    assert chart is not None
    # 0 to 10 in ten bins from 58 to 706: 64.8 each; the highest bin, of two, reaches from 180 to 14
    assert chart["outlines"]["a"].startswith("M58.0 180.0L58.0 180.0L122.8 180.0L122.8 14.0L187.6 14.0L187.6 180.0")
    assert chart["limit"] == 576.4 and [label for _, label in chart["y_ticks"]] == ["0", "1", "2"]
    assert histogram({"a": []}) is None and histogram({}) is None
    one, around_zero = histogram({"a": [3]}), histogram({"a": [-2.0, 1.0]}, zero=True)
    assert one is not None and one["outlines"]["a"]
    assert around_zero is not None and around_zero["zero"] is not None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200))
def test_histogram_counts_every_number_inside_its_box(numbers: list[float]) -> None:
    chart = histogram({"a": numbers})
    assert chart is not None
    for point in chart["outlines"]["a"][1:].split("L"):
        x, y = map(float, point.split())
        assert chart["left"] <= x <= chart["right"] and chart["top"] <= y <= chart["bottom"]
