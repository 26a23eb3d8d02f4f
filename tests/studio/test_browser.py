"""The whole road in a browser, on the embedded model: from rows to a GGUF file, in both languages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from browser import CHROMIUM, DRIVER, MISSING, WIDTHS, browser, complaints, resize, server
from byeori.studio import jobs, pages
from byeori.studio.workspace import Workspace
from proxy import PLACE, proxy
from studio_page import wait_for
from tiny_models import SAMPLES

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING),
]
SCREENS = (
    "",
    "data",
    "template",
    "plan",
    "train",
    "try",
    "compare",
    "ship",
    "ship?do=merge",
    "ship?do=publish",
    "ship?do=serve",
)


class Road:
    """A browser on the way through the screens."""

    def __init__(self, window: Any, address: str) -> None:
        self.window, self.base = window, address.split("?")[0]
        window.get(address)
        assert window.current_url == self.base  # the token has left the address

    def go(self, screen: str) -> None:
        self.window.get(self.base + screen)

    def find(self, selector: str) -> Any:
        return wait_for(lambda: next(iter(self.window.find_elements("css selector", selector)), None), 60)

    def click(self, selector: str) -> None:
        self.window.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.find(selector))
        self.find(selector).click()

    def choose(self, selector: str, text: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.find(selector)).select_by_visible_text(text)

    def type(self, selector: str, text: str) -> None:
        field = self.find(selector)
        field.clear()
        field.send_keys(text)

    def wait(self, found: Callable[[], Any], seconds: float = 600) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException

        def tried() -> Any:
            try:
                return found()
            except StaleElementReferenceException:  # htmx has put another part in its place
                return None

        return wait_for(tried, seconds)

    def text(self, selector: str) -> str:
        return str(self.wait(lambda: self.find(selector).text, 60))


def prepare(folder: Path) -> None:
    for name, rows in (("titles-ko-train.jsonl", 48), ("titles-ko-test.jsonl", 4)):
        lines = (SAMPLES / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:rows]), encoding="utf-8")


def start(road: Road, model: str, steps: int) -> None:
    """Rows, template and settings by clicks, and a run."""
    road.go("data")
    road.choose("#path", "titles-ko-train.jsonl")
    road.click("form[action='data-choose'] button.main")
    assert road.text("table.rows").count("titles-ko-train.jsonl line") == 20
    road.go("template")
    from selenium.webdriver.support.ui import Select

    Select(road.find("#base_model")).select_by_value(model)
    road.click("form[action='template-model'] button")
    road.wait(lambda: road.window.find_elements("css selector", "#live mark"))
    road.go("plan")
    road.click("button[value='quick']")
    road.click("form[action='plan-keep'] details summary")
    road.type("#f-max_steps", str(steps))
    road.type("#f-num_epochs", "20")
    road.type("#f-batch_size", "2")
    road.click("button[value='train']")
    road.wait(lambda: "run=run-1" in road.window.current_url)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with rows; what the page started in it ends with the test."""
    folder = tmp_path / "work"
    folder.mkdir()
    prepare(folder)
    yield folder
    for job in jobs.every(Workspace(folder)):
        jobs.stop(job)


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("language", ["en", pytest.param("ko", marks=pytest.mark.slow)])
def test_from_rows_to_a_gguf_file(language: str, tiny_model: Path, folder: Path) -> None:
    """Enough steps of a tiny model that it is still training when the page is opened again."""
    shutil.copytree(tiny_model, folder / "model")
    walk(language, "model", 400, folder)


@pytest.mark.timeout(2400)
@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_embedded_model_goes_the_same_road(language: str, embedded: Path, folder: Path) -> None:
    walk(language, str(embedded), 10, folder)


def written(log: Path) -> int:
    """The steps of a run so far."""
    return log.read_text(encoding="utf-8").count("\n")


def walk(language: str, model: str, steps: int, folder: Path) -> None:
    """From rows to a GGUF file; the page is closed while it trains."""
    words = {"en": ("running", "done", "Judged better"), "ko": ("실행 중", "완료", "더 낫다고")}[language]
    with server(folder) as address:
        with browser(language) as window:
            road = Road(window, address)
            start(road, model, steps)
            road.wait(lambda: road.window.find_elements("css selector", "#live svg"))
            assert words[0] in road.text("#live [role=status]")
            before = complaints(window)
        log = folder / "run-1" / "train_log.jsonl"
        steps_then = written(log)
        wait_for(lambda: written(log) > steps_then)  # it goes on without a page
        with browser(language) as window:
            road = Road(window, address)
            road.go("train?run=run-1")
            road.wait(lambda: words[1] in road.text("#live [role=status]"), 400)
            assert written(log) >= steps
            road.go("try?run=run-1")
            road.type("textarea[name='column:document']", "봄꽃이 피었다.")
            road.click("#blind")
            road.click("form[action='try-ask'] details summary")
            road.type("#f-max_new_tokens", "8")
            road.click("form[action='try-ask'] button.main")
            road.wait(lambda: road.window.find_elements("css selector", "form[action='try-judge'] button"))
            road.click("form[action='try-judge'] button")
            road.wait(lambda: words[2] in road.text("#live"))
            road.go("compare?run=run-1")
            road.type("#f-max_new_tokens", "8")
            road.click("form[action='compare-start'] details summary")
            road.type("#f-few_shots", "0")
            road.click("form[action='compare-start'] button.main")
            road.wait(lambda: (folder / "report-1" / "report.html").exists())
            road.go("compare")
            assert road.window.find_elements("css selector", "#people")  # the thumb
            window.switch_to.frame(road.find("iframe"))
            assert road.wait(lambda: window.find_elements("css selector", "h1"))
            window.switch_to.default_content()
            road.go("ship?do=merge")
            road.click("form[action='ship-merge'] button.main")
            road.wait(lambda: (folder / "merged-1" / "merge_report.json").exists())
            road.go("ship?do=export")
            road.type("#f-check_rows", "2")
            road.click("form[action='ship-export'] button.main")
            road.wait(lambda: (folder / "export-1" / "export_report.json").exists())
            assert list(folder.glob("export-1/*.gguf"))
            assert not [line for line in [*before, *complaints(window)] if "compare-report" not in line]
    assert (folder / "judgements.jsonl").read_text(encoding="utf-8").count("\n") == 1


@pytest.mark.parametrize(
    ("keeps_path", "keeps_host"), [(False, True), pytest.param(True, True, marks=pytest.mark.slow), (True, False)]
)
def test_behind_a_proxy_with_a_path_of_its_own(keeps_path: bool, keeps_host: bool, folder: Path) -> None:
    """As jupyter-server-proxy (which removes its path, or keeps it under proxy/absolute) and nginx (another host)."""
    with proxy(keeps_path=keeps_path, keeps_host=keeps_host) as front:
        more = [*(["--root_path", PLACE] if keeps_path else []), *([] if keeps_host else ["--origin", front.origin])]
        with server(folder, *more) as address, browser() as window:
            behind = urlsplit(address)
            front.behind = int(behind.port or 0)
            road = Road(window, f"{front.origin}{PLACE}/?{behind.query}")
            for place, screen in enumerate(pages.SCREENS, 1):
                road.click(f"nav a[data-key='{place}']")
                road.wait(lambda: window.execute_script("return document.readyState") == "complete")
                assert window.current_url.startswith(f"{front.origin}{PLACE}/"), screen
            road.go("data")
            road.choose("#path", "titles-ko-train.jsonl")
            road.click("form[action='data-choose'] button.main")
            assert "titles-ko-train.jsonl line" in road.text("table.rows")
            road.click(".where a")  # the other language
            assert road.wait(lambda: window.current_url.endswith("/data") and "데이터" in road.text("nav"))
            assert not complaints(window)


def test_dark_and_light_by_a_button(folder: Path) -> None:
    """The choice outlives the page; the other choice follows the system again."""
    with server(folder) as address, browser() as window:
        road = Road(window, address)
        color = "return getComputedStyle(document.body).backgroundColor"
        resize(window, 1280)
        light = window.execute_script(color)
        assert road.text("#look") == "Dark"
        road.click("#look")
        dark = window.execute_script(color)
        assert dark != light and road.text("#look") == "Light"
        road.go("data")
        assert window.execute_script(color) == dark
        resize(window, 1280, dark=True)
        road.click("#look")
        assert window.execute_script(color) == light
        resize(window, 1280)
        road.click("#look")
        road.click("#look")
        assert window.execute_script("return localStorage.length") == 0
        resize(window, 1280, dark=True)
        assert window.execute_script(color) == dark
        assert not complaints(window)


SCRIPT = "<script>window.hit = 1</script>\"'><img src=x onerror='window.hit = 1'>"
FILL = """for (const field of arguments[0].querySelectorAll("input:not([type]), input[inputmode], textarea"))
    field.value = arguments[1];
arguments[0].requestSubmit();"""


def test_scripts_in_data_and_in_every_text_field_do_not_run(folder: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "v0_1" / "sft", folder / SCRIPT.replace("/", ""))
    row = {"document": SCRIPT, SCRIPT: SCRIPT, "title": SCRIPT}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with server(folder) as address, browser() as window:
        road = Road(window, address)
        road.go("data")
        road.choose("#path", "rows.jsonl")
        road.click("form[action='data-choose'] button.main")
        assert "window.hit = 1" in road.text("table.rows")
        tried = 0
        for screen in SCREENS:
            road.go(screen)
            for number in range(len(window.find_elements("css selector", "form"))):
                road.go(screen)
                assert window.execute_script("return window.hit") is None, screen
                form = window.find_elements("css selector", "form")[number]
                if form.find_elements("css selector", "input:not([type]), input[inputmode], textarea"):
                    window.execute_script(FILL, form, SCRIPT)
                    road.wait(lambda: window.execute_script("return document.readyState") == "complete")
                    assert window.execute_script("return window.hit") is None, (screen, number)
                    tried += 1
        assert tried > 8


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_another_page_reads_and_changes_nothing(name: str, folder: Path) -> None:
    """A page of another site, and one of the same site (another port), whose requests carry the cookie."""
    attack = """const done = arguments[1], choose = arguments[0] + "data-choose";
        const body = new URLSearchParams({other: "titles-ko-test.jsonl"}), credentials = "include";
        Promise.allSettled([
            fetch(choose, {method: "POST", mode: "no-cors", credentials, body}),
            fetch(arguments[0] + "data", {credentials}),
            fetch(arguments[0] + "data", {credentials, mode: "no-cors"}),
        ]).then((all) => done(all.map((one) => one.status + (one.value ? one.value.type : ""))));"""
    form = """document.body.innerHTML = "<form method=post><input name=other value=titles-ko-test.jsonl></form>";
        document.forms[0].action = arguments[0] + "data-choose"; document.forms[0].submit();"""
    listener = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    with server(folder) as address, browser() as window:
        window.get(address.split("?")[0])
        assert "needs the address with the token" in window.page_source
        road = Road(window, address)
        road.go("data")
        road.type("#other", "../outside.jsonl")
        road.click("form[action='data-choose'] button.main")
        assert "is outside" in road.text("[role=alert]")
        road.choose("#path", "titles-ko-train.jsonl")
        road.click("form[action='data-choose'] button.main")
        assert road.text("table.rows")
        window.get(f"http://{name}:{listener.server_port}/")
        read = window.execute_async_script(attack, road.base)
        assert read[1] == "rejected" and "basic" not in "".join(read)
        window.execute_script(form, road.base)
        road.wait(lambda: "comes from another page" in window.page_source)
        assert Workspace(folder).draft("train")["data_path"] == ["titles-ko-train.jsonl"]
    listener.shutdown()


def test_keys_and_copies(folder: Path) -> None:
    with server(folder) as address, browser() as window:
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        road = Road(window, address)
        ActionChains(window).key_down(Keys.ALT).send_keys("2").key_up(Keys.ALT).perform()
        road.wait(lambda: window.current_url.endswith("data"))
        ActionChains(window).send_keys(Keys.TAB, Keys.ENTER).perform()  # the first stop skips the navigation
        assert window.switch_to.active_element.get_attribute("id") == "main"
        window.execute_cdp_cmd(
            "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        )
        road.go("plan")
        road.click("[data-copy='as-command']")
        copied = window.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
        assert copied.strip().startswith("byeori sft --output_dir run-1")


def axe(folder: Path) -> str:
    """axe-core's script: of NODE_PATH, or from npm; the test is left out without either."""
    places = [Path(path) / "axe-core" / "axe.min.js" for path in os.environ.get("NODE_PATH", "").split(":") if path]
    found = next((path for path in places if path.is_file()), None)
    if found is None and (npm := shutil.which("npm")):
        command = [npm, "pack", "axe-core@4", "--silent", "--pack-destination", str(folder)]
        packed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        for path in folder.glob("axe-core-*.tgz") if packed.returncode == 0 else ():
            with tarfile.open(path) as archive:
                archive.extract("package/axe.min.js", folder, filter="data")
            found = folder / "package" / "axe.min.js"
    if found is None:
        pytest.skip("axe-core is not here: npm install axe-core, and NODE_PATH=that/node_modules")
    return found.read_text(encoding="utf-8")


LOOKS = [(code, width, dark) for code in ("en", "ko") for width in WIDTHS for dark in (False, True)]
SHORT = [("en", WIDTHS[0], False), ("ko", WIDTHS[1], True)]


@pytest.mark.parametrize(
    "looks",
    [
        pytest.param(SHORT, id="two"),
        pytest.param([look for look in LOOKS if look not in SHORT], marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing_on_any_screen(looks: list[tuple[str, int, bool]], folder: Path, tmp_path: Path) -> None:
    """In both languages, wide and narrow, light and dark, with runs, thumbs and a report to show."""
    script = axe(tmp_path)
    for name in ("dpo", "sft"):
        shutil.copytree(Path(__file__).parents[1] / "fixtures" / "v0_1" / name, folder / name)
    (folder / "report").mkdir()
    (folder / "report" / "report.html").write_text("<h1>A report</h1>", encoding="utf-8")
    numbers = {"rows": 4, "tuned": {"chrf": 30.0}, "difference": {"chrf": {"mean": 1.0, "low": -1.0, "high": 3.0}}}
    (folder / "report" / "metrics.json").write_text(json.dumps(numbers), encoding="utf-8")
    line = {"model": "sft", "better": "tuned", "blind": True}
    (folder / "judgements.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    run = "axe.run(document, {iframes: false}).then(found => arguments[0](found.violations.map(rule => rule.id)))"
    with server(folder) as address, browser() as window:
        road = Road(window, address)
        road.go("data")
        road.choose("#path", "titles-ko-train.jsonl")
        road.click("form[action='data-choose'] button.main")
        for code, width, dark in looks:
            road.go(f"language?code={code}")
            resize(window, width, dark=dark)
            for screen in [*SCREENS, "train?run=dpo&with=sft"]:
                road.go(screen)
                window.execute_script(script)
                assert not window.execute_async_script(run), (screen, code, width, dark)
