"""For mkdocs: pages that stand at the root of the repository, and links to files outside docs/.

In the repository every link is relative, so that it works on GitHub and in an editor. On the site, a link to a file
that is not a page leads to the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"index.md": "README.md", "index.ko.md": "README.ko.md", "contributing.md": "CONTRIBUTING.md"}
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)((?:#[^)\s]*)?)(?=\))")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The text of a page with links that work on the site."""
    source = FROM_ROOT.get(page.file.src_uri)
    if source:
        markdown = (ROOT / source).read_text(encoding="utf-8")
    folder = posixpath.dirname(source if source else f"docs/{page.file.src_uri}")
    at = posixpath.dirname(f"docs/{page.file.src_uri}")
    pages = {target: f"docs/{name}" for name, target in FROM_ROOT.items()}

    def moved(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        path = pages.get(path, path)
        if path.startswith("docs/"):
            name = posixpath.relpath(path, at)
            if name.endswith(".md") and name.endswith(".ko.md") != page.file.src_uri.endswith(".ko.md"):
                name = _address(name, page.file.src_uri)  # mkdocs builds one language after the other
            return name + link[2]
        return f"{config.repo_url}/blob/main/{path}{link[2]}"

    return _LINK.sub(moved, markdown)


def _address(page: str, seen_from: str) -> str:
    """The address of a page of the other language, relative to the page that links to it."""

    def url(name: str) -> str:
        language, stem = ("ko/", name[:-6]) if name.endswith(".ko.md") else ("", name[:-3])
        return language + ("" if stem == "index" else f"{stem}/")

    return posixpath.relpath(url(page) or ".", url(seen_from) or ".") + "/"
