"""Files of the user's are not overwritten unless they say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from byeori.errors import CheckpointError
from byeori.train.output_dir import check_free


def test_a_folder_with_files_of_the_users(tmp_path: Path) -> None:
    for name in ("README.md", "run.log", ".hidden", "slurm-1.out"):
        (tmp_path / name).write_text("x")
    (tmp_path / "data").mkdir()
    check_free(tmp_path, occupied_ok=False)
    (tmp_path / "template.txt").write_text("{a}\n{b}")
    for occupied_ok in (False, True):  # --overwrite_output_dir is for runs
        with pytest.raises(CheckpointError, match=r"not of a run \(template.txt\)"):
            check_free(tmp_path, occupied_ok=occupied_ok)
    (tmp_path / "byeori.yaml").write_text("seed: 1")
    check_free(tmp_path, occupied_ok=True)
