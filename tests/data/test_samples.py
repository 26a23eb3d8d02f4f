"""The project's own sample rows: as many as the documents say, and none for testing that was trained."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest

from byeori.cli import main
from tiny_models import SAMPLES, sample_rows

ROOT = Path(__file__).parents[2]
TRAIN, TEST = "titles-ko-train.jsonl", "titles-ko-test.jsonl"
TABLES = {TRAIN: (220, "title-ko"), TEST: (44, "title-ko"), "alpaca-ko.jsonl": (124, "alpaca")}
TABLES["preference-ko.jsonl"] = (124, "question-answer")
RUN = 5  # words


def plain(text: str) -> str:
    """A text without what two copies of it may differ in: white space, punctuation, encoding letters are composed."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text)).lower()


def runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[at : at + RUN]) for at in range(len(words) - RUN + 1)}


def test_these_are_all_the_tables() -> None:
    assert {path.name for path in SAMPLES.iterdir()} == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_every_row_can_be_trained_and_occurs_once(
    name: str, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["preview", "--base_model", tiny_model, "--data_path", SAMPLES / name, "--json"]
    assert main(list(map(str, given))) == 0
    counts = json.loads(capfd.readouterr().out)
    assert (counts["rows"], counts["template"]) == TABLES[name]
    assert (counts["dropped"], counts["empty_prompts"], counts["joined_rows"]) == ([], 0, 0)
    rows = sample_rows(name)
    assert len({plain("".join(map(str, row.values()))) for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("document", "words"), [("README.md", r"On (\d+) articles"), ("README.ko.md", r"기사 (\d+)건")]
)
def test_the_documents_count_them_right(document: str, words: str) -> None:
    counted = re.findall(words, (ROOT / document).read_text(encoding="utf-8"))
    assert counted == [str(TABLES[TEST][0])]


@pytest.mark.parametrize("column", ["document", "title"])
def test_no_text_is_in_both_parts(column: str) -> None:
    train, test = ({plain(row[column]) for row in sample_rows(name)} for name in (TRAIN, TEST))
    assert not train & test
    assert (len(train), len(test)) == (220, 44)


def test_no_article_was_written_from_one_that_is_trained() -> None:
    """At most a twentieth of an article's runs of five words stand in any one of those that are trained."""
    trained = [runs(row["document"]) for row in sample_rows(TRAIN)]
    for row in sample_rows(TEST):
        own = runs(row["document"])
        assert max(len(own & other) for other in trained) <= len(own) / 20, row["title"]
