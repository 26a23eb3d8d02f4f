"""What losses say about rows: planted wrong, hard and known rows are told apart."""

from __future__ import annotations

import numpy as np

from byeori.evaluate.row_losses import sort_rows

TEXTS = [f"{'버스 노선이 바뀐다' if row % 2 else '예산안을 구의회에 냈다'} {row}" for row in range(60)]


def losses() -> tuple[np.ndarray, np.ndarray]:
    """Base and tuned: one kind of text falls to 0.3, the other, which is harder, to 1.5."""
    drawn = np.random.default_rng(0)
    base = 3 + drawn.normal(0, 0.2, 60)
    return base, np.where(np.arange(60) % 2, 1.5, 0.3) + drawn.normal(0, 0.05, 60)


def test_rows_are_told_apart() -> None:
    base, tuned = losses()
    tuned[8] = 2.9  # similar rows fell to 0.3
    base[21], tuned[21] = 7.0, 3.0  # harder, and fell more
    base[30] = tuned[30] = 0.05
    found = sort_rows(base, tuned, TEXTS)
    assert [item["index"] for item in found["contradicted"]] == [8]
    assert abs(found["contradicted"][0]["expected"] - 0.3) < 0.1
    assert found["hard"] == []
    assert [item["index"] for item in found["known"]] == [30]


def test_rows_of_a_kind_that_cannot_be_learned_are_hard() -> None:
    base, tuned = losses()
    texts = [f"주사위를 던져 나온 수 {row}" if row >= 45 else text for row, text in enumerate(TEXTS)]
    tuned[45:] = base[45:] - 0.1
    found = sort_rows(base, tuned, texts)
    assert {item["index"] for item in found["hard"]} == set(range(45, 60)) and found["contradicted"] == []
    assert found["hard"][0]["index"] == int(np.argmax(tuned))


def test_a_kind_that_is_harder_is_not_wrong() -> None:
    assert sort_rows(*losses(), TEXTS) == {"contradicted": [], "hard": [], "known": []}


def test_an_untrained_model_contradicts_nothing() -> None:
    base, _ = losses()
    base[8] += 3
    assert sort_rows(base, base, TEXTS)["contradicted"] == []
    assert sort_rows([1.0], [0.5], TEXTS[:1])["contradicted"] == []
