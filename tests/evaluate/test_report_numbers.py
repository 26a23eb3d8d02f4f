"""The numbers of the report claim no more than their intervals; the length bias of pairs by hand."""

from __future__ import annotations

from typing import Any

from byeori.evaluate.metrics import ROW_METRICS
from byeori.evaluate.report_numbers import hero, kl_said, length_bias, metric_rows


def test_metric_rows_claim_no_more_than_the_interval() -> None:
    def words(low: float, high: float, rows: int = 40) -> dict[str, str]:
        difference = {name: {"mean": (low + high) / 2, "low": low, "high": high} for name in ROW_METRICS}
        metrics = {"base": {}, "tuned": {}, "difference": difference, "rows": rows}
        return {line["heading"]: line["word"] for line in metric_rows(metrics, [])}

    up = words(1, 3)
    assert (up["chrF"], up["Loss"], up["Length"]) == ("better", "worse", "longer")
    down = words(-3, -1)
    assert (down["chrF"], down["Loss"], down["Length"]) == ("worse", "better", "shorter")
    assert set(words(-1, 3).values()) == {"unclear"}
    assert set(words(0, 0).values()) == {"the same"}
    assert set(words(1, 3, rows=5).values()) == {"too few rows"}


def test_interval_bar_by_hand() -> None:
    metrics = {"difference": {"chrf": {"mean": 1.0, "low": -2.0, "high": 4.0}}, "rows": 40}
    line = metric_rows(metrics, [])[0]
    # Zero is at 100 and the far end, 4, at 190: 22.5 for each unit.
    assert line["bar"] == {"mean": 122.5, "low": 55.0, "high": 190.0}
    assert (line["difference"], line["interval"]) == ("+1.0", "−2.0 to +4.0")


def interval(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


def test_the_number_that_leads() -> None:
    counts = {"rose": 40, "fell": 3, "same": 1, "unknown": 0}
    metrics: dict[str, Any] = {"difference": {"chrf": interval(22.94, 16.9, 29.1)}, "rows": 44}
    said = hero(metrics, counts, pairs=False)
    assert said == {
        "figure": "+22.9", "unit": "chrF", "range": "95% interval +16.9 to +29.1", "better": "40 of 44 rows better",
        "tone": "up",
    }  # fmt: skip
    assert (
        hero(metrics | {"rows": 5}, counts, pairs=False)["tone"]
        == hero(metrics | {"rows": 5}, counts, pairs=False)["range"]
        == ""
    )
    assert hero({"difference": {"chrf": interval(1.0, -2.0, 4.0)}, "rows": 44}, counts, pairs=False)["tone"] == ""


def test_pairs_lead_with_their_accuracy_and_margin() -> None:
    counts = {"rose": 30, "fell": 10, "same": 0, "unknown": 0}
    difference = {"preference_accuracy": interval(25.0, 10.0, 40.0), "preference_margin": interval(3.0, 1.0, 5.0)}
    sides = {"base": {"preference_accuracy": 50.0}, "tuned": {"preference_accuracy": 75.0}}
    said = hero(
        {"difference": difference | {"chrf": interval(-9.0, -12.0, -6.0)}, "rows": 40} | sides, counts, pairs=True
    )
    assert (said["figure"], said["unit"], said["tone"]) == ("+25.0", "points of preference accuracy", "up")
    assert said["better"] == "chosen answer preferred in 50% before, 75% now; margin larger in 30 of 40 pairs"


def pair(chosen: int, rejected: int, before: float, after: float) -> dict[str, Any]:
    texts = {"reference": "가" * chosen, "rejected": "나" * rejected}
    return texts | {"base": {"preference_margin": before}, "tuned": {"preference_margin": after}}


def test_length_bias_by_hand() -> None:
    # training rewards exactly the length difference: the longer answer in all pairs, the chosen one in four of eight
    pairs = [pair(10 + d, 10, 1.0, 1.0 + d) for d in (1, 2, 3, 4, -1, -2, -3, -4)]
    assert length_bias(pairs) == [
        "Training favoured the longer answer in 8 of 8 pairs; it is the chosen one in 4.",
        "Correlation of reward margin and length difference: 1.00 (a strong length bias).",
    ]
    fair = [pair(10 + d, 10, 1.0, 2.0 + d % 2) for d in (1, 2, 3, 4, -1, -2, -3, -4)]
    assert "no strong length bias" in length_bias(fair)[1]
    assert length_bias(pairs[:5]) == []  # too few
    assert length_bias([pair(5, 5, 0, 1)] * 20) == []  # as long as each other


def test_the_last_kl_is_said_of_held_out_rows_if_there_are_any() -> None:
    log = [{"step": 1, "kl": 0.1}, {"step": 2, "kl": 0.25}]
    assert kl_said(log) == "KL to the reference model: 0.250 nats per token on training rows, at step 2."
    assert kl_said([*log, {"step": 2, "eval_kl": 0.3}]).endswith("0.300 nats per token on held-out rows, at step 2.")
    assert kl_said([{"step": 1, "loss": 2.0}]) == ""
