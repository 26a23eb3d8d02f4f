"""The tutorial as a notebook: committed without outputs, and it runs from top to bottom."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

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
@pytest.mark.slow
def test_the_notebook_runs(embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_tutorial(tmp_path, monkeypatch)


def test_the_notebook_runs_on_a_tiny_model(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which lies in the cache in the place of the embedded one."""
    shutil.copytree(tiny_model, tmp_path / "cache" / "gemma-3-270m")
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "cache"))
    run_tutorial(tmp_path, monkeypatch)


def run_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("BYEORI_NOTEBOOK_STEPS", "1")
    # where other processes keep the cores busy, two threads take 12 times as long
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "report" / "report.html").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    streams = "".join(out["text"] for cell in book.cells for out in cell.get("outputs", []) if "text" in out)
    assert "report.html" in streams
    assert "Traceback" not in streams
    shown = [line for line in streams.splitlines() if "Warning" in line]
    assert not shown


# ---- the live line in a notebook ---------------------------------------------------------------------------------


def run_in_a_notebook(folder: Path, *cells: str) -> Any:
    """A notebook of these cells, run in a kernel of its own."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return book


def training(model: Path, rows: Path, output: str) -> str:
    return (
        "import byeori\n"
        f"byeori.sft(base_model={str(model)!r}, data_path={str(rows)!r}, output_dir={output!r}, cutoff_len=256, "
        "max_steps=4, val_set_size=4, dtype='float32')"
    )


def streams(cell: Any) -> str:
    return "".join(out["text"] for out in cell.outputs if out["output_type"] == "stream")


@pytest.fixture(scope="module")
def trained_book(tiny_model: Path, title_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run with widgets, and one after they are gone; and the folder of both."""
    folder, gone = tmp_path_factory.mktemp("notebook"), "import sys; sys.modules['ipywidgets'] = None\n"
    first, second = (training(tiny_model, title_rows, name) for name in ("out", "plain"))
    return run_in_a_notebook(folder, first, gone + second), folder


def test_the_line_moves_in_one_widget_and_ends_at_the_last_step(trained_book: tuple[Any, Path]) -> None:
    book, folder = trained_book
    states = book.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
    (output,) = (item["state"]["outputs"] for item in states if item["model_name"] == "OutputModel")
    (shown,) = output  # what the widget shows once the cell has run; each state replaced the one before
    last = json.loads((folder / "out" / "train_log.jsonl").read_text().splitlines()[-2])
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown["data"]["text/plain"])
    assert re.match(r"step 4/4 \S+ \S+ left 0:00:00\n", text.strip()) and f"last {last['loss']:.4f} " in text
    said = [out["data"]["text/plain"] for out in book.cells[0].outputs if "text/html" in out.get("data", {})]
    assert any(line.startswith("step 4: eval_loss") for line in said)  # lines above it do not go into the widget
    assert "min left" not in streams(book.cells[0]) and "Done: 4 steps" in streams(book.cells[0])


def test_a_notebook_without_widgets_gets_plain_lines(trained_book: tuple[Any, Path]) -> None:
    told = streams(trained_book[0].cells[1])
    assert re.findall(r"^step (\d)/4  loss .* min left$", told, re.MULTILINE) == ["1", "4"]
    assert 'install "ipywidgets"' not in told  # rich's, at every change of a bar that it cannot show
