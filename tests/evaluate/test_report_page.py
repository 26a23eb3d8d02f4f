"""The report page in a browser: its script run by Chromium, if installed; its markup everywhere."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from report_page import ROWS, Page, item, page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")

MIXED = [
    item("가" * 30, "서울시 예산안 발표", "예산", "서울시 예산안 발표"),  # the largest gain
    item("=나", "박물관 야간 개장", "박물관 야간 개장", "야간"),  # the largest drop
    item("다 " * 900 + "끝에", "새 도서관 개관", "새 도서관", "새 도서관")  # the longest
    | {"base": {"chrf": 1.0}, "tuned": {"chrf": 1.0, "stopped": 0.0}},
    item("Ｃａｆé", "Caf\u0065\u0301 개점", "", "") | {"base": {"chrf": None}, "tuned": {"chrf": None}},
]
DRIVER = """
var out = {}, root = document.documentElement, list = document.getElementById("cards");
function shown() {
  return Array.from(document.querySelectorAll("#cards > li")).filter(function (card) {
    return card.getClientRects().length > 0;
  }).map(function (card) { return Number(card.dataset.index); });
}
function set(name, value, event) {
  var field = document.getElementById(name);
  field.value = value;
  field.dispatchEvent(new Event(event));
  return shown();
}
["original", "best", "worst", "longest"].forEach(function (name) { out[name] = set("order", name, "change"); });
set("order", "original", "change");
["야간", "  서울시   예산안 ", "CAF\\u00c9", "nothing like it"].forEach(function (text) {
  out[text] = [set("search", text, "input"), document.getElementById("count").textContent,
    document.getElementById("none").hidden];
});
set("search", "", "input");
["better", "worse", "unfinished", "leaked", ""].forEach(function (name) {
  document.querySelector('.chips [data-filter="' + name + '"]').click();
  out["is " + name] = shown();
});
document.querySelector('.share [data-filter="worse"]').click();
out.strip = [shown(), document.querySelector('[aria-pressed="true"]').dataset.filter];
document.querySelector('.gains a[href="#row-1"]').dispatchEvent(new MouseEvent("click", { bubbles: true }));
out.bar = shown();
var blob, make = URL.createObjectURL;
URL.createObjectURL = function (given) { blob = given; return make.call(URL, given); };
HTMLAnchorElement.prototype.click = function () {};  // a download would keep the browser open
document.getElementById("csv").dispatchEvent(new MouseEvent("click", { bubbles: true }));
out.csv = [blob.type, blob.size];
var buttons = list.querySelectorAll(".more"), summary = buttons[0].firstElementChild;
function label() { return summary.innerText.trim(); }
var box = buttons[0].previousElementSibling, before = box.clientHeight;
out.cut = [label(), box.scrollHeight > before];
summary.click();
out.more = [buttons.length, label(), buttons[0].open];
out.grown = box.clientHeight > before;
out.paper = getComputedStyle(document.body).backgroundColor;
out.fits = root.scrollWidth <= root.clientWidth;
document.title = JSON.stringify(out);
"""


def shown_by(source: str, folder: Path, *flags: str) -> dict[str, Any]:
    """Return what the driver reports. The page's policy allows no other script, so it is removed for this one."""
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', source)
    assert policy
    path = folder / "page.html"
    driven = source.replace(policy[0], "").replace("</body>", f"<script>{DRIVER}</script></body>")
    path.write_text(driven, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", *flags]
    done = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr
    seen: dict[str, Any] = json.loads(html.unescape(title[1]))
    return seen


@browser
def test_order_search_and_more_work(tmp_path: Path) -> None:
    seen = shown_by(
        page(MIXED, found=[{"name": "trained_on", "rows": [1], "undermines": False, "sentence": ""}]),
        tmp_path,
        "--window-size=1100,900",
    )
    assert seen["original"] == [1, 2, 3, 4]
    assert seen["best"] == [1, 3, 2, 4] and seen["worst"] == [2, 3, 1, 4]  # without a score: last in either
    assert seen["longest"][0] == 3
    assert seen["야간"] == [[2], "1 of 4 rows", True]
    assert seen["  서울시   예산안 "] == [[1], "1 of 4 rows", True]
    assert seen["CAF\u00c9"] == [[4], "1 of 4 rows", True]  # composed or not, large or small
    assert seen["nothing like it"] == [[], "0 of 4 rows", False]
    assert seen["cut"] == ["More", True]
    assert seen["more"] == [1, "Less", True] and seen["grown"]
    assert (
        seen["is better"] == [1]
        and seen["is worse"] == [2]
        and seen["is leaked"] == [2]
        and seen["is "] == [1, 2, 3, 4]
    )
    assert seen["is unfinished"] == [3]
    assert seen["strip"] == [[2], "worse"]
    assert seen["bar"] == [1, 2, 3, 4]  # a link to a row that a filter hides shows all rows again
    assert seen["csv"][0] == "text/csv" and seen["csv"][1] > 3000
    assert seen["fits"]


@browser
def test_dark_mode_and_narrow_windows(tmp_path: Path) -> None:
    narrow = shown_by(
        page(MIXED, found=[{"name": "trained_on", "rows": [1], "undermines": False, "sentence": ""}]),
        tmp_path,
        "--window-size=500,900",
        "--blink-settings=preferredColorScheme=1",
    )
    dark = shown_by(
        page(MIXED, found=[{"name": "trained_on", "rows": [1], "undermines": False, "sentence": ""}]),
        tmp_path,
        "--window-size=500,900",
        "--blink-settings=preferredColorScheme=0",
    )
    light_paper, dark_paper = ([int(part) for part in re.findall(r"\d+", shown["paper"])] for shown in (narrow, dark))
    assert min(light_paper) > 230 and max(dark_paper) < 40
    assert narrow["fits"] and dark["fits"]


@browser
def test_the_page_runs_under_its_own_policy(tmp_path: Path) -> None:
    """Its script marks the page and counts the rows; a script from the data would not run."""
    path = tmp_path / "page.html"
    path.write_text(page(MIXED).replace("</main>", "<script>document.title = 'ran'</script></main>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dom = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert '<html lang="en" class="js">' in dom and ">4 rows</span>" in dom
    assert "<title>ran</title>" not in dom


# ---- markup ----------------------------------------------------------------------------------------------------


def test_styles_for_small_screens_dark_mode_and_print() -> None:
    read = Page(page(ROWS))
    metas = {attributes.get("name"): attributes.get("content") for tag, attributes in read.tags if tag == "meta"}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["color-scheme"] == "light dark"
    style = read.raw["style"]
    for rule in ("(prefers-color-scheme: dark)", "(max-width: 720px)", "print"):
        assert f"@media {rule} {{" in style
    printed = style.partition("@media print {")[2]
    # on paper nothing can be opened or searched, so everything is there
    assert ".js .controls, .js .chips, .more, #none { display: none !important; }" in printed
    assert ".card[hidden] { display: block !important; }" in printed
    assert "overflow: hidden" not in printed
    cut = re.search(r"@media screen \{.*\n(.*\n)+?\}", style)
    assert cut and "-webkit-line-clamp: 3;" in cut[0] and "-webkit-line-clamp" not in style[: cut.start()]


def test_the_loss_chart_is_drawn_and_described() -> None:
    log = [{"step": step, "loss": 3 - step / 50} for step in range(60)] + [{"step": 59, "eval_loss": 2.0}]
    read = Page(page(ROWS, log=log))
    charts = [attributes for tag, attributes in read.tags if tag == "svg" and attributes.get("role") == "img"]
    label = "Training loss from 3.000 at step 0 to 1.820 at step 59. Evaluation loss 2.000 at step 59."
    assert [chart["aria-label"] for chart in charts if "step" in (chart["aria-label"] or "")] == [label]
    classes = [attributes.get("class") for tag, attributes in read.tags if tag in ("path", "circle")]
    assert {"train", "smooth", "evaluation"} <= {(name or "").strip() for name in classes}


def test_text_shared_with_the_reference_is_marked() -> None:
    row = item("본문", "서울시 예산안 확정", "부산시 축제", "서울시 예산을 확정")
    card = re.search(r'<li class="card.*?</li>', page([row]), re.DOTALL)
    assert card and re.findall("<mark>(.*?)</mark>", card[0]) == ["서울시 예산", "확정"]
