"""The tutorial as a notebook: committed without outputs, and it runs from top to bottom."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "title_generator.ipynb"


def test_the_notebook_is_committed_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_notebook_speaks_both_languages() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            assert any("가" <= letter <= "힣" for letter in text), text
            assert any("a" <= letter.lower() <= "z" for letter in text), text


@pytest.mark.real
@pytest.mark.timeout(300)
def test_the_notebook_runs(embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("BYEORI_NOTEBOOK_STEPS", "1")
    monkeypatch.setenv(
        "OMP_NUM_THREADS", "1"
    )  # where other processes keep the cores busy, two threads take 12 times as long
    book = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "report" / "report.html").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    streams = "".join(out["text"] for cell in book.cells for out in cell.get("outputs", []) if "text" in out)
    assert "report.html" in streams
    assert "Traceback" not in streams
    shown = [line for line in streams.splitlines() if "Warning" in line]
    assert not shown
