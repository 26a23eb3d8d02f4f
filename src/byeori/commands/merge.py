"""`byeori merge`: write an adapter into its base model."""

from __future__ import annotations

from pathlib import Path

from byeori.config import MergeSettings
from byeori.export import merge as merging
from byeori.support import console
from byeori.support.console import say


@console.quiet_libraries()
def merge(settings: MergeSettings) -> merging.MergeResult:
    """Write an adapter into its base; returns what merge_report.json holds."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not console.moving()) as progress:
        task = progress.add_task("Merging", total=None)

        def on_progress(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total)

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
