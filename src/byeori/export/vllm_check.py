"""Rows through vLLM, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from byeori.artifacts import serving
from byeori.artifacts.saved_model import SavedModel
from byeori.errors import ModelError
from byeori.evaluate import stop_tokens
from byeori.export import vllm_answers
from byeori.export.export_check import Row, Served
from byeori.export.gguf_convert import precision_of
from byeori.model.load import local_folder
from byeori.support.text_files import one_line


def answers(
    saved: SavedModel, folder: Path, rows: Sequence[Row], max_new_tokens: int, python: str
) -> list[Served | None]:
    """Return what vLLM makes of the rows with an exported folder. python: of an environment with vLLM.

    Raises:
        ModelError: if vLLM cannot be started or fails.
    """
    stops = stop_tokens.stop_ids(saved.tokenizer, None)
    base = local_folder(saved.base, saved.revision) if saved.is_adapter else folder
    given = {
        "model": str(base),
        "tokenizer": str(folder),
        "adapter": str(folder) if saved.is_adapter else None,
        "rank": serving.vllm_rank(folder) if saved.is_adapter else None,
        "dtype": "float32" if precision_of(base) == "f32" else "auto",  # auto is 16 bit for float32 weights
        "context": max(len(row.ids) for row in rows) + max_new_tokens + 1,
        "max_new_tokens": max_new_tokens,
        "stop_ids": stops,
        "requests": [row.request for row in rows],
    }
    with tempfile.TemporaryDirectory(prefix="byeori-vllm-") as name:
        asked, found = Path(name) / "given.json", Path(name) / "found.json"
        asked.write_text(json.dumps(given, ensure_ascii=False), encoding="utf-8")
        hidden = {"PYTHONPATH", "PYTHONHOME"}
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        command = [python, vllm_answers.__file__, str(asked), str(found)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ModelError(f"--vllm_python {python}: {error.strerror}; give the Python of an environment") from None
        if done.returncode or not found.is_file():
            lines = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()[-1:]
            raise ModelError(f"vLLM cannot answer with this export: {one_line(lines[-1] if lines else '', 300)}")
        results = json.loads(found.read_text(encoding="utf-8"))
    return [Served(prompt=item["prompt"], answer=_until(item["answer"], stops)) for item in results]


def _until(answer: list[int], stops: Sequence[int]) -> list[int]:
    """vLLM's ids go as far as the token that ended the answer."""
    return answer[: next((at for at, token in enumerate(answer) if token in stops), None)]
