"""The report: data is never markup, missing numbers stay missing, the page stays small and says what leads."""

import base64
import hashlib
import math
import re
import time

import pytest

from byeori.evaluate.report import prompt_pieces, template_columns
from byeori.support import language
from report_page import PROMPT, ROWS, Page, item, page

ATTACKS = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "' onclick='alert(4)",
    "{{7*7}} {% for %} {#",
    "<!-- ]]> </pre></style></textarea></title><svg onload=alert(5)>",
]


def test_the_page_shows_every_argument() -> None:
    read = Page(page(ROWS, run={"Machine": ("CPU", "2 cores")}))
    for words in (
        "제목 생성기", "out/adapter", "Too few rows to tell", "서울시가 예산안을 발표했다.", "박물관 야간 개장",
        "lora_r", "q_proj, v_proj", "Machine", "2 cores", "### 본문:\n{document}",
        "1 of 2 rows better",
        "chrF rose in 1, fell in 1 and stayed the same in 0 of 2 rows", "Cut off at the length limit.",
    ):  # fmt: skip
        assert words in read.text, words
    assert "id" not in re.findall(r"<h3[^>]*>([^<]*)</h3>", page(ROWS))  # the template does not use this column
    html = next(attributes for tag, attributes in read.tags if tag == "html")
    assert html["lang"] == "en"


def test_the_answer_column_is_marked_in_the_prompt() -> None:
    shown = re.search(r"<pre[^>]*>\n(.*?)</pre>", page(ROWS), re.DOTALL)
    assert shown and shown[1] == PROMPT.replace("{title}", '<mark class="answer">{title}</mark>')


def test_the_first_prompt_is_shown_as_the_models_read_it() -> None:
    shown = re.findall(r"<pre[^>]*>\n(.*?)</pre>", page(ROWS), re.DOTALL)[1]
    assert shown == ('<span class="special">&lt;bos&gt;</span>### 본문:\n서울시가 예산안을 발표했다.\n\n### 제목:\n')
    assert page([], given=[]).count("<pre") == 1


def test_the_page_is_self_contained() -> None:
    html = page(ROWS)
    read = Page(html)
    for tag, attributes in read.tags:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action") and not name.startswith("on"), (tag, name)
            assert name != "href" or value == "data:," or (value or "").startswith("#"), (tag, value)
            assert name != "style" or re.fullmatch(r"flex-grow: \d+", value or ""), (tag, value)
    assert "url(" not in html and "@import" not in html and "http://" not in html and "https://" not in html


def test_only_its_own_script_may_run() -> None:
    html = page(ROWS)
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = next(a["content"] for t, a in Page(html).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


@pytest.mark.parametrize("attack", ATTACKS)
def test_text_is_never_markup(attack: str) -> None:
    row = item(attack, attack, attack + " 하나", "둘 " + attack)
    row["row"] = {attack: attack, "document": attack, "title": attack}
    row["prompt"] = attack
    arguments = {
        "title": attack, "verdict": attack, "settings": {attack: attack, "list": [attack]},
        "prompt": attack + "{document}{title}" + attack, "given": [(attack, True), (attack, False)],
        "facts": {attack: attack}, "defaults": {attack: attack},
        "run": {attack: (attack, attack)}, "log": [{"step": attack, "loss": attack}, {"step": 1, "loss": 1.0}],
    }  # fmt: skip
    hostile, plain = (
        page([row], **arguments),
        page([ROWS[0]], **(arguments | {"title": "x", "prompt": "{document}{title}"})),
    )
    read = Page(hostile)
    assert (read.count("script"), read.count("img"), read.count("style"), read.count("pre")) == (1, 0, 1, 2)
    assert read.raw["script"] == Page(plain).raw["script"]
    assert read.text.count(attack) >= 8  # shown as it is: title, verdict, table cells, cards, prompt
    assert "49 " not in read.text
    for _, attributes in read.tags:
        assert not any(name.startswith("on") for name in attributes)
    assert not any(attack in (value or "") for _, attributes in read.tags for value in attributes.values())


def test_without_log_rows_or_models() -> None:
    read = Page(page(ROWS, log=[], facts={}))
    assert "No training log was found." in read.text
    nothing = Page(page([]))
    assert "No rows were compared." in nothing.text
    assert "There is nothing to compare" in nothing.text


def test_one_row_shows_no_interval() -> None:
    read = Page(page(ROWS[:1]))
    assert "in 0 of 1 row." in read.text and "1 of 1 row better" in read.text
    assert "too few rows" in read.text and "95%" not in read.text.split("What changed")[0]
    assert not any("bar" in (a.get("class") or "").split() for _, a in read.tags)


def test_three_hundred_rows() -> None:
    rows = [item(f"본문 {i} " * 100, f"제목 {i}", f"답 {i}", f"제목 {i}") for i in range(300)]
    start = time.process_time()
    html = page(rows)
    assert time.process_time() - start < 20
    assert Page(html).count("li") == 300 + 3  # and three typical wins
    assert "chrF rose in 300," in html


@pytest.mark.parametrize("length", [5, 300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_page_of_a_hundred_rows_stays_under_300_kb(length: int) -> None:
    """However long the texts; markup counts, and Hangul takes three bytes."""
    rows = [item("본문 " * length, f"제목 {i} " * 8, "답 " * length, "제목 " * length) for i in range(100)]
    assert len(page(rows, settings=dict.fromkeys(map(str, range(80)), "x" * 20)).encode()) < 300_000


def test_the_page_speaks_korean() -> None:
    language.use("ko")
    try:
        read = Page(page(ROWS))
    finally:
        language.use(None)
    assert next(attributes for tag, attributes in read.tags if tag == "html")["lang"] == "ko"
    assert "2개 행 중 1개가 나아짐" in read.text and "답 나란히 보기" in read.text
    assert "chrF이(가)" not in read.text and "chrF가 오른 행 1개" in read.text


def test_missing_numbers_are_dashes() -> None:
    row = ROWS[0] | {"base": {"chrf": None}, "tuned": {"chrf": math.nan, "loss": math.inf}}
    nan = dict.fromkeys(("mean", "low", "high"), math.nan)
    metrics = {"base": {"chrf": math.nan}, "tuned": {"loss": None}, "difference": {"chrf": nan}, "rows": 40}
    read = Page(page([row], metrics=metrics, verdict="-"))
    assert "nan" not in read.text.lower() and "inf" not in read.text
    assert read.text.count("not measured") == 8
    assert "1 without a score." in read.text
    assert 'data-gain=""' in page([row], metrics=metrics, verdict="-")


def test_empty_answers() -> None:
    html = page([item("본문", "", "", "  \n")])
    assert html.count('<p class="empty">') == 3


def test_characters_that_html_cannot_contain() -> None:
    html = page([item("본문", "제목", "반쪽 \ud83d", "\x00\x1b[31m")], title="\udfff")
    assert html.encode("utf-8").decode() == html
    assert "반쪽 \N{REPLACEMENT CHARACTER}" in Page(html).text
    assert not re.search(r"[\x00-\x08\x1b]", html)


def test_template_columns_and_pieces() -> None:
    assert template_columns("{{x}} {a} [[{b}]] {a} {answer}!") == (["a", "b"], "answer")
    assert prompt_pieces("{{x}} {a}\n{b}!") == [("{{x}} {a}\n", False), ("{b}", True), ("!", False)]
    assert template_columns("no column, {{literal}}") == ([], "")
    assert prompt_pieces("{{literal}}") == [("{{literal}}", False)]
    chat = "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% set x = {'a': 1} %}{% endfor %}"
    assert template_columns(chat) == ([], "")
    assert prompt_pieces(chat) == [(chat, False)]
