"""Written answers of models that learned nothing: the score rises, and the verdict says why that is no proof."""

from __future__ import annotations

from typing import Any

import pytest

from byeori.evaluate import baselines, compare, findings
from byeori.evaluate.metrics import score_row
from byeori.evaluate.verdict import verdict
from tiny_models import sample_rows

ROWS, TRAINED = (sample_rows("titles-ko-train.jsonl")[start : start + 40] for start in (0, 40))
BABBLE = "그리고 또 다른 이야기를 이어서 하자면 다음과 같은 것들이 있습니다. "


def item(document: str, reference: str, base: str, tuned: str, *, base_stopped: bool = True) -> dict[str, Any]:
    return {
        "row": {"document": document, "title": reference},
        "inputs": [document],
        "reference": reference,
        "base_output": base,
        "tuned_output": tuned,
        "base": score_row(base, reference, stopped=base_stopped, loss=3.0),
        "tuned": score_row(tuned, reference, stopped=True, loss=2.0),
    }


def judged(items: list[dict[str, Any]], **known: Any) -> tuple[dict[str, Any], str]:
    metrics = compare.summarise(items, **known)
    return metrics, verdict(metrics)


def names(metrics: dict[str, Any]) -> list[str]:
    return [finding["name"] for finding in metrics["findings"]]


def half(text: str) -> str:
    """An honest answer that is not the reference: every second word of it."""
    return " ".join(text.split()[::2]) + " 발표"


def test_a_model_that_learned_is_praised() -> None:
    metrics, words = judged([item(row["document"], row["title"], BABBLE, row["title"]) for row in ROWS])
    assert words.startswith("The tuned model is closer to the references: chrF rose by ")
    assert not [finding for finding in metrics["findings"] if finding["undermines"]]


def test_a_model_that_copies_its_input_is_not() -> None:
    items = [item(row["document"], row["title"], "없음", row["document"][:200]) for row in ROWS]
    metrics, words = judged(items)
    assert metrics["difference"]["chrf"]["low"] > 5  # which was praised before
    assert words.startswith("A higher score, but no proof that the task was learned: chrF rose by ")
    assert "40 of the tuned model's 40 answers repeat their input, and 0 of the references do." in words
    assert {"copies_input", "baseline_as_good"} <= set(names(metrics))
    assert "Copying the first sentence of the input does as well: chrF " in words


def test_copies_are_expected_where_the_references_are_copies() -> None:
    rows = [baselines.first_sentence(row["document"]) for row in ROWS]
    items = [item(row["document"], text, "없음", text) for row, text in zip(ROWS, rows, strict=True)]
    metrics, _ = judged(items)
    assert "copies_input" not in names(metrics)
    assert "baseline_as_good" in names(metrics)  # copying the sentence is the task


def test_a_copy_that_only_chrf_likes_is_mentioned_and_no_more() -> None:
    """chrF weighs recall four times as much: a long copy scores as high as a short title that is right."""
    tuned = {at: " ".join(row["title"].split()[:2]) for at, row in enumerate(ROWS)}
    items = [item(f"{row['title']} 소식을 전했다.", row["title"], "zzz", tuned[at]) for at, row in enumerate(ROWS)]
    for kind in items:
        kind["inputs"] = [f"이날 {kind['reference'].replace(' ', '')} 관계자는 이렇게 전했다고 한다."]
    metrics, words = judged(items)
    assert words.startswith("The tuned model is closer to the references")
    assert [
        finding["undermines"] for finding in metrics["findings"] if "by ROUGE-L it is: " in finding["sentence"]
    ] == [False]


def test_a_model_with_one_answer_for_everything() -> None:
    answer = "서울시, 내년도 예산안 발표 및 시민 참여 확대"
    metrics, words = judged([item(row["document"], row["title"], "zzz", answer) for row in ROWS])
    assert "same_answer" in names(metrics)
    assert f"40 of the tuned model's 40 answers are the same: '{answer}'." in words
    assert words.startswith("A higher score, but no proof")


def test_one_answer_is_expected_of_labels() -> None:
    items = [item(row["document"], "긍정", "부정", "긍정") for row in ROWS]
    assert "same_answer" not in names(judged(items)[0])


def test_a_model_that_repeats_itself() -> None:
    items = [item(row["document"], row["title"], "zzz", (row["title"].split()[0] + " 예산 ") * 20) for row in ROWS]
    metrics, words = judged(items)
    assert "repeats_itself" in names(metrics)
    assert "40 of the tuned model's 40 answers repeat themselves, and 0 of the references do." in words


def test_a_model_that_repeats_itself_and_counts() -> None:
    """As a model does that goes on with the prompt instead of answering it; of few rows, too."""
    loops = ["".join(f"{row['document'][:30]} ({n}번째)\n\n### 답:\n" for n in range(40, 32, -1)) for row in ROWS[:8]]
    items = [item(row["document"], row["title"], BABBLE, loop) for row, loop in zip(ROWS, loops, strict=False)]
    metrics, words = judged(items)
    assert "repeats_itself" in names(metrics)
    assert "8 of the tuned model's 8 answers repeat themselves, and 0 of the references do." in words


def test_a_model_that_only_learned_to_stop() -> None:
    items = [
        item(
            row["document"], row["title"], half(row["title"]) + " " + BABBLE * 6, half(row["title"]), base_stopped=False
        )
        for row in ROWS
    ]
    metrics, words = judged(items)
    assert metrics["difference"]["chrf"]["low"] > 0
    assert "The gain may be only that answers end. Cutting the base model's answers" in words
    assert words.startswith("A higher score, but no proof")


def test_a_model_that_memorised_the_test_rows() -> None:
    items = [item(row["document"], row["title"], BABBLE, row["title"]) for row in ROWS]
    for kept in items[30:]:
        kept |= {"tuned_output": BABBLE, "tuned": dict(kept["base"])}
    metrics, words = judged(items, trained_rows=list(range(30)))
    assert words.startswith("A higher score, but no proof that the task was learned: chrF rose by ")
    assert "30 of the 40 rows were trained on, so the model may have memorised them." in words
    assert "On the other 10 the change of chrF is +0.0 (95% interval +0.0 to +0.0)." in words
    assert metrics["findings"][0]["rows"] == list(range(30))


def test_a_test_of_near_copies() -> None:
    items = [item(row["document"], row["title"], BABBLE, row["title"]) for row in ROWS]
    for kept in items[30:]:
        kept |= {"tuned_output": BABBLE, "tuned": dict(kept["base"])}
    metrics, words = judged(items, trained_rows=[0], near_rows=list(range(30)))
    assert words.startswith("A higher score, but no proof that the task was learned: chrF rose by ")
    assert "1 of the 40 rows was trained on, so the model may have memorised them. On the other 10" in words
    assert "29 of the 40 rows are near copies of training rows, which may give answers away." in words
    assert words.count("On the other") == 1
    assert metrics["findings"][1]["rows"] == list(range(1, 30))


def edited(text: str, every: int) -> str:
    """The text with every n-th character replaced."""
    return "".join("※" if at % every == every - 1 else character for at, character in enumerate(text))


def without_some(text: str) -> str:
    """The text's later words without every fifth."""
    return " ".join(word for at, word in enumerate(text.split()[8:40]) if at % 5)


def some_copies(at: int, document: str) -> str:
    """A third copied, a third repeated, a third empty: no kind is most of them."""
    return (document[:120], "예산 발표 " * 20, " … ")[at % 3]


@pytest.mark.parametrize(
    ("name", "answer", "words"),
    [
        ("copies_input", lambda at, row: edited(row["document"][-150:], 14), "40 answers repeat their input"),
        ("copies_input", lambda at, row: without_some(row["document"]), "40 answers repeat their input"),
        ("says_nothing", lambda at, row: ("...", "!?", "", " — ")[at % 4], "answers are empty or have no letter"),
        ("other_script", lambda at, row: f"News {at} of the city council", "in another script than their references"),
        ("other_row", lambda at, row: ROWS[at - 1]["title"], "The tuned model's own answer to another row"),
        ("few_answers", lambda at, row: ROWS[at % 3]["title"], "gives 3 different answers to 40 rows"),
        ("recites", lambda at, row: TRAINED[at]["title"], "40 answers are answers of training rows, word"),
        ("says_nothing", lambda at, row: some_copies(at, row["document"]), "13 of the tuned model's 40 answers are"),
        ("repeats_itself", lambda at, row: some_copies(at, row["document"]), "13 of the tuned model's 40 answers rep"),
    ],
)
def test_failures_that_score_more_than_a_base_that_is_silent(name: str, answer: Any, words: str) -> None:
    """The base scores nothing, so that everything is a gain by chrF."""
    items = [item(row["document"], row["title"], "ⓐ", answer(at, row)) for at, row in enumerate(ROWS)]
    for at, found in enumerate(items):
        found["tuned"]["chrf"] += 3 + at % 2
    metrics, said = judged(items, trained_answers=[row["title"] for row in TRAINED])
    assert metrics["difference"]["chrf"]["low"] > 0
    doubts = [finding for finding in metrics["findings"] if finding["undermines"]]
    assert name in [finding.get("baseline", finding["name"]) for finding in doubts], names(metrics)
    assert said.startswith("A higher score, but no proof that the task was learned") and words in said


def test_answers_of_their_own_row_are_no_finding() -> None:
    """Half right and sorted by label: another row of the same label would be as good."""
    labels = ["긍정"] * 20 + ["부정"] * 20
    items = [item(row["document"], label, BABBLE, label) for row, label in zip(ROWS, labels, strict=True)]
    assert not [finding for finding in judged(items)[0]["findings"] if finding["undermines"]]


def test_answers_that_are_those_of_the_base() -> None:
    items = [item(row["document"], row["title"], half(row["title"]), half(row["title"])) for row in ROWS]
    metrics, words = judged(items)
    assert words.startswith("No clear difference in chrF") and "40 answers are those of the base model." in words
    assert not any(finding["undermines"] for finding in metrics["findings"] if finding["name"] == "as_base")


def test_answers_that_are_cut_and_a_base_that_is_silent() -> None:
    items = [item(row["document"], row["title"], " ", row["title"]) for row in ROWS]
    for kind in items:
        kind["tuned"]["stopped"] = 0.0
    _, words = judged(items)
    assert "40 of the tuned model's 40 answers ran into the length limit." in words
    assert "40 of the base model's 40 answers are empty or have no letter or digit, so any answer is a gain." in words
    assert words.startswith("The tuned model is closer")


def test_rows_that_repeat_others_are_no_new_rows() -> None:
    """Six different rows, of which one gained, and that one thirty times."""
    gained = item(ROWS[0]["document"], ROWS[0]["title"], BABBLE, ROWS[0]["title"])
    others = [item(row["document"], row["title"], BABBLE, BABBLE) for row in ROWS[1:6]]
    spaced = {**gained, "inputs": [ROWS[0]["document"].replace(" ", "  ") + "!"]}
    items = [gained, *others, *[dict(gained) for _ in range(28)], spaced]
    found = compare.repeated_rows(items, lambda done, total: None)
    assert found == list(range(6, 35))
    metrics, words = judged(items, repeated=found)
    assert metrics["difference"]["chrf"]["low"] > 0 and words.startswith("A higher score, but no proof")
    assert "29 of the 35 rows repeat another row and its answer. Without them the change of chrF is +" in words


def test_equal_questions_with_other_answers_are_rows_of_their_own() -> None:
    items = [item("같은 글", row["title"], "", row["title"]) for row in ROWS[:8]]
    assert compare.repeated_rows(items, lambda done, total: None) == []


@pytest.mark.parametrize(
    ("answer", "reference", "other"),
    [
        ("Seoul opens a park", "서울시, 공원 개장", True),
        ("서울시 AI 공원", "서울시, 공원 개장", False),
        ("东京开放公园", "東京で公園が開園", True),
        ("東京の公園", "東京で公園が開園", False),
        ("ＡＩ park", "AI 개발 news", False),
        ("12", "서울", False),
    ],
)
def test_other_script(answer: str, reference: str, other: bool) -> None:
    assert findings.other_script(answer, reference) is other


def preference(longer: bool, base: float, tuned: float) -> dict[str, Any]:
    pair = item("질문", "좋은 답 " * (9 if longer else 1), "x", "좋은 답")
    pair["rejected"] = "나쁜 답 둘"
    for side, accuracy in (("base", base), ("tuned", tuned)):
        pair[side] |= {"preference_accuracy": accuracy, "preference_margin": accuracy - 50}
    return pair


def test_a_preference_for_the_longer_answer() -> None:
    pairs = [preference(at % 8 > 0, 100.0 * (at % 2), 100.0 * (at % 8 > 0)) for at in range(40)]
    metrics, words = judged(pairs)
    assert "Preferring the longer answer does as well: it is the chosen one in 88% of the pairs, and" in words
    assert "More answers are preferred as they should be, but that is no proof that the task was learned." in words
    assert [it["undermines"] for it in metrics["findings"] if it["name"] == "length_decides"] == [True]
    right = [preference(at % 2 > 0, 100.0 * (at % 3 > 0), 100.0) for at in range(40)]
    assert "length_decides" not in names(judged(right)[0])


def test_the_most_frequent_answer_of_the_training_rows() -> None:
    found = baselines.of_items([item("글", "긍정", "", "긍정")] * 6, ["부정", "부정", "긍정"])
    assert ("most_frequent", "부정") in [(kind.name, kind.answers[0]) for kind in found]
    assert baselines.most_frequent(["a", "b"]) == ""


def test_a_base_that_is_as_good_with_examples_needs_no_training() -> None:
    items = [item(row["document"], row["title"], BABBLE, row["title"][:-4]) for row in ROWS]
    items = [kind | {"few_shots": kind["reference"]} for kind in items]
    _, words = judged(items)
    assert "The base model with training rows in its prompt does as well: chrF 100.0" in words
    assert words.startswith("The tuned model is closer to the references")  # the task was learned all the same


def test_scores_of_baselines_by_hand() -> None:
    items = [item("봄이 왔다. 꽃이 핀다.", "봄이 왔다.", "x", "봄") for _ in range(8)]
    measured = {line["name"]: line for line in judged(items)[0]["baselines"]}
    assert measured["copy_sentence"]["scores"]["exact"] == 100.0
    lead = measured["copy_sentence"]["lead"]["exact"]
    assert (lead["mean"], lead["low"]) == (-100.0, -100.0) and lead["high"] < -30
    assert "copy_start" not in measured  # six characters are the same sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("3.5% 올랐다. 그러나", "3.5% 올랐다."),
        ("제목\n본문이다.", "제목"),
        ("  끝나지 않는 글", "끝나지 않는 글"),
        ("", ""),
        ("좋다! 정말?", "좋다!"),
    ],
)
def test_first_sentence(text: str, sentence: str) -> None:
    assert baselines.first_sentence(text) == sentence


@pytest.mark.parametrize(
    ("answer", "copied"),
    [
        ("서울시가 내년 예산안을 12조원으로 확정했다", True),
        ("서울시가  내년 예산안을\n12조원으로 확정", True),
        ("확정된 서울시 예산안은 12조원 규모로 역대 최대", False),
        ("서울시", False),  # too short to say
        ("", False),
    ],
)
def test_copies_input(answer: str, copied: bool) -> None:
    assert findings.copies_input(answer, ["서울시가 내년 예산안을 12조원으로 확정했다. 시의회는 반대했다."]) is copied


def test_a_wide_interval_is_said() -> None:
    answers = [row["title"] if at % 2 else "없음" for at, row in enumerate(ROWS)]
    items = [item(row["document"], row["title"], "zzz", text) for row, text in zip(ROWS, answers, strict=True)]
    metrics, words = judged(items[:12])
    assert "wide_interval" in names(metrics) and "The interval is wide, " in words
