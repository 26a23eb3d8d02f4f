"""`byeori merge`: write an adapter into its base model."""

from __future__ import annotations

from pathlib import Path

from byeori.config import MergeSettings
from byeori.export import merge as merging
from byeori.support import console
from byeori.support.console import say


@console.quiet_libraries()
def merge(settings: MergeSettings) -> merging.MergeResult:
    """Merge an adapter into its base, as a model of its own."""
    with console.progress("Merging", shown=console.moving()) as on_progress:
        result = merging.merge(
            adapter=settings.peft_model_path,
            base=settings.base_model_name_or_path,
            output_dir=Path(settings.output_dir),
            dtype=settings.dtype,
            verify=settings.verify,
            overwrite=settings.overwrite_output_dir,
            on_progress=on_progress,
        )
    say(f"Merged model in {settings.output_dir}")
    return result
