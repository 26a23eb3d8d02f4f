"""A real browser: Debian's Chromium, driven by Selenium, on a page that a real `byeori studio` serves."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from studio_page import wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)"
WIDTHS = (1280, 390)


@contextmanager
def server(folder: Path, *more: str) -> Iterator[str]:
    """The address, with its token, of a studio in a process of its own. more: words of its command."""
    log = folder.parent / f"{folder.name}.log"
    with log.open("w") as file:
        words = [sys.executable, "-m", "byeori", "studio", str(folder), "--port", "0", "--open_browser", "off", *more]
        process = subprocess.Popen(words, stderr=file, env=os.environ | {"LANG": "C.UTF-8"})
    try:
        found = wait_for(lambda: re.search(r"http://\S+", log.read_text()) or (process.poll() is not None and "ended"))
        assert found != "ended", log.read_text()
        yield found.group()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@contextmanager
def browser(language: str = "en") -> Iterator[Any]:
    """A browser window."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--accept-lang={language}",
        "--disable-dev-shm-usage",
    ):
        options.add_argument(word)
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})  # type: ignore[no-untyped-call]
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    window.set_page_load_timeout(60)
    try:
        yield window
    finally:
        window.quit()


def resize(window: Any, width: int, *, dark: bool = False, height: int = 900) -> None:
    """Show the page at a width, also one that a window cannot have."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def complaints(window: Any) -> list[str]:
    """What the browser wrote into its console: scripts that failed or were refused, files that are missing."""
    return [entry["message"] for entry in window.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
