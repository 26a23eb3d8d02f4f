"""A format is one class: merge writes and checks with it, publish finds its files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from byeori.errors import ModelError
from byeori.export import formats, merged_tensors
from byeori.export.merge import merge
from byeori.export.merge_plan import MergedModel, Progress
from byeori.export.publish import collect


class Npz:
    """A format as somebody else would add it: all tensors in one file of NumPy's."""

    name = "npz"

    def __init__(self, difference: str = "") -> None:
        self.difference = difference

    def recognises(self, folder: Path) -> bool:
        return (folder / "model.npz").is_file()

    def files(self, folder: Path) -> Iterator[Path]:
        yield folder / "model.npz"

    def write(self, folder: Path, model: MergedModel, on_progress: Progress) -> None:
        blocks = {item.name: torch.cat(list(merged_tensors.blocks(item))) for item in model.tensors}
        shapes = {item.name: item.source.shape for item in model.tensors}
        np.savez(folder / "model.npz", **{name: block.view(shapes[name]).numpy() for name, block in blocks.items()})

    def check(self, folder: Path, model: MergedModel, on_progress: Progress) -> tuple[dict[str, Any], str]:
        return {"read_back": len(np.load(folder / "model.npz"))}, self.difference


def test_merge_writes_and_checks_with_the_format(trained: Path, merged: Path, tmp_path: Path) -> None:
    result = merge(adapter=trained, base=None, output_dir=tmp_path / "out", output_format=Npz())
    assert {path.name for path in result.output_dir.iterdir()} == {"model.npz", "merge_report.json"}
    written, expected = np.load(result.output_dir / "model.npz"), load_file(merged / "model.safetensors")
    assert set(written) == set(expected)
    assert all(np.array_equal(written[name], tensor.numpy()) for name, tensor in expected.items())
    report = json.loads((result.output_dir / "merge_report.json").read_text(encoding="utf-8"))
    assert (report["verdict"], report["read_back"]) == ("equal", result.tensors) and result.verdict == "equal"


def test_a_difference_is_reported_and_set_aside(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"differs from the adapter on .*: the last layer is missing; it is left in"):
        merge(adapter=trained, base=None, output_dir=tmp_path / "out", output_format=Npz("the last layer is missing"))
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]
    assert json.loads((tmp_path / "out.failed" / "merge_report.json").read_text())["verdict"] == "different"


def test_publish_uploads_the_files_of_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.npz").write_bytes(b"weights")
    (folder / "notes.txt").write_text("private")
    with pytest.raises(ModelError, match=r"is not a model in a known format \(adapter, safetensors, gguf\)"):
        collect(folder, "me/titles")
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, Npz()))
    assert set(collect(folder, "me/titles")) == {"model.npz", "README.md"}


def test_publish_needs_no_torch() -> None:
    code = "import sys, byeori.export.publish; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
