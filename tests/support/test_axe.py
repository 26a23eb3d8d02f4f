"""axe-core finds nothing wrong with the pages, in both widths and colour schemes.

It runs where Node, Chromium and axe-core are:
npm install puppeteer-core axe-core        (anywhere; NODE_PATH=that/node_modules)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from byeori.support import language
from byeori.train.live import LivePage, Seen
from report_page import ROWS, page

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_pages.mjs"
MODULES = Path(os.environ.get("NODE_PATH", "node_modules"))
there = shutil.which("node") and shutil.which("chromium") and (MODULES / "axe-core").is_dir()


@pytest.mark.slow
@pytest.mark.skipif(not there, reason="no Node, Chromium or axe-core (NODE_PATH) on this machine")
def test_axe_finds_nothing(tmp_path: Path) -> None:
    for name in language.LANGUAGES:
        with language.speaking(name):
            (tmp_path / f"report-{name}.html").write_text(page(ROWS), encoding="utf-8")
    seen = Seen(total=4, epochs=1)
    numbers = {"learning_rate": 1e-4, "tokens": 100, "seconds": 0.5, "peak_memory_bytes": 2**30, "epoch": 0.5}
    for step, loss in enumerate((3.0, 2.0), 1):
        seen.add(numbers | {"step": step, "loss": loss})
    with LivePage(tmp_path, seen, title="run", shown=True):
        pass
    pages = sorted(map(str, tmp_path.glob("*.html")))
    env = os.environ | {"NODE_PATH": str(MODULES.resolve())}
    done = subprocess.run(["node", SCRIPT, *pages], capture_output=True, text=True, timeout=300, env=env)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 4 * len(pages), done.stderr
    assert not [line for line in lines if line["axe"] or line["tooWide"] or line["requests"]]
    assert done.returncode == 0
