"""The plans that README.md and docs/plan.md print: `python tests/helpers/printed_plans.py` writes them anew."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import re
import shlex
import tempfile
from pathlib import Path
from unittest import mock

from byeori import cli
from byeori.plan import prices

ROOT = Path(__file__).parents[2]
WRITTEN = datetime.date(2026, 11, 30)  # the day by which the printed plans say which prices are old
PAGES = ("README.md", "README.ko.md", "docs/plan.md", "docs/plan.ko.md")
_BLOCK = re.compile(r"(<!-- (plan\S*) -->\n)(.*?)(<!-- /\2 -->)", re.DOTALL)


def commands() -> list[str]:
    """The two commands in docs/plan.md whose output stands below them."""
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    return re.findall(r"^byeori (plan (?:--objective dpo )?--base_model examples.*?[^\\])$", page, re.M | re.DOTALL)


def printed(command: str) -> str:
    """What a command prints on a machine without prices and speeds of its own."""
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, BYEORI_CACHE=cache),
        mock.patch.object(prices, "today", lambda: WRITTEN),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.chdir(ROOT),
    ):
        assert cli.main(shlex.split(command.replace("\\\n", " "))) == 0
    return out.getvalue().strip()


def blocks(page: str) -> dict[str, str]:
    """The printed plans of a page by the name in their marks: plan-1, plan-2."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return {name: body.split("```")[1].strip() for _, name, body, _ in _BLOCK.findall(text)}


def expected() -> dict[str, str]:
    """What must stand between the marks of a name."""
    first, second = map(printed, commands())
    return {"plan-1": first, "plan-2": second}


def main() -> None:
    plans = expected()
    for page in (ROOT / name for name in PAGES):
        text = page.read_text(encoding="utf-8")
        page.write_text(_BLOCK.sub(lambda m: f"{m[1]}```\n{plans[m[2]]}\n```\n{m[4]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
