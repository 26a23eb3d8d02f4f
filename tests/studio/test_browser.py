"""The whole road in a browser, on the embedded model: from rows to a GGUF file, in both languages."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import CHROMIUM, DRIVER, MISSING, WIDTHS, browser, complaints, resize, server
from byeori.studio import jobs
from byeori.studio.workspace import Workspace
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


def start(road: Road, embedded: Path, steps: int) -> None:
    """Rows, template and settings by clicks, and a run."""
    road.go("data")
    road.choose("#path", "titles-ko-train.jsonl")
    road.click("form[action='data-choose'] button.main")
    assert road.text("table.rows").count("titles-ko-train.jsonl line") == 20
    road.go("template")
    from selenium.webdriver.support.ui import Select

    Select(road.find("#base_model")).select_by_value(str(embedded))
    road.click("form[action='template-model'] button")
    road.wait(lambda: road.window.find_elements("css selector", "#live mark"))
    road.go("plan")
    road.click("button[value='quick']")
    road.click("form[action='plan-keep'] details summary")
    road.type("#f-max_steps", str(steps))
    road.type("#f-batch_size", "2")
    road.type("#f-save_steps", "1")
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
@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "ko"])
def test_from_rows_to_a_gguf_file(language: str, embedded: Path, folder: Path) -> None:
    words = {"en": ("done", "Resume", "Judged better"), "ko": ("완료", "이어서 학습", "더 낫다고")}[language]
    with server(folder) as address:
        with browser(language) as window:
            road = Road(window, address)
            start(road, embedded, 10)
            road.wait(lambda: "10" in road.text("#live") and road.window.find_elements("css selector", "#live svg"))
            before = complaints(window)
        # the page is closed while it trains
        log = folder / "run-1" / "train_log.jsonl"
        seen = log.read_text(encoding="utf-8").count("\n")
        wait_for(
            lambda: (
                log.read_text(encoding="utf-8").count("\n") > seen
                or (folder / "run-1" / "adapter_model.safetensors").exists()
            )
        )
        with browser(language) as window:
            road = Road(window, address)
            road.go("train?run=run-1")
            road.wait(lambda: words[0] in road.text("#live [role=status]"), 400)
            assert log.read_text(encoding="utf-8").count("\n") >= 10
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
            frame = road.find("iframe")
            window.switch_to.frame(frame)
            assert road.wait(lambda: window.find_elements("css selector", "h1"))
            window.switch_to.default_content()
            road.go("ship?do=merge")
            road.click("form[action='ship-merge'] button.main")
            road.wait(lambda: (folder / "merged-1" / "merge_report.json").exists())
            road.go("ship?do=export")
            road.type("#f-check_rows", "2")
            road.click("form[action='ship-export'] button.main")
            road.wait(lambda: list(folder.glob("export-1/*.gguf")))
            assert not [line for line in [*before, *complaints(window)] if "compare-report" not in line]
    assert (folder / "judgements.jsonl").read_text(encoding="utf-8").count("\n") == 1


def test_no_screen_is_wider_than_a_phone_or_complains(folder: Path) -> None:
    """On the narrow screen nothing but tables and the navigation scrolls sideways; no script or style is refused."""
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "v0_1" / "dpo", folder / "of-dpo")
    with server(folder) as address, browser() as window:
        road = Road(window, address)
        road.go("data")
        road.choose("#path", "titles-ko-train.jsonl")
        road.click("form[action='data-choose'] button.main")
        for code in ("en", "ko"):
            road.go(f"language?code={code}")
            for width in WIDTHS:
                resize(window, width)
                for screen in SCREENS:
                    road.go(screen)
                    assert window.execute_script("return document.documentElement.scrollWidth") <= width, (
                        screen,
                        width,
                    )
        assert not complaints(window)


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


def test_axe_finds_nothing_on_any_screen(folder: Path, tmp_path: Path) -> None:
    """In both languages, light and wide as well as dark and narrow."""
    script = axe(tmp_path)
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "v0_1" / "dpo", folder / "of-dpo")
    run = "axe.run(document, {iframes: false}).then(found => arguments[0](found.violations.map(rule => rule.id)))"
    with server(folder) as address, browser() as window:
        road = Road(window, address)
        road.go("data")
        road.choose("#path", "titles-ko-train.jsonl")
        road.click("form[action='data-choose'] button.main")
        for code, width in (("en", WIDTHS[0]), ("ko", WIDTHS[1])):
            road.go(f"language?code={code}")
            resize(window, width, dark=code == "ko")
            for screen in SCREENS:
                road.go(screen)
                window.execute_script(script)
                assert not window.execute_async_script(run), (screen, width)
