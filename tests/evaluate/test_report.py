"""The report: data is never markup, missing numbers stay missing, coordinates by hand."""

import base64
import hashlib
import math
import re
import time
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byeori.evaluate.chart import loss_chart
from byeori.evaluate.metrics import ROW_METRICS
from byeori.evaluate.report import card, matching, metric_rows, prompt_pieces, tally, template_columns
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
    read = Page(page(ROWS, extra={"This machine": {"CPU": "2 cores"}}))
    for words in (
        "제목 생성기", "out/adapter", "Too few rows to tell", "서울시가 예산안을 발표했다.", "박물관 야간 개장",
        "lora_r", "q_proj, v_proj", "This machine", "2 cores", "### 본문:\n{document}",
        "chrF rose in 1, fell in 1 and stayed the same in 0 of 2 rows", "Cut off at the length limit.",
    ):  # fmt: skip
        assert words in read.text, words
    assert "id" not in re.findall(r"<h3[^>]*>([^<]*)</h3>", page(ROWS))  # the template does not use this column
    html = next(attributes for tag, attributes in read.tags if tag == "html")
    assert html["lang"] == "en"


def test_the_answer_column_is_marked_in_the_prompt() -> None:
    shown = re.search(r"<pre[^>]*>\n(.*?)</pre>", page(ROWS), re.DOTALL)
    assert shown and shown[1] == PROMPT.replace("{title}", "<mark>{title}</mark>")


def test_the_first_prompt_is_shown_as_the_models_read_it() -> None:
    shown = re.findall(r"<pre[^>]*>\n(.*?)</pre>", page(ROWS), re.DOTALL)[1]
    assert shown == ('<span class="special">&lt;bos&gt;</span>### 본문:\n서울시가 예산안을 발표했다.\n\n### 제목:\n')
    assert page([], given=[]).count("<pre") == 1


def test_the_page_is_self_contained() -> None:
    html = page(ROWS)
    read = Page(html)
    for tag, attributes in read.tags:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action", "style") and not name.startswith("on"), (tag, name)
            assert name != "href" or value == "data:,", (tag, value)
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
        "models": {attack: attack},
        "extra": {attack: {attack: attack}}, "log": [{"step": attack, "loss": attack}, {"step": 1, "loss": 1.0}],
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
    read = Page(page(ROWS, log=[], models={}))
    assert "No training log was found." in read.text
    nothing = Page(page([]))
    assert "No rows were compared." in nothing.text
    assert "There is nothing to compare" in nothing.text


def test_one_row_shows_no_interval() -> None:
    read = Page(page(ROWS[:1]))
    assert "0 of 1 row." in read.text
    assert "too few rows" in read.text and read.text.count("better") == 1  # the note of the loss
    assert not any("bar" in (a.get("class") or "").split() for _, a in read.tags)


def test_three_hundred_rows() -> None:
    rows = [item(f"본문 {i} " * 100, f"제목 {i}", f"답 {i}", f"제목 {i}") for i in range(300)]
    start = time.process_time()
    html = page(rows)
    assert time.process_time() - start < 20
    assert Page(html).count("li") == 300
    assert "chrF rose in 300," in html


def test_missing_numbers_are_dashes() -> None:
    row = ROWS[0] | {"base": {"chrf": None}, "tuned": {"chrf": math.nan, "loss": math.inf}}
    nan = dict.fromkeys(("mean", "low", "high"), math.nan)
    metrics = {"base": {"chrf": math.nan}, "tuned": {"loss": None}, "difference": {"chrf": nan}, "rows": 40}
    read = Page(page([row], metrics=metrics, verdict="-"))
    assert "nan" not in read.text.lower() and "inf" not in read.text
    assert read.text.count("not measured") == 8
    assert "(1 without a score)" in read.text
    assert 'data-gain=""' in page([row], metrics=metrics, verdict="-")


def test_empty_answers() -> None:
    read = Page(page([item("본문", "", "", "  \n")]))
    assert read.text.count("empty answer") == 2


def test_characters_that_html_cannot_contain() -> None:
    html = page([item("본문", "제목", "반쪽 \ud83d", "\x00\x1b[31m")], title="\udfff")
    assert html.encode("utf-8").decode() == html
    assert "반쪽 \N{REPLACEMENT CHARACTER}" in Page(html).text
    assert not re.search(r"[\x00-\x08\x1b]", html)


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


def test_tally_counts_rows() -> None:
    pairs = [(10.0, 20.0), (20.0, 10.0), (10.0, 10.01), (None, 3.0)]
    rows = [{"base": {"chrf": before}, "tuned": {"chrf": after}} for before, after in pairs]
    assert tally(rows) == {"rose": 1, "fell": 1, "same": 1, "unknown": 1}


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


def test_template_columns_and_pieces() -> None:
    assert template_columns("{{x}} {a} [[{b}]] {a} {answer}!") == (["a", "b"], "answer")
    assert prompt_pieces("{{x}} {a}\n{b}!") == [("{{x}} {a}\n", False), ("{b}", True), ("!", False)]
    assert template_columns("no column, {{literal}}") == ([], "")
    assert prompt_pieces("{{literal}}") == [("{{literal}}", False)]
    chat = "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% set x = {'a': 1} %}{% endfor %}"
    assert template_columns(chat) == ([], "")
    assert prompt_pieces(chat) == [(chat, False)]


def test_card_falls_back_to_the_prompt() -> None:
    """Rows with chat messages have no template, and a row may lack what the template names."""
    assert card(ROWS[0], 1, [])["columns"] == [("Prompt", "### 본문:\n서울시가 예산안을 발표했다.")]
    empty = ROWS[0] | {"row": {"document": None, "input": " "}}
    assert card(empty, 1, ["document", "input"])["columns"][0][0] == "Prompt"
