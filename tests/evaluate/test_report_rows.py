"""The rows of the report: marks by hand, wins and losses, texts that are cut."""

from __future__ import annotations

import time
import unicodedata
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from byeori.evaluate import report_rows
from byeori.evaluate.report_rows import card, matching, tally
from report_page import ROWS, item


def test_tally_counts_rows() -> None:
    pairs = [(10.0, 20.0), (20.0, 10.0), (10.0, 10.01), (None, 3.0)]
    rows = [{"base": {"chrf": before}, "tuned": {"chrf": after}} for before, after in pairs]
    assert tally(rows) == {"rose": 1, "fell": 1, "same": 1, "unknown": 1}


def test_matching_by_hand() -> None:
    assert matching("서울시 예산을 확정", "서울시 예산안 확정") == [
        ("서울시 예산", True), ("을 ", False), ("확정", True),
    ]  # fmt: skip
    assert matching("같은 글", "같은 글") == [("같은 글", True)]
    assert matching("cat", "dog") == [("cat", False)]
    assert matching("shows", "showing") == [("show", True), ("s", False)]  # four letters say something,
    assert matching("the", "then") == [("the", False)]  # three do not
    assert matching("", "글") == []


def test_matching_of_endless_repetition_is_fast() -> None:
    start = time.process_time()
    for answer, reference in ((". " * 1900, "! . " * 1000), ("ㅋ" * 2000, "ㅋㅎ" * 900), ("네 " * 1900, "네 " * 1800)):
        assert "".join(text for text, _ in matching(answer, reference)) == answer
    assert time.process_time() - start < 5


@given(st.text(max_size=60), st.text(max_size=60))
def test_matching_loses_no_text(answer: str, reference: str) -> None:
    pieces = matching(answer, reference)
    assert "".join(text for text, _ in pieces) == unicodedata.normalize("NFC", answer)
    assert all(text for text, _ in pieces)
    assert all(left[1] != right[1] for left, right in pairwise(pieces))


def test_card_falls_back_to_the_prompt() -> None:
    """Rows with chat messages have no template, and a row may lack what the template names."""
    assert card(ROWS[0], 1, [])["columns"] == [("Prompt", [("### 본문:\n서울시가 예산안을 발표했다.", False)])]
    empty = ROWS[0] | {"row": {"document": None, "input": " "}}
    assert card(empty, 1, ["document", "input"])["columns"][0][0] == "Prompt"


def scored(*changes: float | None) -> list[dict[str, Any]]:
    """Rows whose chrF rose by so much from 50."""
    rows = []
    for change in changes:
        row = item("본문", "제목", "가", "나")
        rows.append(row | {"base": {"chrf": 50.0}, "tuned": {"chrf": None if change is None else 50.0 + change}})
    return rows


def test_typical_wins_are_in_the_middle_and_losses_the_worst() -> None:
    made = report_rows.cards(scored(1, 2, 3, 40, 50, -1, -9, -5, -2, 0, None), ["document"], "chrf")
    wins, losses = report_rows.best_and_worst(made)
    assert [win["gain"] for win in wins] == [40, 3, 2]  # around the median, 3
    assert [loss["gain"] for loss in losses] == [-9, -5, -2]
    assert [row["kind"] for row in made[-2:]] == ["same", ""]
    assert report_rows.best_and_worst(report_rows.cards(scored(4), ["document"], "chrf"))[1] == []


def test_bars_by_hand() -> None:
    made = report_rows.cards(scored(-10, 30, None, 0), ["document"], "chrf")
    drawn = report_rows.bars(made)
    assert (drawn["width"], drawn["zero"]) == (3, 75.0)  # 30 up and 10 down share 100
    assert [(bar["index"], bar["y"], bar["height"]) for bar in drawn["bars"]] == [
        (2, 0.0, 75.0),
        (4, 75.0, 1.0),
        (1, 75.0, 25.0),
    ]


def test_flags_of_rows() -> None:
    rows = scored(1, 2)
    rows[0]["tuned"]["stopped"] = 0.0
    rows[0] |= {
        "tuned_output": "서울시가 내년 예산안을 오늘 발표했다",
        "inputs": ["서울시가 내년 예산안을 오늘 발표했다. 규모는"],
    }
    rows.append(rows[0] | {"tuned_output": "예산안을 예산안을 " * 9, "tuned": {"chrf": 1.0, "stopped": 100.0}})
    made = report_rows.cards(rows, ["document"], "chrf", [1])
    assert [row["flags"] for row in made] == [["unfinished", "copied"], ["leaked"], ["repeated"]]


def test_long_texts_are_cut_and_short_ones_stay_whole() -> None:
    rows = [item("가" * 50_000, "제목", "답", "답"), item("나" * 100, "제목", "답", "답")]
    first, second = report_rows.cards(rows, ["document"], "chrf")
    text = "".join(part for part, _ in first["columns"][0][1])
    kept = text.count("가")
    assert 800 < kept < 1000 and text.endswith(f"… ({50_000 - kept:,} more characters)")
    assert second["columns"][0][1] == [("나" * 100, False)]


def test_a_cut_keeps_its_marks() -> None:
    assert report_rows._cut([("ab", True), ("cd" * 100, False)], 3)[:2] == [("ab", True), ("c", False)]
