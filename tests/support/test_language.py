"""The language of messages: which one, the catalogue, and the josa that fits a value."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from byeori.support import language
from byeori.support.language import josa, tr, translated


@pytest.fixture
def korean() -> Iterator[None]:
    language.use("ko")
    yield
    language.use(None)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        # Hangul: without a final, with ㄹ, with another
        ("구청이", "구청이를 구청이가 구청이는 구청이와 구청이로"),
        ("서울", "서울을 서울이 서울은 서울과 서울로"),
        ("예산안", "예산안을 예산안이 예산안은 예산안과 예산안으로"),
        # digits as they are read: 영 일 이 삼 사 오 육 칠 팔 구, 십 백 천 만
        ("0", "0을 0이 0은 0과 0으로"),
        ("1", "1을 1이 1은 1과 1로"),
        ("2", "2를 2가 2는 2와 2로"),
        ("13", "13을 13이 13은 13과 13으로"),
        ("4", "4를 4가 4는 4와 4로"),
        ("7", "7을 7이 7은 7과 7로"),
        ("1,000", "1,000을 1,000이 1,000은 1,000과 1,000으로"),
        ("3.6", "3.6을 3.6이 3.6은 3.6과 3.6으로"),
        ("95%", "95%를 95%가 95%는 95%와 95%로"),
        # capitals by the names of their letters
        ("GPU", "GPU를 GPU가 GPU는 GPU와 GPU로"),
        ("SQL", "SQL을 SQL이 SQL은 SQL과 SQL로"),
        ("LLM", "LLM을 LLM이 LLM은 LLM과 LLM으로"),
        ("CSV", "CSV를 CSV가 CSV는 CSV와 CSV로"),
        # other Latin words by their ending
        ("model", "model을 model이 model은 model과 model로"),
        ("rows.jsonl", "rows.jsonl을 rows.jsonl이 rows.jsonl은 rows.jsonl과 rows.jsonl로"),
        ("column", "column을 column이 column은 column과 column으로"),
        ("format", "format을 format이 format은 format과 format으로"),
        ("test", "test를 test가 test는 test와 test로"),
        ("adapter", "adapter를 adapter가 adapter는 adapter와 adapter로"),
        ("lora_r", "lora_r을 lora_r이 lora_r은 lora_r과 lora_r로"),
        # marks at the end
        ("'서울'", "'서울'을 '서울'이 '서울'은 '서울'과 '서울'로"),
        ("모델(A)", "모델(A)을 모델(A)이 모델(A)은 모델(A)과 모델(A)로"),
        # not known
        ("東京", "東京을(를) 東京이(가) 東京은(는) 東京과(와) 東京(으)로"),
        ("", "을(를) 이(가) 은(는) 과(와) (으)로"),
    ],
)  # fmt: skip
def test_josa(word: str, expected: str) -> None:
    assert " ".join(word + josa(word, pair) for pair in ("을(를)", "이(가)", "은(는)", "과(와)", "(으)로")) == expected


def test_the_copula_keeps_its_vowel_after_a_final() -> None:
    assert (
        "서울" + josa("서울", "(이)") + "라는" == "서울이라는" and "대구" + josa("대구", "(이)") + "라는" == "대구라는"
    )


def test_the_language_is_that_of_the_environment_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (language.VARIABLE, "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    assert language.chosen() == "en"
    for value, expected in (("ko_KR.UTF-8", "ko"), ("ko", "ko"), ("kok_IN", "en"), ("C.UTF-8", "en"), ("de_DE", "en")):
        monkeypatch.setenv("LANG", value)
        assert language.chosen() == expected
    monkeypatch.setenv("LANG", "ko_KR.UTF-8")
    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")  # it stands above LANG
    assert language.chosen() == "en"
    language.use("ko")
    try:
        assert language.chosen() == "ko"
    finally:
        language.use(None)


def test_values_are_formatted_and_get_their_josa(korean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        language,
        "_messages",
        lambda: {"{name} has {count:,} rows": "{name}에는 행{count:,}이(가) 있고 {name}을(를) 읽음"},
    )
    assert tr("{name} has {count:,} rows", name="서울", count=1200) == "서울에는 행1,200이 있고 서울을 읽음"
    assert tr("no Korean for {this}", this=3) == "no Korean for 3"


def test_a_finished_sentence_is_found_by_its_pattern(korean: None) -> None:
    assert translated("there is no command 'tran'; see byeori --help").startswith("'tran'이라는 명령은 없습니다")
    assert translated("something else") == "something else"
    assert translated("을(를) stays as the data has it") == "을(를) stays as the data has it"


def test_english_is_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    assert tr("{name!r} has {count:,} rows {{}}", name="a", count=1200) == "'a' has 1,200 rows {}"
    assert translated("there is no command 'tran'; see byeori --help").startswith("there is no command")
