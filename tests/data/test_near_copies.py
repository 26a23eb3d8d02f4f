"""Near copies: the pairs that comparing every text with every other finds, without doing so."""

from __future__ import annotations

import itertools
import random

import numpy as np

from byeori.data import near_copies


def jaccard(one: str, other: str) -> float:
    """Of sets of 5-grams, in plain Python."""
    sets = [{text[at : at + 5] for at in range(max(1, len(text) - 4))} for text in map(near_copies.plain, (one, other))]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def drawn_texts(count: int) -> list[str]:
    """Texts of drawn words, a third of them earlier ones with a few words changed."""
    drawn = random.Random(5)
    words = ["".join(drawn.choices("가나다라마바사아자차카타파하구청예산", k=drawn.randint(2, 4))) for _ in range(800)]
    texts: list[str] = []
    for row in range(count):
        text = drawn.choices(words, k=40)
        if row % 3 == 2:
            text = drawn.choice(texts).split()
            for at in drawn.sample(range(40), drawn.randint(0, 5)):
                text[at] = drawn.choice(words)
        texts.append(" ".join(text))
    return texts


def test_pairs_are_those_of_every_text_with_every_other() -> None:
    texts = drawn_texts(240)
    expected = {
        (i, j): share
        for (i, one), (j, other) in itertools.combinations(enumerate(texts), 2)
        if (share := jaccard(one, other)) >= near_copies.SIMILAR
    }
    found = {(i, j): share for i, j, share in near_copies.pairs(texts)}
    assert len(expected) > 40
    assert found.keys() == expected.keys()
    assert np.allclose([found[pair] for pair in expected], list(expected.values()))
    across = {(i, j) for i, j, _ in near_copies.pairs(texts[:120], texts[120:])}
    assert across == {(i, j - 120) for i, j in expected if i < 120 <= j}


def test_boilerplate_does_not_make_copies() -> None:
    instruction = "다음 문장을 한국어에서 영어로 옮기고 그 밖의 말은 하지 마세요. 문장: "
    own = ["구청이 예산안을 냈다", "도서관이 문을 열었다", "버스 노선이 바뀐다", "축제가 다음 달에 열린다"]
    texts = [instruction + f"{text} {word}" for text in own for word in ("오늘은", "내일도", "어제야")]
    texts += [instruction + "아이들이 공원에서 연을 날렸다"] * 2
    assert near_copies.pairs(texts) == [(12, 13, 1.0)]


def test_spaces_case_and_unicode_form_do_not_count() -> None:
    texts = ["Ｔhe  Plan\nof 구청", "the plan OF 구청", "", "", "ab", "AB"]
    assert [(i, j) for i, j, share in near_copies.pairs(texts) if share == 1] == [(0, 1), (4, 5)]
    assert near_copies.key(texts[0]) == near_copies.key(texts[1]) != near_copies.key(texts[2])


def test_different_answers() -> None:
    text = "구청은 내년 예산안을 구의회에 냈고 도서관과 공원을 더 짓기로 했다고 어제 밝혔다"
    rows = [
        (text, "긍정"), (text + ".", "부정"), (text, " 긍정 "), ("전혀 다른 글이다", "부정"),
        (text + " 3개", "중립"), (text + " 4개", "긍정"),  # other numbers, another question
    ]  # fmt: skip
    found = near_copies.different_answers([row[0] for row in rows], [row[1] for row in rows])
    assert [pair[:2] for pair in found] == [(0, 1)]


def test_nearest() -> None:
    texts = ["예산안을 구의회에 냈다", "버스 노선이 바뀐다", "예산안을 구의회가 받았다", "버스 노선이 늘어난다"]
    assert [rows.tolist() for rows in near_copies.nearest(texts, [0, 3], range(4), 1)] == [[2], [1]]
    assert len(near_copies.nearest(texts, [0], [0, 1], 5)[0]) == 1
