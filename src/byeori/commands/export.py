"""`byeori export`: write a model or adapter for llama.cpp, Ollama or vLLM."""

from __future__ import annotations

from pathlib import Path

from byeori.config import ExportSettings
from byeori.export import export as exporting
from byeori.support import console
from byeori.support.console import say


@console.quiet_libraries()
def export(settings: ExportSettings) -> exporting.ExportResult:
    """Write a model or adapter for another program, and check that it answers there as here."""
    check = exporting.Check(
        rows=settings.check_rows,
        data_path=settings.data_path or (),
        max_new_tokens=settings.max_new_tokens,
        vllm_python=settings.vllm_python,
    )
    result = exporting.export(
        model=settings.model,
        base=settings.base_model,
        output_format=settings.format,
        output_dir=Path(settings.output_dir),
        weights=settings.quantize,
        check=check if settings.check == "on" else None,
        overwrite=settings.overwrite_output_dir,
        say=say,
        progress=console.moving(),
    )
    for note in result.notes:
        say(f"Note: {note}")
    for engine, found in result.checks.items():
        answers = f", {found['equal_answers']} of {found['rows']} answers" if "equal_answers" in found else ""
        say(f"{engine}: {found['equal_prompts']} of {found['rows']} prompts{answers} equal those of the original")
    say(f"Export in {settings.output_dir}: {', '.join(result.files)}")
    return result
