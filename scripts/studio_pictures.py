"""docs/images/studio/: every screen of a running studio at two widths, and what axe-core finds wrong with them.

    python scripts/studio_pictures.py ADDRESS [--axe node_modules/axe-core/axe.min.js] [--language ko] [--folder FOLDER]

ADDRESS is the one with the token that `byeori studio` prints, best of a folder in which the first run has ended. Needs
Chromium, chromedriver and Pillow. Exits with 1 if axe finds anything, or a screen is wider than the window.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from selenium.webdriver import Chrome

from browser import WIDTHS, browser, resize

SCREENS = {
    "home": "",
    "data": "data",
    "template": "template",
    "plan": "plan",
    "train": "train",
    "try": "try",
    "compare": "compare",
    "ship": "ship",
}
_TALLEST = 1800  # pixels of a picture
_AXE = """axe.run(document, {iframes: false}).then(
    found => arguments[0](found.violations.map(rule => rule.id + ': ' + rule.nodes[0].html)))"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--axe", type=Path)
    parser.add_argument("--language", default="en")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "studio")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    base, wrong = given.address.split("?")[0], 0
    with browser(given.language) as window:
        window.get(given.address)
        window.get(f"{base}language?code={given.language}")
        for name, place in SCREENS.items():
            for width in WIDTHS:
                resize(window, width)
                window.get(base + place)
                time.sleep(1)
                tall, wide = (
                    window.execute_script(f"return document.documentElement.scroll{side}")
                    for side in ("Height", "Width")
                )
                tall = min(tall, _TALLEST)
                resize(window, width, height=tall)  # frames draw only what a window shows
                time.sleep(1)
                save(
                    window, width, tall, given.folder / f"{name}-{width}{'-ko' if given.language == 'ko' else ''}.webp"
                )
                found = [f"{wide} pixels wide"] if wide > width else []
                if given.axe:
                    window.execute_script(given.axe.read_text(encoding="utf-8"))
                    found += window.execute_async_script(_AXE)
                wrong += len(found)
                print(name, width, *(found or ["ok"]), sep="\n    " if found else " ")
    return int(wrong > 0)


def save(window: Chrome, width: int, tall: int, path: Path) -> None:
    """Save what the window shows, compressed."""
    from PIL import Image

    clip = {"x": 0, "y": 0, "width": width, "height": tall, "scale": 1}
    shot = window.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip})
    Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB").save(path, quality=60, method=6)


if __name__ == "__main__":
    sys.exit(main())
